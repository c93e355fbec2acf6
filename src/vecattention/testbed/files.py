"""MP4 files of uint8 frames, through PyAV: written whole or not at all, read whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterable
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vecattention.atomic import replacing
from vecattention.testbed.errors import VideoError

if TYPE_CHECKING:
    from av.container import InputContainer, OutputContainer

CRF = "18"
"""Constant rate factor of the H.264 files: lower is finer."""

MEMORY = 4 * 2**30
"""Most bytes of frames that `read` holds."""


def write_frames(pieces: Iterable[Tensor], path: str | os.PathLike[str], fps: float) -> None:
    """Write RGB frames to an H.264 MP4 file.

    Args:
        pieces: uint8 [n, H, W, 3] tensors, H and W even and the same in all, at least one frame in all.
        path: the file; an older one is replaced when the new one is complete.
        fps: frames a second.

    Raises:
        TypeError: a piece that is no uint8 tensor.
        ValueError: a shape that cannot be written, or no frame.
    """
    import av

    if not fps > 0:
        raise ValueError(f"fps is {fps}, wanted frames a second, more than 0; 2 is what Qwen2.5-VL samples")
    with replacing(path) as name:
        with av.open(name, "w", format="mp4") as container:
            count = _encode(container, pieces, Fraction(fps).limit_denominator(1000))
        if not count:
            raise ValueError("frames has none, wanted at least one frame; pass uint8 [T, H, W, 3]")


def _encode(container: OutputContainer, pieces: Iterable[Tensor], rate: Fraction) -> int:
    import av

    stream: Any = None
    count = 0
    for piece in pieces:
        _check_piece(piece)
        if stream is None:
            options = {"crf": CRF, "preset": "veryfast", "x264-params": "keyint=64:threads=1:log-level=error"}
            stream = container.add_stream("libx264", rate=rate, options=options)
            stream.height, stream.width, stream.pix_fmt = piece.shape[1], piece.shape[2], "yuv420p"
        elif tuple(piece.shape[1:3]) != (stream.height, stream.width):
            raise ValueError(
                f"frames are {tuple(piece.shape[1:3])}, wanted {(stream.height, stream.width)} like the first; "
                "resize them"
            )
        for image in piece.cpu().numpy():
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            frame.pts, frame.time_base = count, 1 / rate
            container.mux(stream.encode(frame))
            count += 1
    if stream is not None:
        container.mux(stream.encode(None))
    return count


def _check_piece(piece: Tensor) -> None:
    if not isinstance(piece, Tensor) or piece.dtype != torch.uint8:
        kind = piece.dtype if isinstance(piece, Tensor) else type(piece).__name__
        raise TypeError(f"frames is {kind}, wanted a uint8 tensor [T, H, W, 3]; convert it with torch.as_tensor(...)")
    if piece.ndim != 4 or piece.shape[3] != 3 or piece.shape[1] % 2 or piece.shape[2] % 2:
        raise ValueError(
            f"frames has shape {tuple(piece.shape)}, wanted [T, H, W, 3] with H and W even; crop or pad them"
        )


def read(
    path: str | os.PathLike[str], max_frames: int | None = None, sample: float | None = None
) -> tuple[Tensor, float]:
    """Frames uint8 [T, H, W, 3] (RGB) of the first video stream of a file, and the frames a second among them.

    Args:
        path: a video file that FFmpeg can decode.
        max_frames: stop after this many frames of the file; None: all.
        sample: keep at most this many frames a second, evenly; None: all. 2 is what Qwen2.5-VL samples.

    Raises:
        FileNotFoundError: no such file.
        VideoError: the file is empty, is no video, ends before its last frame, or its frames take too much memory.
    """
    import av

    name = os.fspath(path)
    if max_frames is not None and max_frames < 1:
        raise ValueError(f"max_frames is {max_frames}, wanted at least 1; pass None for all frames")
    if sample is not None and not sample > 0:
        raise ValueError(f"sample is {sample}, wanted frames a second, more than 0; pass None for all frames")
    if not Path(name).is_file():
        raise FileNotFoundError(f"path is {name!r}, wanted a video file; there is no such file")
    if not Path(name).stat().st_size:
        raise VideoError(f"path {name!r} is an empty file, wanted a video; write it again")
    try:
        with av.open(name, "r") as container:
            return _decode(container, name, max_frames, sample)
    except av.FFmpegError as error:
        raise VideoError(
            f"path {name!r} cannot be decoded ({error.strerror}), wanted a whole video file; it is no video "
            "or it is cut off"
        ) from error


def _decode(container: InputContainer, name: str, max_frames: int | None, sample: float | None) -> tuple[Tensor, float]:
    from av.video.reformatter import VideoReformatter

    if not container.streams.video:
        raise VideoError(f"path {name!r} has no video stream, wanted a video; it holds none or it is cut off")
    stream = container.streams.video[0]
    stream.thread_type = "SLICE"
    stream.codec_context.options = {"err_detect": "explode"}
    promised, broken, seen = stream.frames, 0, 0
    rate = float(stream.average_rate or stream.base_rate or 1)
    share = min(1.0, sample / rate) if sample is not None else 1.0
    frames: list[Tensor] = []
    to_rgb = VideoReformatter()
    for frame in container.decode(stream):
        broken += bool(frame.is_corrupt)
        if int(seen * share) == len(frames):
            frames.append(torch.from_numpy(to_rgb.reformat(frame, format="rgb24").to_ndarray()))
            _check_memory(name, frames)
        seen += 1
        if seen == max_frames:
            break
    wanted = promised if max_frames is None else min(promised, max_frames)
    if not frames or broken or seen < wanted:
        raise VideoError(
            f"path {name!r} has {seen - broken} whole frames, wanted {wanted or 'at least one'}; it is cut off or "
            "damaged: write or fetch it again"
        )
    return torch.stack(frames), rate * share


def _check_memory(name: str, frames: list[Tensor]) -> None:
    size = len(frames) * frames[0].numel()
    if size > MEMORY:
        raise VideoError(
            f"path {name!r} has {len(frames)} frames of {frames[0].shape[1]} x {frames[0].shape[0]} and more, wanted "
            f"at most {MEMORY / 2**30:.0f} GiB of them; cut it or scale it down, or sample fewer frames a second"
        )
