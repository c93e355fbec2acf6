"""Our processors in one transformer: put in, told what to do before each forward, and taken out again."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from diffusers.utils.torch_utils import get_module_execution_device
from torch import Tensor, nn

from vecattention.integrations.dit.announce import listen, refresh
from vecattention.integrations.dit.families import Family, family_of
from vecattention.integrations.dit.parallel import check_parallel, groups_of
from vecattention.integrations.dit.processors import Orders, SparseProcessor
from vecattention.integrations.dit.run import Run
from vecattention.integrations.exchange import size_of
from vecattention.integrations.steps import Place

COMPILED = (
    "vecattention reads the prompt's length before each forward, outside of the graph: use torch.compile(transformer) "
    "or compile_repeated_blocks instead of compile() in place, or fullgraph=False"
)
_switching = threading.RLock()


class Attachment:
    """What one transformer carries while any run is entered on it; the last run entered counts.

    Args:
        called: the module that the pipeline calls: the transformer, or what `torch.compile` made of it.
        transformer: the transformer.
    """

    def __init__(self, called: nn.Module, transformer: Any, family: Family) -> None:
        self._called = called
        self._transformer = transformer
        self._family = family
        self._names = family.names(transformer.config)
        self._runs: list[tuple[str, Run]] = []
        self._place: Place | None = None
        self._processors = self._install()
        listen(transformer, self._processors[0].ear, self)
        in_place = getattr(transformer, "_compiled_call_impl", None) is not None
        # In a graph compiled in place a hook would break the graph; announcements reach us without one.
        self._hook = None
        if family.joint or not in_place or called is not transformer:
            before = torch.compiler.disable(self._before, reason=COMPILED)
            self._hook = called.register_forward_pre_hook(before, with_kwargs=True)

    def enter(self, name: str, run: Run) -> None:
        """Follow a run from now on."""
        check_parallel(self._processors[0]._parallel_config, self._heads(), self._family.joint)
        self._runs.append((name, run))
        self._follow()

    def leave(self, run: Run) -> bool:
        """Follow the run before it again; true when there is none, so that the transformer is stock again."""
        self._runs = [(name, other) for name, other in self._runs if other is not run]
        if self._runs:
            self._follow()
            return False
        self._restore()
        return True

    def announced(self, place: Place | None) -> None:
        """Take note of where the generation stands, and tell the layers what to do there."""
        self._place = place
        if place is not None:
            self._tell(place)
        elif self._hook is None:
            self._tell_lost()

    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Before a forward: the place when nobody announced it, and the prompt lengths where text takes part."""
        if self._place is None:
            self._tell(Place())
        name, run = self._runs[-1]
        if self._family.joint and not run.settings[name].always_dense:
            lengths = prompt_lengths(_argument(self._transformer, "encoder_attention_mask", args, kwargs))
            for processor in self._processors:
                if processor.orders is not None:
                    processor.orders.lengths = lengths

    def _follow(self) -> None:
        name, run = self._runs[-1]
        for processor in self._processors:
            processor.way = run.way(name)
        if self._place is not None:
            self._tell(self._place)
        elif self._hook is None:
            self._tell_lost()

    def _tell(self, place: Place) -> None:
        name, run = self._runs[-1]
        device = get_module_execution_device(self._transformer)
        orders = run.orders(name, run.complete(place), len(self._names), self._heads(), device, self._ranks())
        for processor, order in zip(self._processors, orders, strict=True):
            processor.orders = order

    def _tell_lost(self) -> None:
        """Orders for a forward that nobody announces and no hook precedes; where it cannot be served it says why."""
        try:
            self._tell(Place())
        except ValueError as error:
            nothing = torch.zeros(0)
            for processor in self._processors:
                processor.orders = Orders(False, nothing, nothing, nothing, lost=str(error))

    def _ranks(self) -> int:
        """How many ranks share the heads."""
        ulysses = groups_of(self._processors[0]._parallel_config).ulysses
        return 1 if ulysses is None else size_of(ulysses)

    def _heads(self) -> int:
        return int(self._transformer.config.num_attention_heads)

    def _install(self) -> list[SparseProcessor]:
        stock = self._transformer.attn_processors
        for name in self._names:
            if type(stock[name]) is not self._family.stock:
                raise TypeError(
                    f"{name} is a {type(stock[name]).__name__}, wanted the stock {self._family.stock.__name__}; "
                    "restore it with set_attn_processor before apply"
                )
        ours = [self._family.processor(stock[name], self) for name in self._names]
        self._transformer.set_attn_processor({**stock, **dict(zip(self._names, ours, strict=True))})
        return ours

    def _restore(self) -> None:
        """Put the stock processors back where ours still are."""
        if self._hook is not None:
            self._hook.remove()
        now = self._transformer.attn_processors
        for name, ours in zip(self._names, self._processors, strict=True):
            if now[name] is ours:
                now[name] = ours.stock
        self._transformer.set_attn_processor(now)
        refresh(self._transformer)


@contextmanager
def attached(called: nn.Module, transformer: Any, name: str, run: Run) -> Iterator[None]:
    """Let a run decide about the attention of a transformer; restore it afterwards, also after an exception."""
    with _switching:
        attachment = _attachment(called, transformer)
        try:
            attachment.enter(name, run)
        except BaseException:
            attachment.leave(run)
            raise
    try:
        yield
    finally:
        with _switching:
            attachment.leave(run)


def prompt_lengths(mask: Tensor | None) -> tuple[int, ...]:
    """Real prompt tokens of each batch element, from a padding mask [B, text]; waits for the device once.

    Raises:
        ValueError: no mask, or one that is not ones followed by zeros.

    Example:
        >>> import torch
        >>> prompt_lengths(torch.tensor([[1, 1, 0], [1, 0, 0]]))
        (2, 1)
    """
    if not isinstance(mask, Tensor) or mask.ndim != 2:
        got = f"of shape {tuple(mask.shape)}" if isinstance(mask, Tensor) else repr(mask)
        raise ValueError(
            f"encoder_attention_mask is {got}, wanted a tensor [batch, prompt tokens]; pass the tokenizer's"
        )
    real = mask != 0
    end = (real * torch.arange(1, mask.shape[1] + 1, device=mask.device)).amax(1)
    counts, ends = torch.stack((real.sum(1), end)).tolist()
    for element, (count, last) in enumerate(zip(counts, ends, strict=True)):
        if count != last:
            raise ValueError(
                f"encoder_attention_mask[{element}] has {count} ones up to position {last}, wanted a prefix: all ones, "
                "then all zeros; pad prompts on the right"
            )
    return tuple(counts)


def _attachment(called: nn.Module, transformer: Any) -> Attachment:
    family = family_of(transformer)
    if family is None:
        raise TypeError(f"transformer is a {type(transformer).__name__}, wanted one that is served; see apply")
    first = transformer.attn_processors.get(family.names(transformer.config)[0])
    held = getattr(first, "attachment", None)
    return held if isinstance(held, Attachment) else Attachment(called, transformer, family)


def _argument(module: Any, name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """An argument of a forward, however it was passed."""
    if name in kwargs:
        return kwargs[name]
    parameters = list(inspect.signature(type(module).forward).parameters)[1:]
    place = parameters.index(name)
    return args[place] if place < len(args) else None
