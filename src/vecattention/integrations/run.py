"""A run: one use of `vecattention.apply`, from the moment the model is switched to the moment it is restored."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Protocol

import torch
from torch import nn
from transformers import PreTrainedModel

from vecattention.integrations.call import Call, Output
from vecattention.integrations.serve import dense_pairs, serve, why_dense
from vecattention.integrations.settings import AUTO, Settings
from vecattention.integrations.stats import Counts, LayerStats, Stats
from vecattention.integrations.vision import Span, VisionSpans

NAME = "vecattention"
ATTRIBUTE = "_vecattention"
NO_IDS = "vision_span is 'auto' and this forward had no input_ids; pass them, or (start, end)"
DECODING = "one-token decoding stays dense, by design: there is nothing to gain"

logger = logging.getLogger(__name__)
_entered: ContextVar[tuple[Server, ...]] = ContextVar("vecattention_entered", default=())
_switching = threading.RLock()


class Server(Protocol):
    """Answers the attention calls of a model while it is attached to it."""

    def forward(self, call: Call) -> Output: ...


class Run:
    """One use of `vecattention.apply`; made by it.

    Attributes:
        settings: what was asked for, checked and completed.
    """

    def __init__(self, settings: Settings, vision: VisionSpans | None = None, count: bool = True) -> None:
        self.settings = settings
        self._vision = vision
        self._count = count
        self._counts = Counts()

    @property
    def stats(self) -> Stats:
        """What was computed until now, per layer and head; reading it waits for the device."""
        return self._counts.read()

    def __str__(self) -> str:
        return str(self.stats)

    def forward(self, call: Call) -> Output:
        """Answer one attention call, sparsely where that is right."""
        if call.decoding:
            self._decoded(call)
            return call.dense()
        reason = why_dense(call, self.settings)
        vision = None if reason else self._spans(call)
        if isinstance(vision, str):
            reason = vision
        if reason is None and not isinstance(vision, str):
            answer = serve(call, self.settings, vision, self._count)
            if not isinstance(answer, str):
                self._add(call, answer[1])
                return answer[0], None
            reason = answer
        return self._dense(call, str(reason))

    def _spans(self, call: Call) -> list[Span] | str | None:
        asked, batch = self.settings.vision, call.query.shape[0]
        if asked is None or asked == AUTO and self._vision is None:
            return None
        if isinstance(asked, tuple):
            return [asked] * batch
        found = self._vision.spans() if self._vision is not None else None
        return NO_IDS if found is None or len(found) != batch else found

    def _dense(self, call: Call, reason: str) -> Output:
        if self._counts.note(reason):
            logger.warning("vecattention: attention stays dense in %s: %s", type(call.module).__name__, reason)
        if call.causal and self._count:
            self._add(call, LayerStats(_nothing(call), dense_pairs=dense_pairs(call), dense_calls=1))
        return call.dense()

    def _decoded(self, call: Call) -> None:
        if self._counts.note(DECODING):
            logger.info("vecattention: %s", DECODING)
        if self._count:
            self._add(call, LayerStats(_nothing(call), decode_calls=1))

    def _add(self, call: Call, more: LayerStats) -> None:
        if call.layer is not None and self._count:
            self._counts.add(call.layer, more)


class Attachment:
    """The servers of one model, held by its attention modules while any of them is entered."""

    def __init__(self, original: str, modules: list[nn.Module]) -> None:
        self.original = original
        self.modules = modules
        self.servers: tuple[Server, ...] = ()

    def active(self) -> Server | None:
        """The innermost server that the caller's context entered; without one, the last that anybody entered.

        So each thread that enters `apply` itself gets its own, and a thread that only calls a switched model (a
        generation that streams from a worker thread) gets the one that switched it.
        """
        for server in reversed(_entered.get()):
            if any(server is mine for mine in self.servers):
                return server
        return self.servers[-1] if self.servers else None


def server_of(module: nn.Module) -> Server | None:
    """The server that answers for an attention module, or None when nobody attached one."""
    attachment = getattr(module, ATTRIBUTE, None)
    return attachment.active() if isinstance(attachment, Attachment) else None


def text_model_of(model: object) -> tuple[PreTrainedModel, PreTrainedModel]:
    """(the whole transformers model, the part of it whose attention reads text and vision tokens).

    Takes a model, a transformers pipeline, or a module that wraps one.

    Raises:
        TypeError: no transformers model, or one without a text part.
    """
    found = getattr(model, "model", model) if not isinstance(model, nn.Module) else model
    modules = found.modules() if isinstance(found, nn.Module) else iter(())
    whole = next((m for m in modules if isinstance(m, PreTrainedModel)), None)
    if whole is None:
        raise TypeError(
            f"model_or_pipeline is a {type(model).__name__}, wanted a transformers model, a pipeline of one or a module "
            "that wraps one; call vecattention.vec_attention in your own attention instead"
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
    """Let a server answer the attention calls of a (text) model; restore it afterwards, also after an exception."""
    with _switching:
        attachment = _attach(model)
        attachment.servers += (server,)
    _entered.set((*_entered.get(), server))
    try:
        yield
    finally:
        _entered.set(tuple(other for other in _entered.get() if other is not server))
        with _switching:
            attachment.servers = tuple(other for other in attachment.servers if other is not server)
            if not attachment.servers:
                _detach(model, attachment)


def _attach(model: PreTrainedModel) -> Attachment:
    modules = [m for m in model.modules() if _asks_interface(m, model.config)]
    if not modules:
        raise TypeError(_unserved(model))
    held = getattr(modules[0], ATTRIBUTE, None)
    if isinstance(held, Attachment):
        return held
    attachment = Attachment(model.config._attn_implementation, modules)
    if attachment.original != NAME:
        model.set_attn_implementation(NAME)
        if model.config._attn_implementation != NAME:
            raise TypeError(_unserved(model))
    for module in modules:
        setattr(module, ATTRIBUTE, attachment)
    return attachment


def _detach(model: PreTrainedModel, attachment: Attachment) -> None:
    for module in attachment.modules:
        if getattr(module, ATTRIBUTE, None) is attachment:
            delattr(module, ATTRIBUTE)
    if model.config._attn_implementation != attachment.original:
        model.set_attn_implementation(attachment.original)


def _asks_interface(module: nn.Module, config: object) -> bool:
    """Whether a module looks its attention function up in the text config."""
    return getattr(module, "config", None) is config and not isinstance(module, PreTrainedModel)


def _unserved(model: PreTrainedModel) -> str:
    return (
        f"model_or_pipeline holds a {type(model).__name__}, wanted a model whose attention goes through "
        "transformers.AttentionInterface; update transformers or the model's own code"
    )


def _nothing(call: Call) -> torch.Tensor:
    return torch.zeros(call.query.shape[1], dtype=torch.int64, device=call.query.device)


