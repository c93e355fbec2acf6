"""What each rank computes in the tests of this folder; every rank draws the same tensors and takes its part."""

from __future__ import annotations

import itertools
from unittest import mock

import torch
import torch.distributed as dist

import vecattention
from vecattention.integrations.context_parallel import (
    Groups,
    head_order,
    parallel_attention,
    ring_attention,
    ulysses_attention,
)

RULE = {"q_pooling_size": 16, "k_local_size": 16, "group_k_block": 4}


def tensors(batch: int, heads: int, kv_heads: int, queries: int, keys: int, seed: int = 0) -> list[torch.Tensor]:
    torch.manual_seed(seed)
    query = torch.randn(batch, heads, queries, 16)
    key, value = (torch.randn(batch, kv_heads, keys, 16) for _ in range(2))
    return [query * torch.linspace(0.5, 3.0, heads)[None, :, None, None], key, value]  # heads of many densities


def part(x: torch.Tensor, lengths: list[int], rank: int) -> torch.Tensor:
    return x.split(lengths, 2)[rank].contiguous()


def even(length: int, ranks: int) -> list[int]:
    return [length // ranks] * ranks


def attention(rank: int, kind: str, shape: tuple[int, ...], lengths: list[int] | None, arguments: dict) -> dict:
    """Largest differences of this rank's part from one process: output, log-sum-exp."""
    ranks = dist.get_world_size()
    query, key, value = tensors(*shape)
    rows = lengths or even(query.shape[2], ranks)
    keys = rows if key.shape[2] == query.shape[2] else even(key.shape[2], ranks)
    mine = [part(query, rows, rank), part(key, keys, rank), part(value, keys, rank)]
    arguments = {"causal": False, **RULE, **arguments}
    one = {name: x for name, x in arguments.items() if name != "order"}
    out, lse = vecattention.vec_attention(query, key, value, return_lse=True, **one)
    exact, exact_lse = in_double(query, key, value, one)
    function = {"ulysses": ulysses_attention, "ring": ring_attention}[kind]
    got, got_lse = function(*mine, lengths=lengths, return_lse=True, **arguments)
    return {
        "same": torch.equal(got, part(out, rows, rank)) and torch.equal(got_lse, lse.split(rows, 2)[rank]),
        "out": excess(got, part(out, rows, rank), part(exact, rows, rank), exact_lse),
        "lse": excess(got_lse, lse.split(rows, 2)[rank], exact_lse.split(rows, 2)[rank], exact_lse),
    }


def in_double(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, arguments: dict
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention in float64 over the keys that one process selects in float32: output and log-sum-exp."""
    scale = arguments.get("scale") or query.shape[-1] ** -0.5
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
    chosen = vecattention.select(query, key, **{n: x for n, x in arguments.items() if n != "chunk_size"}).mask()
    logits = (query.double() @ key.double().mT * scale).masked_fill(~chosen, -torch.inf)
    return logits.softmax(-1) @ value.double(), logits.logsumexp(-1)


def excess(got: torch.Tensor, one: torch.Tensor, exact: torch.Tensor, lse: torch.Tensor) -> float:
    """Error of the sharded result over its budget; good is <= 1.

    The budget is twice the error of one process and the rounding of a float32 log-sum-exp, which merging weighs by.
    """
    rounding = torch.finfo(torch.float32).eps * exact.abs().max() * (1 + lse.abs().max())
    return float((got - exact).abs().max() / (2 * (one - exact).abs().max() + rounding))


def both(rank: int, shape: tuple[int, ...], balance: bool, target: str) -> dict:
    """Two by two: Ulysses inside of a ring, with the counts."""
    query, key, value = tensors(*shape)
    pairs = [dist.new_group(list(ranks)) for ranks in ((0, 1), (2, 3), (0, 2), (1, 3))]
    groups = Groups(ulysses=pairs[rank // 2], ring=pairs[2 + rank % 2])
    rows = even(query.shape[2], 4)
    limit = {"threshold": torch.linspace(0.1, 0.9, query.shape[1]), "density": 0.2}[target]
    arguments = {"causal": False, target: limit, **RULE}
    order = head_order(torch.arange(query.shape[1]), 2) if balance else None
    out, lse, kept = parallel_attention(*(part(x, rows, rank) for x in (query, key, value)), groups=groups, order=order,
                                        **arguments)  # fmt: skip
    one, one_lse = vecattention.vec_attention(query, key, value, return_lse=True, **arguments)
    pairs = vecattention.select(query, key, **arguments).kept_pairs()
    exact, exact_lse = in_double(query, key, value, arguments)
    return {
        "out": excess(out, part(one, rows, rank), part(exact, rows, rank), exact_lse),
        "lse": excess(lse, one_lse.split(rows, 2)[rank], exact_lse.split(rows, 2)[rank], exact_lse),
        "kept": torch.equal(kept, pairs), "shards": groups.shards,
    }  # fmt: skip


def counts(rank: int, kind: str, shape: tuple[int, ...], lengths: list[int] | None) -> dict:
    """Counts of all heads, which every rank gets."""
    query, key, value = tensors(*shape)
    rows = lengths or even(query.shape[2], dist.get_world_size())
    arguments = {"causal": False, "threshold": torch.linspace(0.1, 0.9, query.shape[1]), **RULE}
    groups = Groups(**{kind: dist.group.WORLD})
    mine = [part(x, rows, rank) for x in (query, key, value)]
    _, _, kept = parallel_attention(
        *mine, groups=groups, order=head_order(torch.arange(query.shape[1]), dist.get_world_size()), **arguments
    )
    return {"kept": kept, "wanted": vecattention.select(query, key, **arguments).kept_pairs()}


def errors(rank: int) -> list[str]:
    """The messages of everything that is refused, on every rank alike."""
    query, key, value = tensors(1, 6, 6, 64, 64)
    calls = [
        lambda: ulysses_attention(query, key, value),
        lambda: ulysses_attention(query[:, :4], key[:, :2], value[:, :2]),
        lambda: ulysses_attention(query[:, :4], key[:, :4], value[:, :4], lengths=[64, 64]),
        lambda: ulysses_attention(query[:, :4], key[:, :4], value[:, :4], lengths=[63] * 4),
        lambda: ulysses_attention(query[:, :4], key[:, :4], value[:, :4], order=torch.arange(3)),
        lambda: ring_attention(query, key, value, causal=True),
        lambda: ring_attention(query[:, :, :10], key, value),
        lambda: ulysses_attention(query[:, :4], key[:, :4], value[:, :4], threshold=2.0),
    ]
    messages = []
    for call in calls:
        try:
            call()
        except (TypeError, ValueError) as error:
            messages.append(str(error))
    return messages


def compiled(rank: int) -> float:
    """Ulysses within torch.compile."""
    query, key, value = tensors(1, 4, 4, 128, 128)
    mine = [part(x, even(128, dist.get_world_size()), rank) for x in (query, key, value)]
    wanted = ulysses_attention(*mine, causal=False, order=torch.tensor([2, 0, 3, 1]), **RULE)
    call = torch.compile(
        lambda *x: ulysses_attention(*x, causal=False, order=torch.tensor([2, 0, 3, 1]), **RULE), backend="aot_eager"
    )
    found = float((call(*mine) - wanted).abs().max())
    wanted = ulysses_attention(*mine, causal=False, density=0.3, **RULE)
    call = torch.compile(lambda *x: ulysses_attention(*x, causal=False, density=0.3, **RULE), backend="aot_eager")
    return max(found, float((call(*mine) - wanted).abs().max()))


def parallel(model: object, config: dict[str, int]) -> None:
    """diffusers' `enable_parallelism` on CPUs; it counts accelerators, of which there must be one to divide by."""
    from diffusers import ContextParallelConfig

    shape = (config.get("ring_degree", 1), config.get("ulysses_degree", 1))
    mesh = dist.device_mesh.init_device_mesh("cpu", shape, mesh_dim_names=("ring", "ulysses"))
    with mock.patch("torch.accelerator.device_count", return_value=1):
        model.enable_parallelism(config=ContextParallelConfig(**config, mesh=mesh))


def generation(rank: int, config: dict[str, int], heads: int, dense_steps: float, tokens: tuple[int, int],
               target: str = "threshold") -> dict:  # fmt: skip
    """A Wan transformer sharded by diffusers against the same in one process."""
    from integrations_dit.tiny_generators import wan_transformer

    torch.manual_seed(1)
    arguments = (torch.randn(1, 4, 2, *tokens), torch.tensor([500.0]), torch.randn(1, 8, 16))
    settings = {target: torch.linspace(0.2, 0.9, heads), "dense_steps": dense_steps, "q_pooling_size": 16}
    settings |= {"q_block_size": 32}
    alone, sharded = wan_transformer(heads=heads), wan_transformer(heads=heads)
    parallel(sharded, config)
    out = []
    with torch.no_grad():
        for model in (alone, sharded):
            steps = []
            with vecattention.apply(model, **settings) as run:
                for step, branch in itertools.product(range(2), ("cond", "uncond")):
                    with model.cache_context(branch, step_index=step, num_inference_steps=2):
                        steps.append(model(*arguments, return_dict=False)[0])
            out.append((torch.stack(steps), run.stats))
    (one, stats), (many, counted) = out
    same = {"pairs": all(
        mine.sparse_pairs == theirs.sparse_pairs and mine.dense_pairs == theirs.dense_pairs
        for mine, theirs in zip(counted.layers.values(), stats.layers.values(), strict=True)
    )}  # fmt: skip
    return {**same, "out": float((one - many).abs().max()), "sparse": counted.sparse_calls,
            "density": float((counted.density - stats.density).abs().max()),
            "least": float(stats.density.min())}  # fmt: skip


def refused(rank: int, config: dict[str, int], heads: int) -> str:
    """Why `apply` refuses a sharded transformer."""
    from integrations_dit.tiny_generators import wan_transformer

    model = wan_transformer(heads=heads)
    parallel(model, config)
    before = {name: id(processor) for name, processor in model.attn_processors.items()}
    try:
        with vecattention.apply(model):
            pass
    except ValueError as error:
        after = {name: id(processor) for name, processor in model.attn_processors.items()}
        return str(error) if before == after else "not restored"
    return "served"
