"""Coverage and density: the cut-off is the first bin that reaches the target, on random problems of every kind."""

from __future__ import annotations

import random
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

import vecattention
from vecattention import Selection, ops, targets
from vecattention.backends import reference
from vecattention.spec import Rule


@dataclass(frozen=True)
class Problem:
    """A random problem, seeded by its number."""

    query: Tensor
    key: Tensor
    rule: Rule

    @classmethod
    def number(cls, seed: int) -> Problem:
        dice, torch_dice = random.Random(seed), torch.Generator().manual_seed(seed)
        causal = dice.random() < 0.6
        kv_heads = dice.choice((1, 2))
        heads = kv_heads * dice.choice((1, 2, 3))
        k_len = dice.randint(1, 700)
        q_len = dice.randint(1, k_len) if causal else dice.randint(1, 500)
        pool = dice.choice((16, 32, 64))
        block = pool * dice.choice([n for n in (1, 2, 4) if pool * n <= 128])
        rule = Rule(pool, block, 16, dice.choice((1, 4, 16)), dice.choice(("row", "window")), causal, 16**-0.5)
        batch, loud = dice.choice((1, 2)), dice.choice((0.2, 1.0, 5.0))
        query, key = (
            torch.randn(batch, n, length, 16, generator=torch_dice, dtype=torch.float64)
            for n, length in ((heads, q_len), (kv_heads, k_len))
        )
        query = query + 2 * torch.randn(batch, heads, 1, 16, generator=torch_dice, dtype=torch.float64)
        return cls(query * loud, key, rule)

    def keep(self, alpha: Tensor) -> Selection:
        """The law's set at this cut-off."""
        words = reference.select(self.query, self.key, alpha, self.rule)
        return Selection(words, self.query.shape[2], self.key.shape[2], self.rule.q_block_size, self.rule.causal)

    def density(self, alpha: Tensor) -> Tensor:
        """float64 [B, H]: kept over allowed pairs, counted in the mask."""
        mask = self.keep(alpha).mask()
        allowed = torch.ones(mask.shape[2:], dtype=torch.bool)
        if self.rule.causal:
            allowed = allowed.tril(mask.shape[3] - mask.shape[2])
        return mask.sum((-1, -2)) / allowed.sum().double()

    def coverage(self, alpha: Tensor) -> Tensor:
        """float64 [B, H]: mean over pooled rows of the softmax mass on their block's keys."""
        pool, share = self.rule.q_pooling_size, self.query.shape[1] // self.key.shape[1]
        selection, rows = self.keep(alpha), []
        for g in range(-(-selection.q_len // pool)):
            mean = self.query[:, :, g * pool : (g + 1) * pool].mean(2)
            score = (mean[:, :, None] @ self.key.repeat_interleave(share, 1).mT).squeeze(2) * self.rule.scale
            if self.rule.causal:
                score[..., g * pool + selection.k_len - selection.q_len + pool :] = -torch.inf
            kept = torch.zeros_like(score)
            for b in range(score.shape[0]):
                for h in range(score.shape[1]):
                    index = vecattention.bits.unpack(selection.words[b, h, g * pool // selection.block], score.shape[2])
                    kept[b, h] = index
            rows.append((torch.softmax(score, -1) * kept).sum(-1))
        return torch.stack(rows).mean(0)


def one_bin_less(alpha: Tensor) -> Tensor:
    """The cut-off that leaves out the last bin taken."""
    return targets.upper_edge(torch.where(alpha > 1e30, targets.BINS - 1, targets.bin_of(alpha)) - 1)


def target_of(problem: Problem, seed: int) -> Tensor:
    """A random target for all heads, for each, or for each of each batch element."""
    batch, heads = problem.query.shape[:2]
    dice = torch.Generator().manual_seed(seed + 1000)
    shape = [(), (heads,), (batch, heads)][seed % 3]
    return torch.rand(shape, generator=dice, dtype=torch.float64).clamp(0.01, 0.99)


@pytest.mark.parametrize("kind", targets.KINDS)
@pytest.mark.parametrize("seed", range(100))
def test_targets_are_met_within_one_bin(kind: str, seed: int) -> None:
    problem = Problem.number(seed)
    batch, heads = problem.query.shape[:2]
    target = target_of(problem, seed)
    alpha = targets.alpha_for(problem.query, problem.key, target, kind, problem.rule)
    assert alpha.shape == (batch, heads) and alpha.dtype == torch.float32
    found = problem.density(alpha) if kind == "density" else problem.coverage(alpha)
    nothing = alpha <= -1e30
    less = torch.where(nothing, alpha, one_bin_less(alpha))
    without = problem.density(less) if kind == "density" else problem.coverage(less)
    if not target.ndim:
        assert (alpha == alpha[:, :1]).all()
        found, without = (x.mean(1, keepdim=True) for x in (found, without))
        nothing = nothing[:, :1]
    rounding = 1e-12 if kind == "density" else 1e-6  # coverage is summed in units of 2^-30
    assert (found >= target - rounding).all()
    assert ((without < target + rounding) | nothing).all()
    assert problem.rule.causal or not nothing.any()


def test_bins_cover_every_gap_in_order() -> None:
    gaps = torch.cat((torch.tensor([0.0, 1e-30, 1e30, torch.inf]), torch.logspace(-4, 3, 20001))).sort().values
    bins = targets.bin_of(gaps)
    assert (bins.diff() >= 0).all() and bins[0] == 0 and bins[-1] == targets.BINS - 1
    assert (gaps <= targets.upper_edge(bins))[:-1].all()
    assert (gaps > targets.upper_edge(bins - 1)).all()
    inside = (gaps > 2**-10) & (gaps < 2**7)
    width = targets.upper_edge(bins[inside]) - targets.upper_edge(bins[inside] - 1)
    assert (width <= gaps[inside] / 512 * 1.001).all()


@pytest.fixture
def tensors() -> tuple[Tensor, Tensor, Tensor]:
    dice = torch.Generator().manual_seed(0)
    query = 3 * torch.randn(2, 4, 900, 32, generator=dice)
    key, value = (torch.randn(2, 2, 900, 32, generator=dice) for _ in range(2))
    return query, key, value


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("scope", ["row", "window"])
def test_a_number_is_for_all_heads_and_a_tensor_for_each(
    tensors: tuple[Tensor, Tensor, Tensor], causal: bool, scope: str
) -> None:
    query, key, _ = tensors
    query = query * torch.tensor([0.2, 1.0, 2.0, 4.0])[:, None, None]
    together = vecattention.select(query, key, density=0.3, causal=causal, max_scope=scope).density()
    torch.testing.assert_close(together.mean(1), torch.tensor([0.3, 0.3]), rtol=0.02, atol=0)
    assert together.std(1).min() > 0.02
    each = torch.tensor([0.2, 0.3, 0.4, 0.5])
    got = vecattention.select(query, key, density=each, causal=causal, max_scope=scope).density()
    torch.testing.assert_close(got, each.expand(2, 4), rtol=0.03, atol=0)


def test_more_coverage_is_a_superset(tensors: tuple[Tensor, Tensor, Tensor]) -> None:
    query, key, _ = tensors
    masks = [vecattention.select(query, key, coverage=c, max_scope="row").mask() for c in (0.5, 0.8, 1.0)]
    assert all(not (a & ~b).any() for a, b in zip(masks, masks[1:], strict=False))
    assert masks[0].sum() < masks[1].sum() < masks[2].sum()


@pytest.mark.parametrize("target", [{"coverage": 0.7}, {"density": torch.tensor([0.1, 0.2, 0.3, 0.4])}])
def test_backends_chunks_and_batches_agree(
    tensors: tuple[Tensor, Tensor, Tensor], target: dict[str, float | Tensor]
) -> None:
    query, key, value = tensors
    arguments = {"max_scope": "row", "q_pooling_size": 32, "q_block_size": 128} | target
    words = [vecattention.select(query, key, backend=name, **arguments).words for name in ("cpu", "reference")]
    assert torch.equal(words[0], words[1])
    whole = vecattention.vec_attention(query, key, value, **arguments)
    parts = vecattention.vec_attention(query, key, value, chunk_size=128, **arguments)
    torch.testing.assert_close(parts, whole, rtol=0, atol=1e-6)
    selected = vecattention.attend(query, key, value, vecattention.select(query, key, **arguments))
    torch.testing.assert_close(whole, selected, rtol=0, atol=1e-6)
    alone = vecattention.select(query[1:], key[1:], **arguments).words
    assert torch.equal(alone, words[0][1:])


def test_slabs_change_nothing(tensors: tuple[Tensor, Tensor, Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    query, key, _ = tensors
    rule = Rule(32, 128, 16, 16, "row", True, 32**-0.5)
    for kind in targets.KINDS:
        whole = targets.histogram(query, key, kind, rule)
        with monkeypatch.context() as patch:
            patch.setitem(targets.SLABS, "cpu", 1)
            patch.setattr(targets, "KEYS", 100)
            small = targets.histogram(query, key, kind, rule)
        assert (whole.sum(-1) - small.sum(-1)).abs().max() <= whole.sum(-1).max() * 1e-6
        assert (whole - small).abs().sum() <= whole.sum() * 1e-4  # a score can round into the next bin


@pytest.mark.parametrize("kind", targets.KINDS)
@pytest.mark.parametrize("causal", [True, False])
def test_a_gpus_way_counts_the_same(kind: str, causal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Copies of each histogram, added up, key heads in a slab (two and one of three), keys in pieces, on the CPU."""
    generator = torch.Generator().manual_seed(5)
    query, key = (torch.randn(2, h, 300, 32, generator=generator) for h in (6, 3))
    rule = Rule(32, 128, 16, 16, "window", causal, 32**-0.5)
    plain = targets.histogram(query, key, kind, rule)
    monkeypatch.setitem(targets.COPIES, "cpu", targets.COPIES["cuda"])
    monkeypatch.setattr(reference, "running_max", reference.doubling_max)
    assert torch.equal(targets.histogram(query, key, kind, rule), plain)
    monkeypatch.setitem(targets.HEADS, "cpu", 2)
    monkeypatch.setitem(targets.SLABS, "cpu", 16_000)  # two heads' scores, not their keys
    monkeypatch.setattr(targets, "KEYS", 100)
    together = targets.histogram(query, key, kind, rule)
    assert (together.sum(-1) - plain.sum(-1)).abs().max() <= plain.sum(-1).max() * 1e-6
    assert (together - plain).abs().sum() <= plain.sum() * 1e-4  # a score can round into the next bin


@pytest.mark.parametrize("count", [1, 2, 3, 16, 50])
def test_running_maximum(count: int) -> None:
    x = torch.randn(3, 7, count, generator=torch.Generator().manual_seed(count)).masked_fill(torch.eye(7, count) > 0, 9)
    x[1, 2:4, count // 2] = torch.tensor([torch.nan, -torch.inf])
    before = x.clone()
    torch.testing.assert_close(reference.doubling_max(x), torch.cummax(x, -1)[0], rtol=0, atol=0, equal_nan=True)
    assert torch.equal(x.isnan(), before.isnan()) and torch.equal(x.nan_to_num(), before.nan_to_num())


def test_a_row_without_scores_takes_no_mass_from_its_block(tensors: tuple[Tensor, Tensor, Tensor]) -> None:
    """One pooled row of four that share a list is NaN; the mass of the others stays, each a unit of 2^30."""
    query, key, _ = tensors
    query = query.clone()
    query[0, 0, 40] = torch.nan
    for causal in (True, False):
        taken = targets.histogram(query, key, "coverage", Rule(32, 128, 16, 16, "row", causal, 32**-0.5)).sum(-1)
        rows = torch.full((2, 4), 29.0)
        rows[0, 0] = 28
        torch.testing.assert_close(taken / targets.UNIT, rows, rtol=1e-6, atol=0, check_dtype=False)


def test_one_operator_with_known_shapes(tensors: tuple[Tensor, Tensor, Tensor]) -> None:
    query, key, value = tensors

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = vecattention.vec_attention(q, k, v, density=0.2, max_scope="row")
        assert isinstance(out, Tensor)
        return out

    compiled = torch.compile(call, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(query, key, value), call(query, key, value))


def test_counted_and_explain_take_them(tensors: tuple[Tensor, Tensor, Tensor]) -> None:
    query, key, value = tensors
    _, _, kept = ops.counted(query, key, value, density=0.25, max_scope="row")
    torch.testing.assert_close(
        kept.double().mean(1) / (900 * 901 / 2), torch.full((2,), 0.25).double(), rtol=0.02, atol=0
    )
    assert vecattention.explain(query, key, coverage=0.9).backend == "cpu"


def test_wrong_targets_say_what_was_wanted(tensors: tuple[Tensor, Tensor, Tensor]) -> None:
    query, key, value = tensors
    for call in (lambda **a: vecattention.select(query, key, **a),
                 lambda **a: vecattention.vec_attention(query, key, value, **a)):  # fmt: skip
        with pytest.raises(ValueError, match="coverage and density are both given, wanted one of them"):
            call(coverage=0.5, density=0.5)
        with pytest.raises(ValueError, match="threshold and density are both given"):
            call(threshold=0.5, density=0.5)
        with pytest.raises(
            ValueError, match=r"density is 0.0, wanted a number in \(0, 1\]: the share of all allowed pairs"
        ):
            call(density=0)
        with pytest.raises(ValueError, match=r"coverage is 1.5, wanted a number in \(0, 1\]: the share of the pooled"):
            call(coverage=torch.tensor([0.5, 0.5, 1.5, 0.5]))
        with pytest.raises(ValueError, match=r"coverage has shape \(3,\), wanted \(\) or \(4,\) or \(2, 4\)"):
            call(coverage=torch.ones(3))
        with pytest.raises(TypeError, match="density is '0.1'"):
            call(density="0.1")


def miss(kind: str, seed: int) -> tuple[float, float] | None:
    """How far the cut-off lies above the least one that reaches the target, in bins, and what is kept above the target.

    The largest of a problem's heads (minus infinity in bins where the target is not reached); None where what is kept
    anyway reaches the target.
    """
    problem = Problem.number(seed)
    target = target_of(problem, seed)
    measured = problem.density if kind == "density" else problem.coverage
    alpha = targets.alpha_for(problem.query, problem.key, target, kind, problem.rule)

    def reached(cut: Tensor) -> Tensor:
        found = measured(cut.float())
        return found if target.ndim else found.mean(1, keepdim=True).expand_as(found)

    chosen = alpha > -1e30
    if not chosen.any():
        return None
    above = reached(alpha) - target
    low, high = torch.zeros_like(alpha, dtype=torch.float64), alpha.double()
    for _ in range(50):
        middle = (low + high) / 2
        enough = reached(middle) >= target
        low, high = torch.where(enough, low, middle), torch.where(enough, middle, high)
    bins = torch.where(above < -1e-6, -torch.inf, place_of(alpha) - place_of(high))
    return float(bins[chosen].max()), float(above[chosen].max())


def place_of(cut: Tensor) -> Tensor:
    """float64: number of a cut-off's bin, and how much of the bin lies below it."""
    number = targets.bin_of(cut.float())
    low, high = (targets.upper_edge(n).clamp(min=0).double() for n in (number - 1, number))
    return number + (cut.double() - low) / (high - low)


def report() -> None:
    """Print the figures of all problems: ``python tests/test_targets.py``."""
    for kind in targets.KINDS:
        found = [one for one in (miss(kind, seed) for seed in range(100)) if one is not None]
        bins, above = (sorted(values) for values in zip(*found, strict=True))
        print(f"{kind}: in {100 - len(found)} of 100 problems what is kept anyway reaches the target; in the others")
        print(f"  the cut-off is at most {bins[-1]:.3f} bins above the least that reaches it (least {bins[0]:.3f}),")
        print(
            f"  and what is kept exceeds the target by {above[len(above) // 2]:.5f} (median), at most {above[-1]:.4f}"
        )


if __name__ == "__main__":
    report()
