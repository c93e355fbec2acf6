"""The testbed's model: the real Qwen2.5-VL classes with small numbers; building, saving and loading.

`load()` gives the trained model that ships with the package, `load(path)` any Qwen2.5-VL checkpoint directory.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from vecattention.testbed import words
from vecattention.testbed.errors import ModelError

if TYPE_CHECKING:
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLProcessor

PIXELS = 28
"""Height and width at which the model sees a frame, pixels: one token for each two frames."""

DATA = Path(__file__).parent / "data"
"""Where the trained model ships: `DATA / "model"` is a checkpoint directory, `DATA / "training.json"` its record."""


def config() -> Qwen2_5_VLConfig:
    """The configuration: 3 layers of width 256, 4 query heads of 64 on 2 key heads, a vision tower of one block."""
    from transformers import Qwen2_5_VLConfig

    text = {
        "vocab_size": len(words.VOCABULARY),
        "hidden_size": 256,
        "intermediate_size": 128,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 40960,
        "rms_norm_eps": 1e-6,
        "initializer_range": 0.04,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [8, 12, 12]},
        "bos_token_id": None,
        "eos_token_id": words.IDS["<|im_end|>"],
        "pad_token_id": words.IDS["<|endoftext|>"],
        "tie_word_embeddings": True,
    }
    vision = {
        "depth": 1,
        "hidden_size": 96,
        "intermediate_size": 192,
        "num_heads": 3,
        "out_hidden_size": 256,
        "window_size": 112,
        "fullatt_block_indexes": [0],
        "tokens_per_second": 2,
        "initializer_range": 0.04,
    }
    return Qwen2_5_VLConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=words.IDS["<|image_pad|>"],
        video_token_id=words.IDS["<|video_pad|>"],
        vision_start_token_id=words.IDS["<|vision_start|>"],
        vision_end_token_id=words.IDS["<|vision_end|>"],
        tie_word_embeddings=True,
    )


def build(seed: int = 0) -> Qwen2_5_VLForConditionalGeneration:
    """A model with fresh float32 weights drawn from `seed`; the caller's random state is left as it was."""
    from transformers import Qwen2_5_VLForConditionalGeneration

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: Qwen2_5_VLForConditionalGeneration = Qwen2_5_VLForConditionalGeneration(config())
    torch.nn.Module.float(model)
    return model


def processor() -> Qwen2_5_VLProcessor:
    """The processor: the real image and video processors at 28 x 28 pixels, the tokenizer of `words`, its template."""
    from transformers import Qwen2_5_VLProcessor, Qwen2VLImageProcessor
    from transformers.models.qwen2_vl.video_processing_qwen2_vl import Qwen2VLVideoProcessor

    size = {"shortest_edge": PIXELS * PIXELS, "longest_edge": PIXELS * PIXELS}
    return Qwen2_5_VLProcessor(
        image_processor=Qwen2VLImageProcessor(size=dict(size)),
        video_processor=Qwen2VLVideoProcessor(size=dict(size), cap_pixels_per_frame=False),
        tokenizer=words.tokenizer(),
        chat_template=words.CHAT_TEMPLATE,
    )


def save(model: Qwen2_5_VLForConditionalGeneration, directory: str | os.PathLike[str]) -> None:
    """Write the model (safetensors) and the processor's files to a directory, each file whole or not at all."""
    target = Path(directory)
    target.mkdir(parents=True, exist_ok=True)
    with _quiet(), tempfile.TemporaryDirectory(prefix=".saving.", dir=target) as name:
        model.save_pretrained(name)
        processor().save_pretrained(name)
        for file in sorted(Path(name).iterdir()):
            os.replace(file, target / file.name)


def load(
    path: str | os.PathLike[str] | None = None, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu"
) -> tuple[Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLProcessor]:
    """A Qwen2.5-VL model, in evaluation mode, and its processor.

    Args:
        path: a checkpoint directory with safetensors weights; None: the model that ships with the package.
        dtype: of the weights.
        device: where the model goes.

    Raises:
        ModelError: no such directory, or one without a configuration, weights or a processor.
    """
    from safetensors import SafetensorError
    from transformers import AutoProcessor, Qwen2_5_VLForConditionalGeneration

    directory = DATA / "model" if path is None else Path(path)
    _check_directory(directory)
    try:
        with _quiet():
            loaded: Any = Qwen2_5_VLForConditionalGeneration.from_pretrained(
                directory, dtype=dtype, use_safetensors=True, local_files_only=True, output_loading_info=True
            )
            reader = AutoProcessor.from_pretrained(directory, local_files_only=True)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise ModelError(
            f"path is {str(directory)!r}, wanted a Qwen2.5-VL checkpoint that transformers can load; it says: {error}"
        ) from error
    model: Qwen2_5_VLForConditionalGeneration = loaded[0]
    missing = loaded[1]["missing_keys"]
    if missing:
        raise ModelError(
            f"path {str(directory)!r} lacks {len(missing)} weights ({min(missing)}, ...), wanted all of them; "
            "copy the whole checkpoint there"
        )
    model.eval()
    torch.nn.Module.to(model, torch.device(device))
    return model, reader


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' progress bars, which are as the caller had them afterwards."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _check_directory(directory: Path) -> None:
    if not directory.is_dir():
        raise ModelError(f"path is {str(directory)!r}, wanted a checkpoint directory; there is none")
    if not (directory / "config.json").is_file():
        raise ModelError(f"path {str(directory)!r} has no config.json, wanted a checkpoint directory; pass another")
    if not any(directory.glob("*.safetensors")):
        raise ModelError(
            f"path {str(directory)!r} has no weights (*.safetensors), wanted a trained model; "
            "copy its weights there or train one with python -m vecattention.testbed.train"
        )
