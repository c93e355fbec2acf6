"""From the parallel configuration of diffusers to process groups."""

from __future__ import annotations

from typing import Any

from vecattention.integrations.context_parallel import Groups


def groups_of(config: Any) -> Groups:
    """The `Groups` of what `enable_parallelism` put on a processor; none without context parallelism."""
    context = getattr(config, "context_parallel_config", None)
    if context is None:
        return Groups()
    ulysses = context._ulysses_mesh.get_group() if context.ulysses_degree > 1 else None
    ring = context._ring_mesh.get_group() if context.ring_degree > 1 else None
    return Groups(ulysses, ring)


def check_parallel(config: Any, heads: int, joint: bool) -> None:
    """Refuse a parallel configuration that cannot be served, before anything runs.

    Raises:
        ValueError: ranks that do not divide the heads, uneven shards, or a model with joint text and video.
    """
    context = getattr(config, "context_parallel_config", None)
    if context is None:
        return
    if joint:
        raise ValueError(
            "the transformer has context parallelism and joint text and video attention, wanted one GPU: diffusers "
            "has no plan to split this model; pass a transformer without enable_parallelism"
        )
    for name in ("ulysses_anything", "ring_anything"):
        if getattr(context, name, False):
            raise ValueError(
                f"{name} is True, wanted False: every rank must hold as many tokens; choose a resolution whose tokens "
                "the ranks divide"
            )
    if heads % context.ulysses_degree:
        raise ValueError(
            f"ulysses_degree is {context.ulysses_degree}, wanted a divisor of the {heads} attention heads; use a "
            "divisor, or ring_degree, which splits no heads"
        )
