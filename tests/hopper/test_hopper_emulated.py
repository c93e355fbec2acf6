"""The Hopper kernels' own source against the law, in an emulator (`gluon_emulator`): no GPU is needed."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gluon_emulator
import pytest
import torch
from torch import Tensor

pytest.importorskip("triton.experimental.gluon", reason="Triton, whose launches these are, is not installed")

import brute  # noqa: E402
from tolerance import Exact  # noqa: E402

from vecattention import bits, spec  # noqa: E402
from vecattention.backends import reference  # noqa: E402
from vecattention.backends.hopper import launch  # noqa: E402
from vecattention.bench import report, timer, tune  # noqa: E402
from vecattention.bench.cases import Case, Source  # noqa: E402
from vecattention.ops import rule_of  # noqa: E402

FOLDER = Path(launch.__file__).parent
PROGRAMS = 3


class Pool:
    """In place of `launch.pool_kernel`, which is plain Triton."""

    def __getitem__(self, grid: object) -> Any:
        def run(query: Tensor, pooled: Tensor, *given: Any, D: int, P: int, num_warps: int) -> None:
            pooled.copy_(reference.pooled_queries(query, P).reshape(pooled.shape))

        return run


DRAWN: list[Tensor] = []
"""The counters of work items, of each call."""


class Count:
    """In place of `launch.count_kernel`."""

    def __getitem__(self, grid: object) -> Any:
        def run(words: Tensor, counts: Tensor, width: int, blocks: int, lists: int, rows: int, q_len: int, k_len: int,
                CAUSAL: bool, PAIR: bool, SIZE: int) -> None:  # fmt: skip
            held = bits.unpack(words, k_len).flatten(0, 1)
            items = len(counts) // 2
            DRAWN.append(counts[items : items + 1])
            counts[items] = 0
            for at in range(items):
                head, block = divmod(at, blocks)
                mine = held[head, 2 * block : 2 * block + 2].any(0) if PAIR else held[head, block]
                keys = min((block + 1) * rows + k_len - q_len, k_len) if CAUSAL else k_len
                counts[at] = mine[:keys].sum()

        return run


STRETCHES: list[tuple[int, int]] = []
"""(items, items that share keys) of each call."""


class Order:
    """In place of `launch.order_kernel`."""

    def __getitem__(self, grid: object) -> Any:
        def run(counts: Tensor, items: int, size: int, SIZE: int, OTHERS: int) -> None:
            STRETCHES.append((items, size))
            longest = counts[:items].view(-1, size).flip(1).sort(dim=1, descending=True, stable=True).indices
            counts[items + 1 :] = (size - 1 - longest + torch.arange(0, items, size)[:, None]).flatten()

        return run


@pytest.fixture(autouse=True)
def emulated(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in ("select", "attend"):
        kernel = getattr(gluon_emulator.load(FOLDER / f"{name}.py"), f"{name}_kernel")
        monkeypatch.setattr(launch, f"{name}_kernel", gluon_emulator.Kernel(kernel))
    monkeypatch.setattr(launch, "pool_kernel", Pool())
    monkeypatch.setattr(launch, "count_kernel", Count())
    monkeypatch.setattr(launch, "order_kernel", Order())
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr("vecattention.machine.multiprocessors", lambda device: PROGRAMS)
    yield


def tensors(heads: int, kv_heads: int, q_len: int, k_len: int, dim: int = 64, seed: int = 0) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    sizes = ((heads, q_len), (kv_heads, k_len), (kv_heads, k_len))
    return tuple(torch.randn(1, h, s, dim, generator=generator).mul(1.5).to(torch.float16) for h, s in sizes)


def law_of(query: Tensor, key: Tensor, alpha: Tensor, asked: spec.Rule) -> Tensor:
    """The words of the reference, from means that are rounded as here."""
    return reference.select(brute.rounded_means(query, asked.q_pooling_size), key, alpha, asked)


SHAPES = {"prefix": (2, 1, 300, 557), "square": (2, 2, 640, 640), "one row": (1, 1, 1, 200), "short": (1, 1, 40, 40)}
RULES: dict[str, dict[str, Any]] = {
    "P32 R128": {"q_pooling_size": 32, "q_block_size": 128},
    "P64 R128 row": {"q_pooling_size": 64, "q_block_size": 128, "max_scope": "row"},
    "P128 B64 G8": {"q_pooling_size": 128, "k_local_size": 64, "group_k_block": 8},
    "P64 R64": {"q_pooling_size": 64, "q_block_size": 64},
    "P16 R128 G8": {"q_pooling_size": 16, "q_block_size": 128, "group_k_block": 8},
}


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_selection_is_the_laws(shape: str, rule: str, causal: bool) -> None:
    query, key, _ = tensors(*SHAPES[shape])
    asked = rule_of(64, causal=causal, **RULES[rule])
    alpha = torch.tensor([[0.1, 0.6]])[:, : query.shape[1]].contiguous()
    found = launch.select(query, key, alpha, asked, launch.SelectShape(span=256, stages=2))
    differ = int(bits.popcount(found ^ law_of(query, key, alpha, asked)).sum())
    assert differ <= 1, "but for a key whose score meets the cut-off within rounding"


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
@pytest.mark.parametrize("rule", ["P16 R128 G8", "P16 R128 row", "P32 R128"])
@pytest.mark.parametrize("k_len", [4700, 4692])
def test_the_selection_over_several_tiles_of_rows(k_len: int, rule: str, causal: bool) -> None:
    """More than 128 pooled rows; both consumers have rows of their own, and in causal mode ends of their own.

    Rows' own keys begin within stretches of 16 keys, or, 192 after the first key, with them.
    """
    query, key, _ = tensors(1, 1, 4500, k_len)
    more = {"P16 R128 row": {"q_pooling_size": 16, "q_block_size": 128, "max_scope": "row"}}
    asked = rule_of(64, causal=causal, **(RULES | more)[rule])
    alpha = torch.tensor([[0.3]])
    law = law_of(query, key, alpha, asked)
    assert float(spec.Selection(law, 4500, k_len, 128, causal).density().mean()) < 0.7
    for span in (512, 4096):
        found = launch.select(query, key, alpha, asked, launch.SelectShape(span=span))
        assert int(bits.popcount(found ^ law).sum()) <= 2, "but for keys whose score meets the cut-off within rounding"


@pytest.mark.parametrize("density", [0.0, 0.03, 0.4, 1.0])
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
@pytest.mark.parametrize("block", [64, 128])
@pytest.mark.parametrize("shape", ["prefix", "square"])
def test_the_attention_is_exact(shape: str, block: int, causal: bool, density: float) -> None:
    query, key, value = tensors(*SHAPES[shape])
    generator = torch.Generator().manual_seed(1)
    blocks = -(-query.shape[2] // block)
    kept = torch.rand(1, query.shape[1], blocks, key.shape[2], generator=generator) < density
    selection = spec.Selection(bits.pack(kept), query.shape[2], key.shape[2], block, causal)
    out = torch.full_like(query, torch.nan)
    lse = torch.full(query.shape[:3], torch.nan)
    launch.attend(query, key, value, selection, 0.125, out, lse, launch.AttendShape(step=64, stages=2))
    Exact.of(query, key, value, selection.mask(), 0.125).check(out, lse)


@pytest.mark.parametrize("block", [64, 128])
def test_more_work_items_than_the_queue_has_slots(block: int) -> None:
    query, key, value = tensors(5, 5, 1100, 1100)
    assert 5 * -(-1100 // 128) > 2 * launch.QUEUE
    generator = torch.Generator().manual_seed(1)
    kept = torch.rand(1, 5, -(-1100 // block), 1100, generator=generator) < 0.05
    kept[:, 2] = False  # items that are over at once
    selection = spec.Selection(bits.pack(kept), 1100, 1100, block, True)
    out, lse = torch.full_like(query, torch.nan), torch.full(query.shape[:3], torch.nan)
    launch.attend(query, key, value, selection, 0.125, out, lse, launch.AttendShape(step=64, stages=3, programs=1))
    Exact.of(query, key, value, selection.mask(), 0.125).check(out, lse)
    assert int(DRAWN[-1]) == 5 * -(-1100 // 128), "each item but the first is drawn once, and one that is none"


def test_a_ring_that_wraps_around(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "WORDS", 4)
    monkeypatch.setattr(launch, "RING", 512)
    query, key, value = tensors(2, 1, 200, 1500)
    kept = torch.rand(1, 2, 2, 1500, generator=torch.Generator().manual_seed(1)) < 0.8
    selection = spec.Selection(bits.pack(kept), 200, 1500, 128, False)
    out, lse = torch.full_like(query, torch.nan), torch.full(query.shape[:3], torch.nan)
    launch.attend(query, key, value, selection, 0.125, out, lse, launch.AttendShape(step=64, stages=2, programs=1))
    Exact.of(query, key, value, selection.mask(), 0.125).check(out, lse)


def test_the_queue_and_the_ring_are_long_enough() -> None:
    most = max(stages for stages in range(2, 100) if _allowed(stages))
    assert launch.QUEUE > most, "the loader is at most as many items ahead as there are tiles in flight"
    assert launch.RING >= 32 * launch.WORDS + 3 * 128, "one decoding, and the tiles that it runs ahead of"


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
def test_what_bench_tune_tries_is_right_and_is_seen_to_be(causal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    timed = 0

    def compare(*given: object, **more: object) -> tuple[timer.Timing, float]:
        nonlocal timed
        timed += 1
        return timer.Timing(1, 1, 1, 1), 1

    monkeypatch.setattr(tune, "compare", compare)
    source = Source(Case("small", 2, 1, 400, 1800, causal, 64), "cpu", torch.bfloat16, seed=1)
    for kernel in tune.kernels("hopper", causal, 64):
        fields = {"stages": 2} if kernel.selects else {"step": 64, "stages": 2}
        assert "failed" not in tune.trial(source, kernel, fields), kernel.name
    assert timed == 3

    def other_keys(*given: Any) -> Tensor:
        return select(*given) ^ 1

    select = launch.select
    monkeypatch.setattr(launch, "select", other_keys)
    assert tune.trial(source, kernel, {})["failed"] == report.WRONG


def _allowed(stages: int) -> bool:
    try:
        launch.AttendShape(stages=stages)
    except ValueError:
        return False
    return True


@pytest.mark.parametrize("seen, heads, unit", [((8192, 16384), 28, 256), ((300,), 1, 128), ((4096,) * 3, 5, 1024)])
def test_the_spans_of_programs_are_the_best_of_all(seen: tuple[int, ...], heads: int, unit: int) -> None:
    def longest(span: int) -> float:
        programs = heads * sum(-(-keys // span) for keys in seen)
        return -(-programs // 132) * (span / 128 + launch.START)

    found = launch.balanced(seen, heads, unit, 132)
    assert found % unit == 0 and longest(found) == min(longest(n * unit) for n in range(1, launch.SPAN // unit + 1))


def test_a_window_longer_than_the_longest_span_is_a_span() -> None:
    assert launch.balanced((2**20,), 1, 2 * launch.SPAN, 132) == 2 * launch.SPAN


@pytest.fixture
def dirty(monkeypatch: pytest.MonkeyPatch) -> None:
    """What `torch.empty` gives has every bit set, where it is words."""
    real = torch.empty

    def made(*shape: Any, **options: Any) -> Tensor:
        found = real(*shape, **options)
        return found.fill_(-1) if found.dtype == torch.int32 else found

    monkeypatch.setattr(torch, "empty", made)


@pytest.mark.usefixtures("dirty")
def test_every_word_of_a_selection_is_written() -> None:
    for scope in ("window", "row"):
        for causal, pool, block in ((False, 32, 128), (True, 16, 16), (True, 16, 128)):
            query, key, _ = tensors(2, 1, 2500 if pool == 16 else 700, 2600 if pool == 16 else 901)
            asked = rule_of(64, causal=causal, q_pooling_size=pool, q_block_size=block, max_scope=scope)
            alpha = torch.tensor([[0.1, 0.6]])
            found = launch.select(query, key, alpha, asked, launch.SelectShape(span=768 if pool == 16 else 256))
            assert int(bits.popcount(found ^ law_of(query, key, alpha, asked)).sum()) <= 1


@pytest.mark.parametrize("stages", [2, 3])
def test_other_launch_shapes_give_the_same(stages: int) -> None:
    query, key, value = tensors(*SHAPES["prefix"], dim=128)
    asked = rule_of(128, causal=True, **RULES["P32 R128"])
    alpha = torch.tensor([[0.3, 3.0]])
    words = [
        launch.select(query, key, alpha, asked, launch.SelectShape(span=span, stages=stages)) for span in (256, 1024)
    ]
    assert torch.equal(*words)
    selection = spec.Selection(words[0], 300, 557, 128, True)
    out, lse = torch.full_like(query, torch.nan), torch.full(query.shape[:3], torch.nan)
    launch.attend(query, key, value, selection, 0.09, out, lse, launch.AttendShape(stages=stages))
    Exact.of(query, key, value, selection.mask(), 0.09).check(out, lse)


def test_strides_of_any_kind() -> None:
    query, key, value = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in tensors(*SHAPES["prefix"]))
    asked = rule_of(64, causal=True, q_pooling_size=32, q_block_size=128)
    alpha = torch.full((1, 2), 0.6931472)
    words = law_of(query, key, alpha, asked)
    law = spec.Selection(words, query.shape[2], key.shape[2], 128, True)
    found = launch.select(query, key, alpha, asked)
    assert int(bits.popcount(found ^ words).sum()) <= 1
    out, lse = torch.full_like(query, torch.nan), torch.full(query.shape[:3], torch.nan)
    launch.attend(query, key, value, law, 0.125, out, lse)
    Exact.of(query, key, value, law.mask(), 0.125).check(out, lse)


@pytest.mark.parametrize("scope", ["window", "row"])
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
@pytest.mark.parametrize("shape", ["prefix", "square"])
def test_scores_that_are_no_numbers_are_never_kept(shape: str, scope: str, causal: bool) -> None:
    query, key, _ = tensors(*SHAPES[shape])
    key[0, 0, 70], key[0, 0, 200], query[0, 0, 40] = torch.nan, torch.inf, torch.nan  # an infinite key scores NaN
    key[0, 0, 300, 5] = -torch.inf  # scores inf or -inf
    asked = rule_of(64, causal=causal, q_pooling_size=32, q_block_size=128, max_scope=scope)
    alpha = torch.tensor([[0.5, 2.0]])
    found = launch.select(query, key, alpha, asked, launch.SelectShape(span=256))
    assert int(bits.popcount(found ^ law_of(query, key, alpha, asked)).sum()) <= 1


def test_a_score_just_below_the_cut_off_is_not_kept() -> None:
    """Scores of 2 ** 22 + j, which float32 holds to a half, and alpha 0: only the largest is kept."""
    query, key = torch.zeros(1, 1, 300, 64, dtype=torch.float16), torch.zeros(1, 1, 500, 64, dtype=torch.float16)
    query[..., 0], query[..., 1], key[..., 0] = 2048, 1, 2048
    key[..., 1] = torch.arange(500) % 250
    for scope in ("window", "row"):
        asked = rule_of(64, causal=False, q_pooling_size=64, q_block_size=128, max_scope=scope)
        found = launch.select(query, key, torch.zeros(1, 1), asked, launch.SelectShape(span=256))
        assert torch.equal(found, law_of(query, key, torch.zeros(1, 1), asked))


def test_batches_of_heads_that_share_keys() -> None:
    query, key, value = (torch.cat([x, x.flip(2)]) for x in tensors(4, 2, 300, 557))
    asked = rule_of(64, causal=False, q_pooling_size=32, q_block_size=128)
    alpha = torch.tensor([[0.1, 0.6, 0.3, 1.0], [0.2, 0.4, 2.0, 0.05]])
    words = launch.select(query, key, alpha, asked, launch.SelectShape(span=256))
    assert int(bits.popcount(words ^ law_of(query, key, alpha, asked)).sum()) <= 2
    selection = spec.Selection(words, 300, 557, 128, False)
    out, lse = torch.full_like(query, torch.nan), torch.full(query.shape[:3], torch.nan)
    launch.attend(query, key, value, selection, 0.125, out, lse)
    Exact.of(query, key, value, selection.mask(), 0.125).check(out, lse)
    assert STRETCHES[-1] == (2 * 4 * 3, 2 * 3), "two heads of three lists each read the same keys"


@pytest.mark.parametrize("sign", [-1, 0, 1])
@pytest.mark.parametrize("scope", ["window", "row"])
def test_equal_scores_are_kept_together_at_a_threshold_of_one(scope: str, sign: int) -> None:
    """All scores are the same number, below, at or above zero, and alpha is 0."""
    query = torch.ones(1, 1, 300, 64, dtype=torch.float16)
    key = torch.full((1, 1, 500, 64), 0.3 * sign, dtype=torch.float16)
    asked = rule_of(64, causal=False, q_pooling_size=64, q_block_size=128, max_scope=scope)
    found = launch.select(query, key, torch.zeros(1, 1), asked, launch.SelectShape(span=256))
    assert bool(spec.Selection(found, 300, 500, 128, False).mask().all())


MUTANTS = {
    "nothing": ("@gluon.jit\ndef _loader", "@gluon.jit\ndef _loader"),  # the control: it must be right
    "the second consumer takes the first one's rows": (
        "first_row = tile_row * 2 * HALF + HALF_INDEX * HALF",
        "first_row = tile_row * 2 * HALF",
    ),
    "keys are not waited for": ("    mbarrier.wait(k_full.index(tile % STAGES), tile // STAGES & 1, pred=more)\n", ""),
    "a buffer is given back too early": (
        "    scores = warpgroup_mma_wait(0, deps=(ahead,))\n"
        "    mbarrier.arrive(k_empty.index((tile + 1) % STAGES), pred=first + N < end)\n",
        "    mbarrier.arrive(k_empty.index((tile + 1) % STAGES), pred=first + N < end)\n"
        "    scores = warpgroup_mma_wait(0, deps=(ahead,))\n",
    ),
    "a buffer is never given back": ("        mbarrier.arrive(k_empty.index(0))\n", ""),
    "a phase is taken for the other": ("(tile // STAGES & 1) ^ 1)", "(tile // STAGES & 1))"),
    "rows past the end are written": ("mask=(block < blocks)[:, None] & (at < width)[None, :]", "mask=None"),
    "the rows' own keys are left out": (
        "words = gl.where((start <= 0) & (start > -(SHARE * P)), -1, 0)",
        "words = gl.where((start <= 0) & (start > 0), -1, 0)",
    ),
    "keys that are no candidates enter a maximum": ('tops = gl.where(holding, tops, float("-inf"))', "tops = tops"),
    "keys that are no candidates meet the cut-off": ('limit = gl.where(holding, limit, float("inf"))', "limit = limit"),
    "tiles are let go by without a word": ("range(tiles, all_tiles)", "range(tiles, tiles)"),
    "empty words begin a tile early": ("lo + tiles * N, stop, HALF", "lo + (tiles - 1) * N, stop, HALF"),
    "empty words are left out": ("    if CLEAR:", "    if False:"),
    "a program whose rows see nothing leaves its words": ("    elif not MAXIMA:", "    elif MAXIMA:"),
}


@pytest.mark.usefixtures("dirty")
@pytest.mark.parametrize("name", MUTANTS)
def test_the_emulator_sees_what_a_kernel_does_wrong(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before, after = MUTANTS[name]
    source = (FOLDER / "select.py").read_text()
    assert source.count(before) == 1, "the kernel has changed; so must this test"
    (tmp_path / "mutant.py").write_text(source.replace(before, after))
    kernel = gluon_emulator.load(tmp_path / "mutant.py").select_kernel
    monkeypatch.setattr(launch, "select_kernel", gluon_emulator.Kernel(kernel))
    monkeypatch.setattr(gluon_emulator, "PATIENCE", 60.0 if name == "nothing" else 5.0)
    monkeypatch.setattr(gluon_emulator, "SLOW", 0.01 if "given back" in name else 0.002)
    query, key, _ = tensors(1, 1, 4500, 4500)
    asked = rule_of(64, causal=True, q_pooling_size=32, q_block_size=128)
    alpha = torch.tensor([[0.3]])
    law = law_of(query, key, alpha, asked)
    try:
        found = launch.select(query, key, alpha, asked, launch.SelectShape(span=4096, stages=2))
    except (RuntimeError, IndexError):
        assert name != "nothing"
        return
    differ = int(bits.popcount(found ^ law).sum())
    assert differ <= 2 if name == "nothing" else differ > 2


ATTEND_MUTANTS: dict[str, tuple[str, ...]] = {
    "nothing": ("@gluon.jit\ndef _loader", "@gluon.jit\ndef _loader"),  # the control: it must be right
    "values are not waited for": (
        "is_async=True)\n    _arrived(v_full.index(last), last_phase, True)\n    mixed",
        "is_async=True)\n    mixed",
    ),
    "the last values are not waited for": (
        "        _arrived(v_full.index(last), last_phase, True)\n        mixed",
        "        mixed",
    ),
    "the next keys are not waited for": ("    _arrived(k_full.index(later), later_phase, more)\n", ""),
    "values are those of the keys ahead": (
        "v_phase, v_base, gone, svn, D, N,\n",
        "v_phase, v_base, here, svn, D, N,\n",
    ),
    "keys are given back before their product is there": (
        "    logits, left, words = warpgroup_mma_wait(1, deps=(ahead, left, words))\n"
        "    mbarrier.arrive(k_empty.index(stage))\n",
        "    mbarrier.arrive(k_empty.index(stage))\n"
        "    logits, left, words = warpgroup_mma_wait(1, deps=(ahead, left, words))\n",
    ),
    "values are never given back": (
        "    acc = warpgroup_mma_wait(0, deps=(mixed,))\n    mbarrier.arrive(v_empty.index(last))\n    acc",
        "    acc = warpgroup_mma_wait(0, deps=(mixed,))\n    acc",
    ),
    "a phase is taken for the other": ("gl.where(wraps, phase ^ 1, phase)", "phase"),
    "a tile too few is masked": ("clear = gl.maximum(tiles - MASKED, 1)", "clear = gl.maximum(tiles - MASKED + 1, 1)"),
    "bits are read after their buffer is given back": (
        "    words = _member_words(members, 2 * stage + HALF_INDEX, none, N) if PAIR else left\n",
        "    words = left\n",
        "    if PAIR:\n        logits = _mask_unlisted(logits, words, N, S_ACC)\n    if mask:",
        "    if PAIR:\n        words = _member_words(members, 2 * stage + HALF_INDEX, none, N)\n"
        "        logits = _mask_unlisted(logits, words, N, S_ACC)\n    if mask:",
    ),
    "limits of the item before": ("_limits(gl.minimum(following, items - 1),", "_limits(item,"),
    "a consumer takes the other list's bits": (
        "words = _member_words(members, 2 * stage + HALF_INDEX,",
        "words = _member_words(members, 2 * stage + 1 - HALF_INDEX,",
    ),
    "the first item comes twice": ("gl.program_id(0)), 1\n    _fetch(", "gl.program_id(0)), 0\n    _fetch("),
    "queries of the item before": ("    _fetch(query, Q, following, items,", "    _fetch(query, Q, item, items,"),
}  # fmt: skip


@pytest.mark.parametrize("name", ATTEND_MUTANTS)
def test_the_emulator_sees_what_the_attention_does_wrong(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = (FOLDER / "attend.py").read_text()
    changes = ATTEND_MUTANTS[name]
    for before, after in zip(changes[::2], changes[1::2], strict=True):
        assert source.count(before) == 1, "the kernel has changed; so must this test"
        source = source.replace(before, after)
    (tmp_path / "mutant.py").write_text(source)
    kernel = gluon_emulator.load(tmp_path / "mutant.py").attend_kernel
    monkeypatch.setattr(launch, "attend_kernel", gluon_emulator.Kernel(kernel))
    monkeypatch.setattr(gluon_emulator, "PATIENCE", 60.0 if name == "nothing" else 5.0)
    # Whether a buffer is written anew before it is read depends on who is faster: the loader gets its time.
    monkeypatch.setattr(gluon_emulator, "SLOW", 0.02 if "given back" in name else 0.002)
    query, key, value = tensors(2, 1, 400, 500)
    generator = torch.Generator().manual_seed(1)
    for block, density, late in ((64, 0.5, 0.0), (128, 0.5, 0.0), (128, 0.5, 0.03), (128, 0.08, 0.05)):  # single tiles
        monkeypatch.setattr(gluon_emulator, "LATE", late)
        kept = torch.rand(1, 2, -(-400 // block), 500, generator=generator) < density
        selection = spec.Selection(bits.pack(kept), 400, 500, block, True)
        out, lse = torch.full_like(query, torch.nan), torch.full(query.shape[:3], torch.nan)
        shape = launch.AttendShape(step=64, stages=2, programs=3)
        try:
            launch.attend(query, key, value, selection, 0.125, out, lse, shape)
            Exact.of(query, key, value, selection.mask(), 0.125).check(out, lse)
        except (RuntimeError, IndexError, AssertionError):
            assert name != "nothing"
            return
    assert name == "nothing", "nobody saw it"
