"""Hears what a diffusers pipeline announces of itself: the guidance branch, the step, the end of a generation.

`cache_context` tells its name and step to every stateful hook below the transformer. Ours sits on an attention
processor of our own, so that no forward of the model's modules is replaced.
"""

from __future__ import annotations

from typing import Any, Protocol

from diffusers.hooks.hooks import BaseState, HookRegistry, ModelHook, StateManager
from torch import nn

from vecattention.integrations.steps import Place

NAME = "vecattention"


class Listener(Protocol):
    """Wants to know where a generation stands."""

    def announced(self, place: Place | None) -> None: ...


class _Ear(StateManager):
    """A state manager that keeps no state and passes on the context it is given."""

    def __init__(self, listener: Listener) -> None:
        super().__init__(BaseState)  # type: ignore[arg-type]  # it is called to make a state
        self._listener = listener

    def set_context(self, context: Any) -> None:
        super().set_context(context)
        self._listener.announced(None if context is None else place_of(context))


class Announcements(ModelHook):
    """The hook: stateful, so that contexts reach it; it changes no forward."""

    _is_stateful = True

    def __init__(self, listener: Listener) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.ear = _Ear(listener)

    def reset_state(self, module: nn.Module) -> nn.Module:
        """Nothing is carried from one generation to the next."""
        return module


def place_of(context: Any) -> Place:
    """The `Place` of a diffusers CacheContext."""
    return Place(context.name, context.step_index, context.num_inference_steps)


def listen(transformer: nn.Module, own: nn.Module, listener: Listener) -> None:
    """Let announcements to a transformer reach a listener, by a hook on ``own``, a module of ours inside of it."""
    HookRegistry.check_if_exists_or_initialize(own).register_hook(Announcements(listener), NAME)
    refresh(transformer)


def refresh(transformer: nn.Module) -> None:
    """Let the transformer look for hooks anew; it keeps a list of them."""
    registry = getattr(transformer, "_diffusers_hook", None)
    if registry is not None:
        registry.invalidate_child_registries_cache()


class Clock:
    """Where the generation of a pipeline stands, by its scheduler: for pipelines that announce no step."""

    def __init__(self, pipeline: Any | None) -> None:
        self._pipeline = pipeline

    def complete(self, place: Place) -> Place:
        """The place with the step and the number of steps filled in, where the pipeline knows them."""
        scheduler = getattr(self._pipeline, "scheduler", None)
        if scheduler is None or (place.step is not None and place.steps is not None):
            return place
        step = getattr(scheduler, "step_index", None) if place.step is None else place.step
        steps = getattr(self._pipeline, "num_timesteps", None) if place.steps is None else place.steps
        begun = steps is not None  # a scheduler has no index before its first step
        return Place(place.branch, 0 if step is None and begun else step, steps)

    def guided(self) -> bool:
        """Whether the pipeline says that each step has an "uncond" branch."""
        return self._pipeline is not None and bool(getattr(self._pipeline, "do_classifier_free_guidance", False))
