"""The transformers that are served, and where their self-attention sits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from diffusers import HunyuanVideoTransformer3DModel, WanTransformer3DModel
from diffusers.models.transformers.transformer_hunyuan_video import HunyuanVideoAttnProcessor2_0
from diffusers.models.transformers.transformer_wan import WanAttnProcessor
from torch import nn

from vecattention.integrations.dit.processors import HunyuanVideoProcessor, SparseProcessor, WanProcessor
from vecattention.spec import HEAD_DIMS


@dataclass(frozen=True)
class Family:
    """A class of transformers.

    Attributes:
        model: the class.
        stock: class of the processors that are replaced.
        processor: class of ours.
        joint: whether prompt tokens take part in self-attention.
        names: keys of `attn_processors` of the layers in order, from a config.
    """

    model: type[Any]
    stock: type[Any]
    processor: type[SparseProcessor]
    joint: bool
    names: Callable[[Any], list[str]]


def _wan(config: Any) -> list[str]:
    return [f"blocks.{i}.attn1.processor" for i in range(config.num_layers)]


def _hunyuan(config: Any) -> list[str]:
    double = [f"transformer_blocks.{i}.attn.processor" for i in range(config.num_layers)]
    return double + [f"single_transformer_blocks.{i}.attn.processor" for i in range(config.num_single_layers)]


FAMILIES = (
    Family(WanTransformer3DModel, WanAttnProcessor, WanProcessor, False, _wan),
    Family(HunyuanVideoTransformer3DModel, HunyuanVideoAttnProcessor2_0, HunyuanVideoProcessor, True, _hunyuan),
)
SERVED = " or ".join(family.model.__name__ for family in FAMILIES)


def family_of(transformer: object) -> Family | None:
    """The family of a transformer, None when it is not served."""
    return next((family for family in FAMILIES if isinstance(transformer, family.model)), None)


def transformers_of(model_or_pipeline: object) -> dict[str, tuple[nn.Module, Any]]:
    """The served transformers in a pipeline or module: name -> (the module that is called, the transformer in it).

    The two differ where `torch.compile` or another module wraps the transformer.

    Raises:
        TypeError: none is in it.
        ValueError: its heads are of a size that sparse attention does not serve.
    """
    components = getattr(model_or_pipeline, "components", None)
    parts: dict[str, Any] = components if isinstance(components, dict) else {"transformer": model_or_pipeline}
    found: dict[str, tuple[nn.Module, Any]] = {}
    for name, part in parts.items():
        for inner in part.modules() if isinstance(part, nn.Module) else ():
            if family_of(inner) is not None:
                found[name] = (part, inner)
                break
    if not found:
        raise TypeError(_unserved(model_or_pipeline, parts))
    for name, (_, inner) in found.items():
        size = inner.config.attention_head_dim
        if size not in HEAD_DIMS:
            raise ValueError(
                f"{name} has attention_head_dim {size}, wanted one of {HEAD_DIMS}; sparse attention does not serve it"
            )
    return found


def _unserved(given: object, parts: dict[str, Any]) -> str:
    held = sorted({type(part).__name__ for name, part in parts.items() if "transformer" in name and part is not None})
    what = f"a {type(given).__name__}" + (f" with {', '.join(held)}" if given not in parts.values() and held else "")
    return (
        f"model_or_pipeline is {what}, wanted a {SERVED}, or a pipeline with one; call vecattention.vec_attention in "
        "an attention processor of your own instead"
    )
