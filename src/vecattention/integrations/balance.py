"""Which rank computes which heads: the costly ones apart."""

from __future__ import annotations

import torch
from torch import Tensor


def head_order(cost: Tensor, ranks: int) -> Tensor:
    """The order in which heads are dealt to ranks so that the costly ones do not share a rank.

    Greedy: the costliest head that is left goes to the rank with the least load among those that have room (longest
    processing time first, with as many heads for each rank). Everything stays on the device.

    Args:
        cost: [..., H], what each head costs, for instance its measured density; H a multiple of ``ranks``.
        ranks: number of ranks.

    Returns:
        int64 [..., H]: rank r computes the heads ``order[..., r H / ranks : (r + 1) H / ranks]``.

    Example:
        >>> import torch
        >>> head_order(torch.tensor([9, 8, 1, 2]), 2).tolist()
        [0, 2, 1, 3]
    """
    heads = cost.shape[-1]
    divides("cost", heads, ranks)
    sizes, dealt = cost.double().sort(dim=-1, descending=True, stable=True)
    load = sizes.new_zeros(*cost.shape[:-1], ranks)
    room = torch.full_like(load, heads // ranks)
    owner = torch.empty_like(dealt)
    for turn in range(heads):
        least = load.masked_fill(room == 0, torch.inf).argmin(dim=-1, keepdim=True)
        load.scatter_add_(-1, least, sizes[..., turn : turn + 1])
        room.scatter_add_(-1, least, torch.full_like(room[..., :1], -1))
        owner[..., turn : turn + 1] = least
    return dealt.gather(-1, owner.argsort(dim=-1, stable=True))


def imbalance(cost: Tensor, ranks: int, order: Tensor | None = None) -> float:
    """Load of the busiest rank over the mean load: 1.0 is perfect; without an order, heads lie as they come.

    Example:
        >>> import torch
        >>> imbalance(torch.tensor([3.0, 3.0, 1.0, 1.0]), 2), imbalance(
        ...     torch.tensor([3.0, 3.0, 1.0, 1.0]), 2, head_order(torch.tensor([3.0, 3.0, 1.0, 1.0]), 2))
        (1.5, 1.0)
    """
    divides("cost", cost.shape[0], ranks)
    loads = (cost if order is None else cost[order]).double().view(ranks, -1).sum(1)
    return float(loads.max() / loads.mean())


def divides(name: str, heads: int, ranks: int) -> None:
    """Refuse a number of ranks that does not divide the heads.

    Raises:
        ValueError: it does not.
    """
    if ranks < 1 or heads % ranks:
        raise ValueError(
            f"{name} has {heads} heads, wanted a multiple of the {ranks} ranks of group; use a number of ranks that "
            "divides the heads, or a ring, which splits no heads"
        )
