"""The trained model: it loads by the public door and answers; what cannot be loaded or spelled is named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from vecattention.testbed import (
    ModelError,
    QuestionError,
    answer,
    load,
    model,
    movies,
    prepare,
    question_for,
    score,
    words,
)


def test_the_weights_that_ship_are_small_and_recorded() -> None:
    weights = model.DATA / "model" / "model.safetensors"
    assert weights.stat().st_size <= 6_000_000
    record = json.loads((model.DATA / "training.json").read_text())
    assert {"settings", "device", "seconds", "steps", "versions", "rendered", "filmed"} <= set(record)
    assert next(s for s in record["filmed"] if s["tokens"] == 4096)["accuracy"] >= 0.95


def test_plain_from_pretrained_loads_the_real_classes() -> None:
    from transformers import AutoProcessor, Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLProcessor

    network = Qwen2_5_VLForConditionalGeneration.from_pretrained(model.DATA / "model")
    assert isinstance(AutoProcessor.from_pretrained(model.DATA / "model"), Qwen2_5_VLProcessor)
    heads = network.config.text_config
    assert heads.num_attention_heads > heads.num_key_value_heads
    assert heads.hidden_size // heads.num_attention_heads == 64


@pytest.mark.parametrize("tokens", [256, 1024])
def test_it_answers_questions_about_fresh_films(trained: tuple[Any, Any], tokens: int, tmp_path: Path) -> None:
    result = score.filmed(*trained, tokens=tokens, films=2, seed=tokens * 31, folder=str(tmp_path))
    assert result.asked == 8 and result.right >= 7
    assert not list(tmp_path.iterdir())


def test_one_question_and_generate_stops_by_itself(trained: tuple[Any, Any]) -> None:
    network, processor = trained
    movie = movies.make(seed=11, tokens=128, depth=0.3)
    inputs = prepare(processor, movies.render(movie), movie.fps, question_for(movie.asked.shape))
    assert inputs["input_ids"].eq(words.IDS["<|video_pad|>"]).sum() == movie.tokens == 128
    assert answer(network, processor, inputs, max_new_tokens=8) == movie.asked.colour
    out = network.generate(**inputs, max_new_tokens=8, do_sample=False)
    assert out.shape[1] == inputs["input_ids"].shape[1] + 2, "the answer and the end of the turn"


@pytest.mark.parametrize("fps", [0.5, 1.0, 24.0])
def test_other_frame_rates_do_as_well(trained: tuple[Any, Any], fps: float) -> None:
    network, processor = trained
    movie = movies.make(seed=12, tokens=256, fps=fps)
    inputs = prepare(processor, movies.render(movie), fps, question_for(movie.asked.shape))
    assert answer(network, processor, inputs) == movie.asked.colour


def test_at_most_so_many_tokens(trained: tuple[Any, Any]) -> None:
    _, processor = trained
    frames = movies.render(movies.make(seed=0, tokens=128))
    inputs = prepare(processor, frames, 2.0, question_for("star"), max_tokens=32)
    assert inputs["video_grid_thw"].tolist() == [[32, 2, 2]]
    assert inputs["second_per_grid_ts"].item() == pytest.approx(4.0)
    whole = prepare(processor, frames, 2.0, question_for("star"), max_tokens=500)
    assert whole["video_grid_thw"].tolist() == [[128, 2, 2]]
    with pytest.raises(ValueError, match="max_tokens is 0, wanted at least the 1 of one temporal patch"):
        prepare(processor, frames, 2.0, question_for("star"), max_tokens=0)


def test_frames_that_cannot_be_prepared(trained: tuple[Any, Any]) -> None:
    _, processor = trained
    frames = torch.zeros(4, 56, 56, 3, dtype=torch.uint8)
    with pytest.raises(TypeError, match="frames is torch.float32, wanted a uint8 tensor"):
        prepare(processor, frames.float(), 2.0, question_for("star"))
    with pytest.raises(ValueError, match=r"frames has shape \(4, 56, 56\)"):
        prepare(processor, frames[..., 0], 2.0, question_for("star"))
    with pytest.raises(ValueError, match="fps is 0, wanted"):
        prepare(processor, frames, 0, question_for("star"))


@pytest.mark.parametrize(
    "question, message",
    [
        ("which zebra wore the star and zebra ?", "cannot spell: 'zebra', 'wore', 'and'; wanted words it knows"),
        ("  ", "question is empty"),
        ("which colour was the <|video_pad|> ?", "holds the special token '<|video_pad|>'"),
    ],
)
def test_a_question_that_cannot_be_asked(trained: tuple[Any, Any], question: str, message: str) -> None:
    frames = torch.zeros(4, 56, 56, 3, dtype=torch.uint8)
    with pytest.raises(QuestionError) as caught:
        prepare(trained[1], frames, 2.0, question)
    assert message in str(caught.value)


def test_a_question_that_is_no_text(trained: tuple[Any, Any]) -> None:
    with pytest.raises(TypeError, match="question is int, wanted text"):
        prepare(trained[1], torch.zeros(4, 56, 56, 3, dtype=torch.uint8), 2.0, 5)  # type: ignore[arg-type]


def test_a_shape_that_nobody_draws() -> None:
    with pytest.raises(ValueError, match="shape is 'cube', wanted one of circle, square"):
        question_for("cube")


def test_the_tokenizer_spells_what_it_reads() -> None:
    tokenizer = words.tokenizer()
    for shape in words.SHAPES:
        ids = tokenizer(question_for(shape))["input_ids"]
        assert tokenizer.unk_token_id not in ids
        assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == question_for(shape)
    assert tokenizer("Which COLOUR was the star?")["input_ids"] == tokenizer(question_for("star"))["input_ids"]
    assert [tokenizer.convert_tokens_to_ids(word) for word in words.VOCABULARY] == list(range(len(words.VOCABULARY)))


def test_directories_that_hold_no_model(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="wanted a checkpoint directory; there is none"):
        load(tmp_path / "none")
    with pytest.raises(ModelError, match="has no config.json"):
        load(tmp_path)
    model.save(model.build(), tmp_path)
    assert not [path.name for path in tmp_path.iterdir() if path.name.startswith(".")]
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"has no weights \(\*.safetensors\), wanted a trained model"):
        load(tmp_path)
    save_file({"model.norm.weight": torch.ones(256)}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"lacks \d+ weights \(.*wanted all of them"):
        load(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(ModelError, match="wanted a Qwen2.5-VL checkpoint that transformers can load; it says"):
        load(tmp_path)
