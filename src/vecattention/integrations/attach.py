"""Switches the text part of a transformers model to our attention function, and back."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Protocol

from torch import nn
from transformers import PreTrainedModel

from vecattention.integrations.call import Call, Output

NAME = "vecattention"
ATTRIBUTE = "_vecattention"

_entered: ContextVar[tuple[Server, ...]] = ContextVar("vecattention_entered", default=())
_switching = threading.RLock()


class Server(Protocol):
    """Answers the attention calls of a model while it is attached to it."""

    def forward(self, call: Call) -> Output: ...


class Attachment:
    """The servers of one model, held by its attention modules while any of them is entered.

    Attributes:
        stock: the attention implementation that the model had before.
        modules: the attention modules.
        servers: who was attached, the last one last.
    """

    def __init__(self, stock: str, modules: list[nn.Module]) -> None:
        self.stock = stock
        self.modules = modules
        self.servers: tuple[Server, ...] = ()

    def active(self) -> Server | None:
        """The innermost server that the caller's context entered; without one, the last that anybody entered.

        So each thread that enters `apply` itself gets its own, and a thread that only calls a switched model (a
        generation that streams from a worker thread) gets the one that switched it.
        """
        for server in reversed(_entered.get()):
            if server in self.servers:
                return server
        return self.servers[-1] if self.servers else None

    def __deepcopy__(self, memo: object) -> Attachment:
        """A copy of a switched model is switched as well, by the same servers."""
        return self


def attachment_of(module: nn.Module) -> Attachment | None:
    """What answers for an attention module, or None when nothing was attached to its model."""
    found = getattr(module, ATTRIBUTE, None)
    return found if isinstance(found, Attachment) else None


def text_model_of(model: object) -> tuple[PreTrainedModel, PreTrainedModel]:
    """(the whole transformers model, the part of it whose attention reads text and vision tokens).

    Takes a model, a transformers pipeline, or a module that wraps one.

    Raises:
        TypeError: no transformers model, or one without a text part.
    """
    found = model if isinstance(model, nn.Module) else getattr(model, "model", None)
    modules = found.modules() if isinstance(found, nn.Module) else iter(())
    whole = next((m for m in modules if isinstance(m, PreTrainedModel)), None)
    if whole is None:
        raise TypeError(
            f"model_or_pipeline is a {type(model).__name__}, wanted a transformers model, a pipeline of one or a "
            "module that wraps one; call vecattention.vec_attention in your own attention instead"
        )
    config = whole.config.get_text_config()
    for part in whole.modules():
        if isinstance(part, PreTrainedModel) and part.config is config:
            return whole, part
    raise TypeError(
        f"model_or_pipeline is a {type(whole).__name__} without a part for its {type(config).__name__}, wanted a model "
        "that reads text; pass that part itself"
    )


@contextmanager
def attached(model: PreTrainedModel, server: Server) -> Iterator[None]:
    """Let a server answer the attention calls of a (text) model; restore it afterwards, also after an exception.

    Raises:
        TypeError: the model's attention does not go through `transformers.AttentionInterface`.
    """
    with _switching:
        attachment = _attach(model)
        attachment.servers += (server,)
    _entered.set((*_entered.get(), server))
    try:
        yield
    finally:
        _entered.set(_without(_entered.get(), server))
        with _switching:
            attachment.servers = _without(attachment.servers, server)
            if not attachment.servers:
                _detach(model, attachment)


def _attach(model: PreTrainedModel) -> Attachment:
    modules = [m for m in model.modules() if _asks_interface(m, model.config)]
    held = attachment_of(modules[0]) if modules else None
    if held is not None:
        return held
    attachment = Attachment(model.config._attn_implementation, modules)
    if modules and attachment.stock != NAME:
        model.set_attn_implementation(NAME)
    if not modules or model.config._attn_implementation != NAME:
        raise TypeError(
            f"model_or_pipeline holds a {type(model).__name__}, wanted a model whose attention goes through "
            "transformers.AttentionInterface; update transformers or the model's own code"
        )
    for module in modules:
        setattr(module, ATTRIBUTE, attachment)
    return attachment


def _detach(model: PreTrainedModel, attachment: Attachment) -> None:
    for module in attachment.modules:
        if attachment_of(module) is attachment:
            delattr(module, ATTRIBUTE)
    if model.config._attn_implementation != attachment.stock:
        model.set_attn_implementation(attachment.stock)


def _asks_interface(module: nn.Module, config: object) -> bool:
    """Whether a module looks its attention function up in the text config."""
    return getattr(module, "config", None) is config and not isinstance(module, PreTrainedModel)


def _without(servers: tuple[Server, ...], server: Server) -> tuple[Server, ...]:
    return tuple(other for other in servers if other is not server)
