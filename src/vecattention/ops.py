"""The three verbs: `select`, `attend`, `vec_attention`, and `explain`. Check, choose, call.

Each verb is a `torch.library` operator, so that `torch.compile(fullgraph=True)` sees one node with known shapes.
"""

from __future__ import annotations

import contextlib
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from vecattention import bits, checks, dispatch, machine, targets
from vecattention.spec import Problem, Rule, Selection


def select(
    query: Tensor,
    key: Tensor,
    *,
    threshold: float | Tensor = 0.9,
    coverage: float | Tensor | None = None,
    density: float | Tensor | None = None,
    q_pooling_size: int = 64,
    q_block_size: int | None = None,
    k_local_size: int = 16,
    group_k_block: int = 16,
    max_scope: str = "window",
    causal: bool = True,
    scale: float | None = None,
    backend: str = "auto",
) -> Selection:
    r"""Which keys each block of queries will attend to: min-p on the mean query of the block.

    Key j is kept for block g when ``s[g, j] - ln(threshold) >= max`` with ``s[g, j] = scale <mean query of g, k_j>``;
    in causal mode the first P keys and the block's own keys are always kept. `vecattention.spec` states the set exactly
    (VecAttention, arXiv 2603.29494, TilingSelect with the minS filter).

    Args:
        query: [B, H, Sq, D], float16, bfloat16, float32 (float64 on the reference and the CPU), any strides.
        key: [B, Hkv, Sk, D], same dtype and device; H a multiple of Hkv. Causal: Sq <= Sk, aligned bottom-right.
        threshold: minimum probability of a key relative to the largest, in (0, 1]; higher is sparser. A number, or a
            tensor of shape [], [H] or [B, H]. Values of a tensor on a GPU are checked there by a device assertion.
        coverage: instead of a threshold, the share of the pooled softmax that the kept keys shall hold, in (0, 1].
        density: instead of a threshold, the share of all allowed pairs that shall be kept, in (0, 1]. Both look for
            one cut-off with a histogram and meet their target within one of its bins (`vecattention.targets`): a
            number for all heads of a batch element together, a tensor of shape [H] or [B, H] for each head. They cost
            another pass over the pooled scores. What is kept anyway (causal) may exceed them.
        q_pooling_size: P, queries averaged into one pooled row: 16, 32, 64 or 128.
        q_block_size: R, rows that share one list of keys, a multiple of P up to 128; None means P.
        k_local_size: B, keys per tile: 16, 32, 64 or 128, at most P.
        group_k_block: G, tiles per window (max_scope="window").
        max_scope: "window", the published running maximum inside windows of B*G keys, or "row", the row's maximum.
        causal: whether row i sees only keys at positions up to i + Sk - Sq.
        scale: factor of the dot products; None means D ** -0.5.
        backend: "auto", or one that `explain` lists; a named backend never falls back.

    Returns:
        The `Selection`: 1 bit per key and block of queries.

    Raises:
        TypeError, ValueError: an argument that does not fit, with what was wanted and what to do.

    Example:
        >>> import torch, vecattention
        >>> query, key = torch.randn(1, 4, 512, 64), torch.randn(1, 2, 512, 64)
        >>> vecattention.select(query, key, threshold=0.9).density().shape
        torch.Size([1, 4])
    """
    checks.tensors(causal, query=query, key=key)
    rule = checks.rule(
        head_dim=query.shape[3], q_pooling_size=q_pooling_size, q_block_size=q_block_size, k_local_size=k_local_size,
        group_k_block=group_k_block, max_scope=max_scope, causal=causal, scale=scale,
    )  # fmt: skip
    kind, limit = checks.target(threshold, coverage, density, query.shape[0], query.shape[1])
    dispatch.check(backend)
    words = _select(query, key, limit, kind, *_arguments(rule), backend)
    return Selection(words, query.shape[2], key.shape[2], rule.q_block_size, causal)


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    selection: Selection,
    *,
    scale: float | None = None,
    return_lse: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    r"""Exact softmax attention over exactly the selected keys: ``out_i = sum_j softmax_j(scale <q_i, k_j>) v_j``.

    Args:
        query: [B, H, Sq, D], float16, bfloat16, float32 (float64 on the reference and the CPU), any strides.
        key: [B, Hkv, Sk, D], same dtype and device.
        value: [B, Hkv, Sk, D], same dtype and device.
        selection: made for the same B, H, Sq, Sk by `select` or a method of `vecattention.methods`.
        scale: factor of the dot products; None means D ** -0.5.
        return_lse: also return the log-sum-exp, with which results over disjoint sets of keys merge exactly.
        backend: "auto", or one that `explain` lists; a named backend never falls back.

    Returns:
        [B, H, Sq, D] in the input dtype; with return_lse also the natural-log log-sum-exp, float32 [B, H, Sq].
        A row with no key gives 0 and -inf.

    Raises:
        TypeError, ValueError: an argument that does not fit, with what was wanted and what to do.

    Example:
        >>> import torch, vecattention
        >>> query, key, value = (torch.randn(1, 2, 300, 32) for _ in range(3))
        >>> selection = vecattention.select(query, key)
        >>> out, lse = vecattention.attend(query, key, value, selection, return_lse=True)
        >>> out.shape, lse.shape
        (torch.Size([1, 2, 300, 32]), torch.Size([1, 2, 300]))
    """
    checks.tensors(False, query=query, key=key, value=value)
    checks.selection(selection, query, key)
    dispatch.check(backend)
    scale = checks.scale_of(scale, query.shape[3])
    query = selection.arrange(query)
    out, lse = _attend(query, key, value, selection.words, selection.block, selection.causal, scale, backend)
    if selection.order is not None:
        out, lse = selection.restore(out), selection.restore(lse[..., None]).squeeze(-1)
    return (out, lse) if return_lse else out


def vec_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    threshold: float | Tensor = 0.9,
    coverage: float | Tensor | None = None,
    density: float | Tensor | None = None,
    q_pooling_size: int = 64,
    q_block_size: int | None = None,
    k_local_size: int = 16,
    group_k_block: int = 16,
    max_scope: str = "window",
    causal: bool = True,
    scale: float | None = None,
    chunk_size: int | None = None,
    return_lse: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    r"""Vector-sparse attention: ``attend(query, key, value, select(query, key, ...))`` in bounded memory.

    Arguments, shapes and errors are those of `select` and `attend`. The queries are handled ``chunk_size`` at a time
    (rounded to whole blocks; None bounds the workspace by itself, whole heads at a time where they fit); the result
    does not depend on it.

    Returns:
        [B, H, Sq, D] in the input dtype; with return_lse also the natural-log log-sum-exp, float32 [B, H, Sq].

    Example:
        >>> import torch, vecattention
        >>> query = torch.randn(1, 4, 1000, 64)
        >>> key, value = torch.randn(1, 2, 1000, 64), torch.randn(1, 2, 1000, 64)
        >>> vecattention.vec_attention(query, key, value, threshold=0.8).shape
        torch.Size([1, 4, 1000, 64])
    """
    out, lse, _ = counted(
        query, key, value, count=False, threshold=threshold, coverage=coverage, density=density,
        q_pooling_size=q_pooling_size, q_block_size=q_block_size, k_local_size=k_local_size,
        group_k_block=group_k_block, max_scope=max_scope, causal=causal, scale=scale, chunk_size=chunk_size,
        backend=backend,
    )  # fmt: skip
    return (out, lse) if return_lse else out


def counted(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    threshold: float | Tensor = 0.9,
    coverage: float | Tensor | None = None,
    density: float | Tensor | None = None,
    causal: bool = True,
    chunk_size: int | None = None,
    backend: str = "auto",
    count: bool = True,
    alpha: Tensor | None = None,
    **rule_arguments: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """`vec_attention` that also counts: (out, lse, kept pairs int64 [B, H], or [0, 0] without ``count``).

    ``alpha``: float32 [B, H], the cut-off itself, in place of what it is made from.
    """
    checks.tensors(causal, query=query, key=key, value=value)
    rule = rule_of(query.shape[3], causal=causal, **rule_arguments)
    kind, limit = checks.target(threshold, coverage, density, query.shape[0], query.shape[1])
    if alpha is not None:
        kind, limit = "alpha", alpha
    dispatch.check(backend)
    asked = checks.chunk_size(chunk_size)
    found: tuple[Tensor, Tensor, Tensor] = _vec_attention(
        query, key, value, limit, kind, *_arguments(rule), asked, count, backend
    )
    return found


def explain(
    query: Tensor,
    key: Tensor,
    value: Tensor | None = None,
    *,
    threshold: float | Tensor = 0.9,
    coverage: float | Tensor | None = None,
    density: float | Tensor | None = None,
    causal: bool = True,
    chunk_size: int | None = None,
    backend: str = "auto",
    **rule_arguments: Any,
) -> dispatch.Explanation:
    """Say which backend `vec_attention` would use with these arguments, why not the others, and its workspace.

    Nothing is computed: tensors on the meta device serve as well. Takes the arguments of `vec_attention`. What it says
    of chunks holds for this machine: on a GPU they end where few of its multiprocessors go without work.

    Example:
        >>> import torch, vecattention
        >>> query = torch.randn(1, 2, 256, 64)
        >>> vecattention.explain(query, query, query).backend
        'cpu'
    """
    given = {"query": query, "key": key} | ({} if value is None else {"value": value})
    checks.tensors(causal, **given)
    rule = rule_of(query.shape[3], causal=causal, **rule_arguments)
    checks.target(threshold, coverage, density, query.shape[0], query.shape[1])
    return dispatch.explain(Problem.of(query, key, rule), backend, checks.chunk_size(chunk_size))


def select_at(query: Tensor, key: Tensor, alpha: Tensor, rule: Rule, backend: str = "auto") -> Selection:
    """`select` at a cut-off, float32 [B, H], as `vecattention.targets` finds it."""
    checks.tensors(rule.causal, query=query, key=key)
    dispatch.check(backend)
    words = _select(query, key, alpha, "alpha", *_arguments(rule), backend)
    return Selection(words, query.shape[2], key.shape[2], rule.q_block_size, rule.causal)


def histogram(query: Tensor, key: Tensor, kind: str, rule: Rule, every: int = 1, first: int = 0) -> Tensor:
    """`vecattention.targets.histogram` of every so manieth block of queries, as one operator.

    ``first``: the number of the first block of this query; those whose number ``every`` divides are counted.
    """
    found: Tensor = _histogram(query, key, kind, *_arguments(rule), every, first)
    return found


def cut_off(taken: Tensor, limit: Tensor, kind: str, pairs: int) -> Tensor:
    """`vecattention.targets.cut_off` of a checked target, as one operator."""
    found: Tensor = _cut_off(taken, limit, kind, pairs)
    return found


def rule_of(
    head_dim: int,
    *,
    q_pooling_size: int = 64,
    q_block_size: int | None = None,
    k_local_size: int = 16,
    group_k_block: int = 16,
    max_scope: str = "window",
    causal: bool = True,
    scale: float | None = None,
) -> Rule:
    """The `Rule` of the keyword arguments of `select`, with their defaults, checked."""
    return checks.rule(
        head_dim=head_dim, q_pooling_size=q_pooling_size, q_block_size=q_block_size, k_local_size=k_local_size,
        group_k_block=group_k_block, max_scope=max_scope, causal=causal, scale=scale,
    )  # fmt: skip


def _arguments(rule: Rule) -> tuple[int, int, int, int, str, bool, float]:
    return (rule.q_pooling_size, rule.q_block_size, rule.k_local_size, rule.group_k_block, rule.max_scope,
            rule.causal, rule.scale)  # fmt: skip


@torch.library.custom_op("vecattention::select", mutates_args=())
def _select(query: Tensor, key: Tensor, limit: Tensor, kind: str, pool: int, block: int, tile: int, group: int,
            scope: str, causal: bool, scale: float, backend: str) -> Tensor:  # fmt: skip
    rule = Rule(pool, block, tile, group, scope, causal, scale)
    problem = Problem.of(query, key, rule)
    chosen = dispatch.choose(backend, problem)
    with _memory("select", problem, lambda free: dispatch.no_room_to_select(problem, free)), _own_dtypes(query):
        return chosen.select(query, key, _alpha(query, key, limit, kind, rule), rule)


@_select.register_fake
def _(query: Tensor, key: Tensor, limit: Tensor, kind: str, pool: int, block: int, tile: int, group: int,
      scope: str, causal: bool, scale: float, backend: str) -> Tensor:  # fmt: skip
    blocks = (query.shape[2] + block - 1) // block
    width = (key.shape[2] + bits.WORD - 1) // bits.WORD
    return query.new_empty((query.shape[0], query.shape[1], blocks, width), dtype=torch.int32)


@torch.library.custom_op("vecattention::histogram", mutates_args=())
def _histogram(query: Tensor, key: Tensor, kind: str, pool: int, block: int, tile: int, group: int, scope: str,
               causal: bool, scale: float, every: int, first: int) -> Tensor:  # fmt: skip
    if every > 1:
        chosen = range(-first % every * block, query.shape[2], every * block)
        query = torch.cat([query[:, :, at : at + block] for at in chosen] or [query[:, :, :0]], 2)
    try:
        with _own_dtypes(query):
            return targets.histogram(query, key, kind, Rule(pool, block, tile, group, scope, causal, scale))
    except torch.OutOfMemoryError as error:
        first_line = str(error).partition("\n")[0]
        raise torch.OutOfMemoryError(
            f"{first_line} It was the pass over the scores that a {kind} asks for; free memory, or pass a threshold"
        ) from error


@_histogram.register_fake
def _(query: Tensor, key: Tensor, kind: str, pool: int, block: int, tile: int, group: int, scope: str, causal: bool,
      scale: float, every: int, first: int) -> Tensor:  # fmt: skip
    return query.new_empty((query.shape[0], query.shape[1], 1 + targets.BINS), dtype=torch.int64)


@torch.library.custom_op("vecattention::cut_off", mutates_args=())
def _cut_off(taken: Tensor, limit: Tensor, kind: str, pairs: int) -> Tensor:
    return targets.cut_off(taken, checks.values(limit, kind), kind, pairs)


@_cut_off.register_fake
def _(taken: Tensor, limit: Tensor, kind: str, pairs: int) -> Tensor:
    return taken.new_empty(taken.shape[:2], dtype=torch.float32)


@torch.library.custom_op("vecattention::attend", mutates_args=())
def _attend(query: Tensor, key: Tensor, value: Tensor, words: Tensor, block: int, causal: bool, scale: float,
            backend: str) -> tuple[Tensor, Tensor]:  # fmt: skip
    selection = Selection(words, query.shape[2], key.shape[2], block, causal)
    problem = Problem.of(query, key, Rule(q_pooling_size=block, q_block_size=block, causal=causal, scale=scale))
    chosen = dispatch.choose(backend, problem)
    with _memory("attend", problem, lambda free: dispatch.no_room_to_attend(problem, free)), _own_dtypes(query):
        return _attended(query, key, value, selection, scale, chosen)


def _attended(query: Tensor, key: Tensor, value: Tensor, selection: Selection, scale: float,
              chosen: dispatch.Backend) -> tuple[Tensor, Tensor]:  # fmt: skip
    out, lse = _outputs(query)
    chosen.attend(query, key, value, selection, scale, out, lse)
    return out, lse


@_attend.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, words: Tensor, block: int, causal: bool, scale: float,
      backend: str) -> tuple[Tensor, Tensor]:  # fmt: skip
    return _outputs(query)


@torch.library.custom_op("vecattention::vec_attention", mutates_args=())
def _vec_attention(query: Tensor, key: Tensor, value: Tensor, limit: Tensor, kind: str, pool: int, block: int,
                   tile: int, group: int, scope: str, causal: bool, scale: float, chunk: int, count: bool,
                   backend: str) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    rule = Rule(pool, block, tile, group, scope, causal, scale)
    problem = Problem.of(query, key, rule)
    chosen = dispatch.choose(backend, problem)
    size = dispatch.chunk_for(problem, chunk)
    with _memory("vec_attention", problem, lambda free: dispatch.out_of_memory(problem, size, free, False)):
        out, lse = _outputs(query)
    with _memory("vec_attention", problem, lambda free: dispatch.out_of_memory(problem, size, free)):
        kept = _fill(query, key, value, limit, kind, problem, size, count, chosen, out, lse)
    return out, lse, kept


def _fill(query: Tensor, key: Tensor, value: Tensor, limit: Tensor, kind: str, problem: Problem, size: dispatch.Chunk,
          count: bool, chosen: dispatch.Backend, out: Tensor, lse: Tensor) -> Tensor:  # fmt: skip
    """Chunk by chunk the output; int64 [B, H] pairs that were kept, or [0, 0]."""
    rule = problem.rule
    with _own_dtypes(query):
        kept = query.new_zeros((problem.batch, problem.heads) if count else (0, 0), dtype=torch.int64)
        alpha = _alpha(query, key, limit, kind, rule)
        for part in dispatch.parts(problem, size):
            rows, keys = (part.batch, part.heads, part.rows), (part.batch, part.kv_heads, part.keys)
            q, k = query[rows], key[keys]
            words = chosen.select(q, k, alpha[part.batch, part.heads], rule)
            selection = Selection(words, q.shape[2], k.shape[2], rule.q_block_size, rule.causal)
            chosen.attend(q, k, value[keys], selection, rule.scale, out[rows], lse[rows])
            if count:
                kept[part.batch, part.heads] += selection.kept_pairs()
            del words, selection  # so that two chunks' bits are never held at once
    return kept


@_vec_attention.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, limit: Tensor, kind: str, pool: int, block: int, tile: int,
      group: int, scope: str, causal: bool, scale: float, chunk: int, count: bool, backend: str,
      ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    shape = (query.shape[0], query.shape[1]) if count else (0, 0)
    return (*_outputs(query), query.new_empty(shape, dtype=torch.int64))


def _alpha(query: Tensor, key: Tensor, limit: Tensor, kind: str, rule: Rule) -> Tensor:
    """float32 [B, H]: the cut-off of a threshold, or the one that reaches a coverage or a density, or itself."""
    if kind == "alpha":
        return limit
    if kind == "threshold":
        return checks.alpha(limit, query.shape[0], query.shape[1], query.device)
    return targets.alpha_for(query, key, checks.values(limit, kind), kind, rule)


@contextlib.contextmanager
def _memory(name: str, problem: Problem, advice: Callable[[int], str]) -> Iterator[None]:
    """Where a GPU runs out of memory, say what the function of this name needs: ``advice`` of the free bytes."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        first = str(error).partition("\n")[0]  # kept in front, since callers look for its words
        traceback.clear_frames(error.__traceback__)  # what the call held until then is free as well
        raise torch.OutOfMemoryError(f"{first} In {name} {advice(machine.free_memory(problem.device))}") from error


def _own_dtypes(query: Tensor) -> contextlib.AbstractContextManager[object]:
    """Autocast off: a backend's float32 accumulation stays float32 in a model that runs under autocast."""
    kind = query.device.type
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else contextlib.nullcontext()


def _outputs(query: Tensor) -> tuple[Tensor, Tensor]:
    """Contiguous out [B, H, Sq, D] and lse float32 [B, H, Sq], unwritten."""
    out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    return out, torch.empty(query.shape[:3], dtype=torch.float32, device=query.device)
