"""From frames and a question to the tensors that a Qwen2.5-VL model takes, through its own processor."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from vecattention.testbed.questions import check_spelling

if TYPE_CHECKING:
    from transformers import Qwen2_5_VLProcessor


def prepare(
    processor: Qwen2_5_VLProcessor, frames: Tensor, fps: float, question: str, max_tokens: int | None = None
) -> dict[str, Tensor]:
    """The inputs for `model(**inputs)` and `model.generate(**inputs)`, on the CPU.

    Args:
        processor: of any Qwen2.5-VL checkpoint, with a chat template.
        frames: uint8 [T, H, W, 3], RGB.
        fps: frames a second; the model's rotary positions depend on it.
        question: text for the user's turn, after the video.
        max_tokens: most vision tokens; frames are left out evenly until they fit, and fps falls with them. None: all.

    Returns:
        input_ids, attention_mask, mm_token_type_ids [1, S] int64, pixel_values_videos float32, video_grid_thw [1, 3]
        int64 and second_per_grid_ts [1] float32.

    Raises:
        QuestionError: the tokenizer cannot spell the question.
        TypeError, ValueError: frames, fps or max_tokens are not as above.
    """
    _check(frames, fps)
    check_spelling(processor.tokenizer, question)
    if max_tokens is not None:
        frames, fps = _thin(processor, frames, fps, max_tokens)
    content = [{"type": "video"}, {"type": "text", "text": question}]
    talk: Any = [{"role": "user", "content": content}]
    text = processor.apply_chat_template(talk, add_generation_prompt=True)
    metadata = {"total_num_frames": len(frames), "fps": fps, "frames_indices": list(range(len(frames)))}
    batch = processor(
        text=[text],
        videos=[frames.permute(0, 3, 1, 2)],
        video_metadata=[metadata],
        do_sample_frames=False,
        return_tensors="pt",
    )
    return {name: torch.as_tensor(value) for name, value in batch.items() if name != "video_metadata"}


def _check(frames: Tensor, fps: float) -> None:
    if not isinstance(frames, Tensor) or frames.dtype != torch.uint8:
        kind = frames.dtype if isinstance(frames, Tensor) else type(frames).__name__
        raise TypeError(f"frames is {kind}, wanted a uint8 tensor [T, H, W, 3]; convert it with torch.as_tensor(...)")
    if frames.ndim != 4 or frames.shape[3] != 3 or not len(frames):
        raise ValueError(f"frames has shape {tuple(frames.shape)}, wanted [T, H, W, 3], T >= 1; permute the axes")
    if not fps > 0:
        raise ValueError(f"fps is {fps}, wanted frames a second, more than 0; movies.read returns it")


def tokens_per_patch(processor: Qwen2_5_VLProcessor, height: int, width: int) -> int:
    """Vision tokens of one temporal patch of a video of this size in pixels, after the processor's resizing."""
    from transformers.models.qwen2_vl.video_processing_qwen2_vl import smart_resize

    reader = cast(Any, processor).video_processor
    unit = reader.patch_size * reader.merge_size
    size = {"min_pixels": reader.size["shortest_edge"], "max_pixels": reader.size["longest_edge"]}
    tall, wide = smart_resize(height, width, factor=unit, **size)
    return int(tall // unit * (wide // unit))


def _thin(processor: Qwen2_5_VLProcessor, frames: Tensor, fps: float, max_tokens: int) -> tuple[Tensor, float]:
    """The frames, evenly thinned to at most max_tokens vision tokens, and their frames a second."""
    each = tokens_per_patch(processor, frames.shape[1], frames.shape[2])
    room = max_tokens // each
    if room < 1:
        raise ValueError(f"max_tokens is {max_tokens}, wanted at least the {each} of one temporal patch; raise it")
    most = room * cast(Any, processor).video_processor.temporal_patch_size
    if len(frames) <= most:
        return frames, fps
    kept = torch.arange(most) * len(frames) // most
    return frames[kept], fps * most / len(frames)
