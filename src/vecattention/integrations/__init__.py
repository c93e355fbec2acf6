"""Sparse attention in models of other libraries. Nothing of theirs is imported before it is used."""

from __future__ import annotations

import importlib
import inspect
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

from vecattention.integrations.arrival import when_imported

if TYPE_CHECKING:
    from vecattention.integrations.run import Run

HOMES = {
    "transformers": "vecattention.integrations.transformers",
    "diffusers": "vecattention.integrations.diffusers",
}
"""Libraries whose models are served, and the module that serves them: its ``apply`` takes the model and keywords."""

__all__ = ["apply", "register"]


def apply(model_or_pipeline: object, **arguments: Any) -> AbstractContextManager[Run]:
    """Run a model with sparse attention: a context manager that switches the model, and restores it on exit.

    In a transformers model (Qwen2.5-VL, Qwen3-VL, InternVL, LLaVA-OneVision, Llama, Qwen and others whose attention
    goes through `transformers.AttentionInterface`) the text part's causal attention is switched, vision towers are not
    touched. Prefill is sparse, whole or in chunks, with any batch and left or right padding; one-token decoding is
    dense, and a call of more than one token is prefill. What cannot be served (other masks, cross-attention, training,
    short sequences) stays dense, as the model had it before (by torch's SDPA in place of a flash kernel), and is logged
    once per run with the reason. The switch is the model's: every thread that calls the model meanwhile gets it, unless
    that thread entered an `apply` of its own. Nested uses: the innermost counts.

    In a pipeline or transformer of diffusers (Wan, HunyuanVideo) the self-attention of the video tokens is switched,
    non-causal; cross-attention and image branches are not touched. The first steps and layers stay dense. In
    HunyuanVideo video rows attend video and real prompt keys, and prompt rows stay dense. The step and the guidance
    branch are those that the pipeline announces.

    Args:
        model_or_pipeline: a model of transformers or diffusers, a pipeline of one, or a module that wraps one.
        threshold: as in `vecattention.select`, for every layer. Where nothing else is given: 0.9 in transformers
            models, in pipelines a coverage of 0.9 for each head.
        coverage, density: diffusers only, instead of a threshold: as in `vecattention.select`.
        table: a `ThresholdTable`, instead; its settings are used, and others are refused.
        q_pooling_size, q_block_size, k_local_size, group_k_block, max_scope, chunk_size, backend: as in
            `vecattention.vec_attention`; pipelines take q_block_size=128, q_pooling_size=32 and, unless group_k_block
            asks for a window, max_scope="row" where nothing else is given.
        min_length: calls with fewer keys stay dense. None: the length from which on sparse calls at half density are
            faster on this GPU for so many and such heads, where its shipped profile knows it (`vecattention.profile`),
            else what can gain: 2 * q_pooling_size + 1 in causal models, below which each block's first and own keys
            are all there is.
        vision_span: None makes all rows sparse, text included. (start, end) in token positions, or "auto" to find
            them from input_ids, is the published way for video understanding: rows before and after the span of the
            vision tokens stay dense, rows inside attend sparsely.

    Returns:
        A context manager that yields a run; ``run.stats`` tells density, calls and time per layer and head (on a GPU
        dense calls of fewer than 1,024 keys are not timed), and ``print(run)`` shows them; with diffusers
        ``run.branches`` tells them per guidance branch. Counting does not wait for the device, reading does.

    Raises:
        TypeError: not such a model, or an argument that does not exist.
        ValueError: an argument outside its values, or a table that does not fit the model.

    Example:
        >>> import torch, vecattention
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> config = LlamaConfig(vocab_size=99, hidden_size=32, intermediate_size=32, num_hidden_layers=2,
        ...                      num_attention_heads=2, num_key_value_heads=1)
        >>> model = LlamaForCausalLM(config).eval()
        >>> with torch.no_grad(), vecattention.apply(model, threshold=0.8) as run:
        ...     logits = model(torch.randint(99, (1, 300))).logits
        >>> run.stats.density.shape, run.stats.sparse_calls
        (torch.Size([2, 2]), 2)
    """
    home = _home(model_or_pipeline)
    known = tuple(inspect.signature(home.apply).parameters)[1:]
    unknown = sorted(set(arguments) - set(known))
    if unknown:
        raise TypeError(f"apply got {unknown}, wanted names among {known}; correct or leave out the others")
    context: AbstractContextManager[Run] = home.apply(model_or_pipeline, **arguments)
    return context


def register() -> None:
    """Make the name "vecattention" known to transformers, which this imports.

    Afterwards ``from_pretrained(path, attn_implementation={"text_config": "vecattention"})`` works. This happens by
    itself when both libraries are imported, in either order; call it to see why, should the name be unknown.

    Raises:
        ImportError: transformers is missing or too old.

    Example:
        >>> import vecattention
        >>> vecattention.register()
        >>> from transformers import AttentionInterface
        >>> "vecattention" in AttentionInterface()
        True
    """
    importlib.import_module(HOMES["transformers"])  # which registers as it is imported


def _home(model: object) -> Any:
    """The module that serves models of this kind, told by the libraries that its class and its parts come from."""
    kinds = [type(model), *(type(part) for part in _parts(model))]
    libraries = [kind.__module__.partition(".")[0] for outer in kinds for kind in outer.__mro__]
    for library in libraries:
        if library in HOMES:
            return importlib.import_module(HOMES[library])
    raise TypeError(
        f"model_or_pipeline is a {type(model).__name__}, wanted a model or pipeline of {' or '.join(HOMES)}, or a "
        "module that wraps one; call vecattention.vec_attention in your own attention instead"
    )


def _parts(model: object) -> list[object]:
    modules = getattr(model, "modules", None)
    return list(modules()) if callable(modules) and not isinstance(model, type) else []


when_imported("transformers.modeling_utils", register)
