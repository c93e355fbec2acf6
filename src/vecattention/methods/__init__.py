"""Published ways to choose keys, all of them selectors over the one `vecattention.attend`.

    names()                                                   "full", "vecattention", "flexprefill", ...
    get(name).select(query, key, causal=..., **parameters)    -> Selection
    attention(name, query, key, value, causal=..., ...)       -> output, the same followed by `attend`

Each method's module states its equation, its parameters and its source.
"""

from __future__ import annotations

from torch import Tensor

from vecattention import checks, ops
from vecattention.methods import anchor, flexprefill, full, svg, vec, xattention
from vecattention.methods.method import Knob, Method

__all__ = ["Knob", "Method", "attention", "get", "names"]

_METHODS: dict[str, Method] = {
    module.METHOD.name: module.METHOD for module in (full, vec, flexprefill, xattention, anchor, svg)
}


def names() -> tuple[str, ...]:
    """The names of all methods.

    >>> names()
    ('full', 'vecattention', 'flexprefill', 'xattention', 'anchorattention', 'svg')
    """
    return tuple(_METHODS)


def get(name: str) -> Method:
    """The method of this name.

    Raises:
        ValueError: there is none.

    Example:
        >>> get("xattention").parameters["stride"]
        16
    """
    if name not in _METHODS:
        raise ValueError(f"name is {name!r}, wanted one of {names()}; correct it")
    return _METHODS[name]


def attention(
    name: str,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    causal: bool,
    scale: float | None = None,
    return_lse: bool = False,
    backend: str = "auto",
    **parameters: object,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention by a method: its selection, then `vecattention.attend`.

    Args:
        name: of the method, one of `names`.
        query: [B, H, Sq, D].
        key, value: [B, Hkv, Sk, D].
        causal, scale: as in `Method.select`.
        return_lse, backend: as in `vecattention.attend`.
        **parameters: of the method.

    Returns:
        [B, H, Sq, D] in the input dtype; with return_lse also the log-sum-exp, float32 [B, H, Sq].

    Raises:
        TypeError, ValueError: as `Method.select` and `vecattention.attend`.

    Example:
        >>> import torch
        >>> query, key, value = torch.randn(1, 4, 600, 64), torch.randn(1, 2, 600, 64), torch.randn(1, 2, 600, 64)
        >>> attention("flexprefill", query, key, value, causal=True, gamma=0.7).shape
        torch.Size([1, 4, 600, 64])
    """
    method = get(name)
    checks.tensors(causal, query=query, key=key, value=value)
    if method.takes_value:
        parameters = {"value": value} | parameters
    if "backend" in method.parameters:
        parameters = {"backend": backend} | parameters
    selection = method.select(query, key, causal=causal, scale=scale, **parameters)
    return ops.attend(query, key, value, selection, scale=scale, return_lse=return_lse, backend=backend)
