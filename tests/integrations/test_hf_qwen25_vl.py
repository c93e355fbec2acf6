"""The trained Qwen2.5-VL model, end to end: answers, caches, batches, the vision span, and what the statistics say."""

from __future__ import annotations

import logging
from typing import Any

import hf_tiny
import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

import vecattention
from vecattention.integrations.capture import capture
from vecattention.integrations.vision import VisionSpans, marks_of
from vecattention.testbed import answer, movies, prepare, question_for

CLOSE = {"rtol": 1e-4, "atol": 1e-4}  # float32; logits of about 10
Film = tuple[dict[str, Tensor], str]
Trained = tuple[Any, Any]


def logits(model: Any, inputs: dict[str, Tensor], **more: Any) -> Tensor:
    with torch.no_grad():
        out: Tensor = model(**inputs, **more).logits
    return out


def test_it_answers_as_with_full_attention(trained: Trained) -> None:
    for seed in range(3):
        movie = movies.make(seed=600 + seed, tokens=1024)
        inputs = prepare(trained[1], movies.render(movie), movie.fps, question_for(movie.asked.shape))
        with vecattention.apply(trained[0], threshold=0.9, vision_span="auto") as run:
            assert answer(*trained, inputs) == movie.asked.colour
        assert run.stats.mean_density < 0.4
        assert run.stats.sparse_calls == 3 and run.stats.decode_calls == 3 and run.stats.dense_calls == 0


def test_near_zero_equals_stock_and_dense_equals_it_bit_for_bit(trained: Trained, film: Film) -> None:
    stock = logits(trained[0], film[0])
    with vecattention.apply(trained[0], threshold=1e-30) as run:
        torch.testing.assert_close(logits(trained[0], film[0]), stock, **CLOSE)
    assert run.stats.mean_density == 1.0 and run.stats.sparse_calls == 3
    with vecattention.apply(trained[0], min_length=10**6):
        assert torch.equal(logits(trained[0], film[0]), stock)


def test_prefill_in_chunks_with_a_cache_and_the_vision_span(trained: Trained, film: Film) -> None:
    model, inputs = trained[0], film[0]
    with torch.no_grad():
        kept = {name: inputs[name] for name in ("mm_token_type_ids", "video_grid_thw", "second_per_grid_ts")}
        places = model.model.get_rope_index(inputs["input_ids"], attention_mask=inputs["attention_mask"], **kept)[0]
        seen = model.model.visual(inputs["pixel_values_videos"], grid_thw=inputs["video_grid_thw"]).pooler_output
    for span in (None, "auto"):
        with vecattention.apply(model, vision_span=span) as whole:
            wanted = logits(model, inputs)
        cache, parts = DynamicCache(), []
        with vecattention.apply(model, vision_span=span) as chunked:
            for ids, where in zip(inputs["input_ids"].split(256, 1), places.split(256, 2), strict=True):
                with _seen_as(model, seen):
                    parts.append(logits(model, {"input_ids": ids}, position_ids=where, past_key_values=cache))
                seen_here = int((ids == model.config.video_token_id).sum())
                seen = torch.cat((seen[seen_here:], seen[:seen_here]))
        torch.testing.assert_close(torch.cat(parts, 1), wanted, **CLOSE)
        assert chunked.stats.mean_density == pytest.approx(whole.stats.mean_density, rel=1e-4)


class _seen_as:
    """The embedding layer puts vision embeddings, in order, where the ids say so: what the model itself does."""

    def __init__(self, model: Any, seen: Tensor) -> None:
        self.model, self.seen = model, seen

    def __enter__(self) -> None:
        def put(layer: Any, args: Any, out: Tensor) -> Tensor:
            here = args[0] == self.model.config.video_token_id
            return out.masked_scatter(here[..., None], self.seen[: int(here.sum())])

        self.handle = self.model.get_input_embeddings().register_forward_hook(put)

    def __exit__(self, *error: object) -> None:
        self.handle.remove()


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("span", [None, "auto"])
def test_a_padded_batch_of_films(trained: Trained, side: str, span: str | None) -> None:
    model, processor = trained
    processor.tokenizer.padding_side = side
    one, two = (movies.make(seed=seed, tokens=tokens) for seed, tokens in ((1, 512), (2, 350)))
    alone = [prepare(processor, movies.render(m), m.fps, question_for(m.asked.shape)) for m in (one, two)]
    batch = _joined(alone, side)
    with vecattention.apply(model, vision_span=span) as single:
        wanted = [logits(model, inputs) for inputs in alone]
    with vecattention.apply(model, vision_span=span) as both:
        got = logits(model, batch)
    for row, mask, want in zip(got, batch["attention_mask"].bool(), wanted, strict=True):
        torch.testing.assert_close(row[mask], want[0], **CLOSE)
    assert both.stats.mean_density == pytest.approx(single.stats.mean_density, rel=1e-3)
    assert both.stats.mean_density < 0.5 and both.stats.reasons == {}


def _joined(alone: list[dict[str, Tensor]], side: str) -> dict[str, Tensor]:
    longest = max(inputs["input_ids"].shape[1] for inputs in alone)
    batch = {}
    for name in alone[0]:
        rows = [inputs[name] for inputs in alone]
        if rows[0].shape == alone[0]["input_ids"].shape:
            rows = [
                torch.nn.functional.pad(
                    row, (longest - row.shape[1], 0) if side == "left" else (0, longest - row.shape[1])
                )
                for row in rows
            ]
        batch[name] = torch.cat(rows)
    return batch


def test_rows_outside_the_vision_span_are_dense(trained: Trained, film: Film) -> None:
    """The published rule: vector-sparse over the prefix up to the end of the span, other rows overwritten by dense."""
    model, inputs = trained[0], film[0]
    marks = torch.tensor([model.config.vision_start_token_id, model.config.vision_end_token_id])
    start, end = torch.isin(inputs["input_ids"][0], marks).nonzero().flatten().tolist()
    with vecattention.apply(model, vision_span="auto"), capture(model, layers=[0]) as maps:
        logits(model, inputs)
    query, key, value = maps[0].query, maps[0].key, maps[0].value
    prefix = (query[:, :, : end + 1], key[:, :, : end + 1], value[:, :, : end + 1])
    wanted = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
    sparse = vecattention.vec_attention(*prefix, threshold=0.9, scale=maps[0].scaling)
    wanted[:, :, start : end + 1] = sparse[:, :, start:]  # type: ignore[index]
    for span in ("auto", (start, end + 1)):
        with _outputs(model, 0) as seen, vecattention.apply(model, vision_span=span):
            logits(model, inputs)
        projected = model.model.language_model.layers[0].self_attn.o_proj(wanted.transpose(1, 2).flatten(2))
        torch.testing.assert_close(seen[0], projected, **CLOSE)


class _outputs:
    """What a layer's self-attention gives."""

    def __init__(self, model: Any, layer: int) -> None:
        self.module = model.model.language_model.layers[layer].self_attn

    def __enter__(self) -> list[Tensor]:
        seen: list[Tensor] = []
        self.handle = self.module.register_forward_hook(lambda layer, args, out: seen.append(out[0]))
        return seen

    def __exit__(self, *error: object) -> None:
        self.handle.remove()


def test_the_span_is_found_in_positional_arguments(trained: Trained, film: Film) -> None:
    model, inputs = trained[0], dict(film[0])
    with vecattention.apply(model, vision_span="auto") as wanted:
        logits(model, inputs)
    ids = inputs.pop("input_ids")
    with torch.no_grad(), vecattention.apply(model, vision_span="auto") as run:
        model(ids, **inputs)
    assert torch.equal(run.stats.density, wanted.stats.density)


def test_the_span_of_a_prefill_in_chunks_grows() -> None:
    """Frames with words between them: in later chunks words before the last frame are inside of the span."""
    model, ids = hf_tiny.Kind(hf_tiny.qwen25_vl).make(), hf_tiny.text(300)["input_ids"].repeat(2, 1)
    for start, end in ((40, 60), (90, 100), (170, 180)):
        ids[0, start:end] = hf_tiny.MARKS["video_token_id"]
    ids[1, 200:210] = hf_tiny.MARKS["video_token_id"]
    vision, seen, cache = VisionSpans(marks_of(model.config)), [], DynamicCache()
    handles = vision.attach(model)
    handles.append(model.model.language_model.register_forward_pre_hook(lambda *given: seen.append(vision.spans())))
    for part, where in zip(ids.split(80, 1), torch.arange(300).expand(2, -1).split(80, 1), strict=True):
        logits(model, {"input_ids": part}, past_key_values=cache, position_ids=where)
    assert seen == [[(40, 60), None], [(0, 100), None], [(0, 180), (200, 210)], [None, None]]
    assert vision.spans() is None, "outside of a forward nothing is known"
    for handle in handles:
        handle.remove()


def test_a_text_model_called_alone_has_no_span(trained: Trained, film: Film) -> None:
    model = trained[0]
    embeds = torch.zeros(1, 200, 256)
    with torch.no_grad(), vecattention.apply(model, vision_span="auto") as run:
        logits(model, film[0])
        model.model.language_model(inputs_embeds=embeds)
    assert (run.stats.sparse_calls, run.stats.dense_calls) == (3, 3)
    assert list(run.stats.reasons) == [
        "vision_span is 'auto' and this forward had no input_ids; pass them, or (start, end)"
    ]


def test_the_span_needs_input_ids_and_marks(trained: Trained, film: Film, caplog: pytest.LogCaptureFixture) -> None:
    model = trained[0]
    words = {"input_ids": torch.full((1, 300), 25)}
    embeds = {"inputs_embeds": model.get_input_embeddings()(words["input_ids"]).detach()}
    stock, blind = logits(model, words), logits(model, embeds)
    with caplog.at_level(logging.WARNING), vecattention.apply(model, vision_span="auto") as run:
        assert torch.equal(logits(model, words), stock)
        assert torch.equal(logits(model, embeds), blind)
    assert run.stats.sparse_calls == 0 and run.stats.dense_calls == 6
    assert [record.message.partition(": ")[2] for record in caplog.records] == [
        "attention stays dense in Qwen2_5_VLAttention: vision_span is 'auto' and input_ids hold no vision tokens; "
        "pass None to make text sparse too",
        "attention stays dense in Qwen2_5_VLAttention: vision_span is 'auto' and this forward had no input_ids; "
        "pass them, or (start, end)",
    ]


def test_statistics_are_those_of_select(trained: Trained, film: Film) -> None:
    model, inputs = trained[0], film[0]
    choices = {"threshold": 0.8, "q_pooling_size": 32, "q_block_size": 64, "k_local_size": 32, "max_scope": "row"}
    with vecattention.apply(model, **choices) as run:
        logits(model, inputs)
    # One layer after another: each is given what it gets when those before it are sparse.
    with vecattention.apply(model, **choices), capture(model, layers=[0]) as maps:
        logits(model, inputs)
    entry = maps[0]
    selection = vecattention.select(entry.query, entry.key, scale=entry.scaling, **choices)
    assert torch.equal(run.stats.density[0], selection.density()[0])
    assert run.stats.layers[0].kept.tolist() == selection.kept_pairs()[0].tolist()
    assert run.stats.density.shape == (3, 4) and run.stats.calls == 3
    assert 0 < run.stats.seconds == sum(layer.seconds for layer in run.stats.layers.values())


def test_thresholds_per_head_and_tables(trained: Trained, film: Film) -> None:
    model, inputs = trained[0], film[0]
    rows = [[0.9, 0.5, 0.1, 1e-30], [1.0, 1e-30, 0.9, 0.9], [0.7, 0.7, 0.7, 0.7]]
    uniform = {}
    for value in (0.9, 0.5):
        with vecattention.apply(model, threshold=value) as run:
            logits(model, inputs)
        uniform[value] = run.stats.density[0]
    with vecattention.apply(model, threshold=torch.tensor(rows[0])) as by_head:
        logits(model, inputs)
    assert by_head.stats.density[0].tolist()[:2] == [uniform[0.9][0].item(), uniform[0.5][1].item()]
    assert by_head.stats.density[:, 3].tolist() == [1.0, 1.0, 1.0]
    table = vecattention.ThresholdTable(rows, model="testbed")
    with vecattention.apply(model, table=table) as tuned:
        logits(model, inputs)
    assert torch.equal(tuned.stats.density[0], by_head.stats.density[0])
    assert tuned.stats.density[1, 1] == 1.0 and (tuned.stats.density[1, [0, 2, 3]] < 1).all()
    by_element = torch.tensor(rows[:2])
    batch = {name: torch.cat((inputs[name], inputs[name])) for name in inputs}
    with vecattention.apply(model, threshold=by_element):
        got = logits(model, batch)
    for element, row in enumerate(rows[:2]):
        with vecattention.apply(model, threshold=torch.tensor(row)):
            torch.testing.assert_close(got[element], logits(model, inputs)[0], **CLOSE)


def test_the_table_brings_its_settings(trained: Trained, film: Film) -> None:
    table = vecattention.ThresholdTable.uniform(0.8, 3, 4, q_pooling_size=32, q_block_size=128, max_scope="row")
    with vecattention.apply(trained[0], table=table) as run:
        logits(trained[0], film[0])
    same = {"threshold": 0.8, "q_pooling_size": 32, "q_block_size": 128, "max_scope": "row"}
    with vecattention.apply(trained[0], **same) as other:
        logits(trained[0], film[0])
    assert torch.equal(run.stats.density, other.stats.density)


def test_loading_by_name_is_sparse_with_the_published_settings(trained: Trained, film: Film) -> None:
    from transformers import AutoModelForImageTextToText

    from vecattention.testbed.model import DATA

    model = AutoModelForImageTextToText.from_pretrained(
        DATA / "model", attn_implementation={"text_config": "vecattention"}
    ).eval()
    assert model.config.vision_config._attn_implementation == "sdpa"
    with vecattention.apply(trained[0], threshold=0.9):
        wanted = logits(trained[0], film[0])
    assert torch.equal(logits(model, film[0]), wanted)
    assert not torch.equal(wanted, logits(trained[0], film[0]))
    with vecattention.apply(model, threshold=1e-30) as run:
        torch.testing.assert_close(logits(model, film[0]), logits(trained[0], film[0]), **CLOSE)
    assert run.stats.sparse_calls == 3
    assert model.config.text_config._attn_implementation == "vecattention", "as it was loaded"
    assert torch.equal(logits(model, film[0]), wanted)


def test_half_precision(film: Film) -> None:
    from vecattention.testbed import load

    model, processor = load(dtype=torch.bfloat16)
    with vecattention.apply(model, vision_span="auto") as run:
        assert answer(model, processor, film[0]) == film[1]
    assert run.stats.mean_density < 0.4


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu(trained: Trained, film: Film) -> None:
    from vecattention.testbed import load

    model, processor = load(dtype=torch.bfloat16, device="cuda")
    inputs = {name: value.cuda() for name, value in film[0].items()}
    with vecattention.apply(trained[0], vision_span="auto") as here:
        logits(trained[0], film[0])
    with vecattention.apply(model, vision_span="auto") as run:
        assert answer(model, processor, inputs) == film[1]
    assert run.stats.sparse_calls == 3 and 0 < run.stats.seconds < 10
    assert run.stats.mean_density == pytest.approx(here.stats.mean_density, abs=0.05)
