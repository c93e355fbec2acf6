"""One layer of Wan 2.1 14B and HunyuanVideo in their real sizes, dense and sparse: python benchmarks/video_layers.py

The real transformer classes with random weights: one layer (HunyuanVideo: one of each kind) and everything around it,
at 720p. Times are those of a whole forward, dense through the stock processors by the fastest of torch's attention
kernels, which the record names, and sparse through `vecattention.apply`; "attention" is what the run itself measured of
each layer's call. The threshold is found by bisection so that the run's own count gives the density asked for;
"coverage" is what a pipeline does when nothing is asked for. A model's step is its number of layers times the layer,
twice with guidance, and what is around it.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

import vecattention
from vecattention.bench import record, timer


@dataclass(frozen=True)
class Model:
    """A transformer's class and configuration, the inputs of one forward, its layers, and the published density."""

    kind: str
    config: dict[str, Any]
    latent: tuple[int, int, int, int]
    text: tuple[int, int]
    layers: int
    density: float


MODELS = {
    "wan2.1-14b-720p": Model(
        "wan",
        {"patch_size": (1, 2, 2), "num_attention_heads": 40, "attention_head_dim": 128, "in_channels": 16,
         "out_channels": 16, "text_dim": 4096, "freq_dim": 256, "ffn_dim": 13824, "num_layers": 1},
        (16, 21, 90, 160), (512, 4096), 40, 0.48,
    ),
    "hunyuanvideo-720p": Model(
        "hunyuan",
        {"in_channels": 16, "out_channels": 16, "num_attention_heads": 24, "attention_head_dim": 128, "num_layers": 1,
         "num_single_layers": 1, "num_refiner_layers": 2, "patch_size": 2, "patch_size_t": 1, "guidance_embeds": True,
         "text_embed_dim": 4096, "pooled_projection_dim": 768, "rope_axes_dim": (16, 56, 56)},
        (16, 33, 90, 160), (256, 4096), 60, 0.38,
    ),
    "tiny-wan": Model(
        "wan",
        {"patch_size": (1, 2, 2), "num_attention_heads": 2, "attention_head_dim": 32, "in_channels": 4,
         "out_channels": 4, "text_dim": 16, "freq_dim": 32, "ffn_dim": 64, "num_layers": 1},
        (4, 3, 32, 32), (8, 16), 2, 0.5,
    ),
    "tiny-hunyuan": Model(
        "hunyuan",
        {"in_channels": 4, "out_channels": 4, "num_attention_heads": 2, "attention_head_dim": 32, "num_layers": 1,
         "num_single_layers": 1, "num_refiner_layers": 1, "patch_size": 2, "patch_size_t": 1, "guidance_embeds": True,
         "text_embed_dim": 16, "pooled_projection_dim": 8, "rope_axes_dim": (8, 12, 12)},
        (4, 3, 32, 32), (8, 16), 2, 0.5,
    ),
}  # fmt: skip


def build(model: Model, device: str, dtype: torch.dtype) -> tuple[Any, dict[str, torch.Tensor]]:
    """The transformer with seeded random weights, and the inputs of one forward."""
    from diffusers import HunyuanVideoTransformer3DModel, WanTransformer3DModel

    torch.manual_seed(0)
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            kind = WanTransformer3DModel if model.kind == "wan" else HunyuanVideoTransformer3DModel
            transformer = kind(**model.config).eval()
    finally:
        torch.set_default_dtype(torch.float32)
    numbers = torch.Generator(device).manual_seed(1)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=numbers, device=device, dtype=dtype)

    count, width = model.text
    inputs = {"hidden_states": normal(1, *model.latent), "encoder_hidden_states": normal(1, count, width)}
    inputs["timestep"] = torch.full((1,), 500, device=device)
    if model.kind == "hunyuan":
        inputs["encoder_attention_mask"] = torch.ones(1, count, dtype=torch.bool, device=device)
        inputs["pooled_projections"] = normal(1, model.config["pooled_projection_dim"])
        inputs["guidance"] = torch.full((1,), 6000.0, device=device, dtype=dtype)
    return transformer, inputs


KERNELS = {
    "cudnn": [SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH],
    "flash": [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH],
}
"""torch's attention kernels by preference; the later ones take what the first does not, such as masks."""


def fastest(forward: Callable[[], object], device: str) -> tuple[str, dict[str, float]]:
    """The kernels of torch with which a dense forward is fastest, and its times."""
    found = {}
    for name, kernels in KERNELS.items():
        with sdpa_kernel(kernels, set_priority=True):
            found[name] = timer.measure(forward, device=device).record()
    best = min(found, key=lambda name: found[name]["ms"])
    return best, found[best]


@torch.no_grad()
def measure(name: str, device: str, pool: int, block: int) -> record.Record:
    """Time of a forward, dense and sparse, and of its attention."""
    model, dtype = MODELS[name], torch.float32 if device == "cpu" else torch.bfloat16
    transformer, inputs = build(model, device, dtype)
    rule = {"q_pooling_size": pool, "q_block_size": block, "dense_steps": 0, "min_length": 0}

    def forward() -> torch.Tensor:
        out: torch.Tensor = transformer(**inputs, return_dict=False)[0]
        return out

    def run(**limit: Any) -> tuple[float, dict[str, float], float, torch.Tensor]:
        """(density, times of a forward, milliseconds of attention a forward, its output)."""
        with vecattention.apply(transformer, **rule, **limit):
            out = forward()  # whose kernels may have to be compiled, which is not to be counted
        with vecattention.apply(transformer, **rule, **limit) as found:
            times = timer.measure(forward, device=device).record()
        stats = found.stats
        return stats.mean_density, times, 1e3 * stats.seconds * len(stats.layers) / stats.calls, out

    theta = threshold_for(transformer, forward, rule, model.density)
    dense_out = forward()
    kernel, dense = fastest(forward, device)
    with sdpa_kernel(KERNELS[kernel], set_priority=True):
        _, _, dense_attention, _ = run(threshold=theta, dense_layers=1.0)
        reached, sparse, attention, out = run(threshold=theta)
    wanted, got = dense_out.double(), out.double()
    bare_density, bare, bare_attention, _ = run()
    return {
        "study": "layer", "case": name, "layers_of_model": model.layers, "pool": pool, "block": block,
        "asked": model.density, "density": reached, "threshold": theta, "dense_kernel": kernel, "dense": dense,
        "sparse": sparse,
        "ratio": round(dense["ms"] / sparse["ms"], 3), "attention_ms": round(attention, 3),
        "dense_attention_ms": round(dense_attention, 3),
        "coverage": {"density": bare_density, **bare, "attention_ms": round(bare_attention, 3)},
        "difference": float((got - wanted).norm() / wanted.norm()),
    }  # fmt: skip


def threshold_for(transformer: Any, forward: Callable[[], object], rule: dict[str, Any], density: float) -> float:
    """The threshold at which the run counts this density, by bisection of -ln(threshold)."""
    low, high, best = 0.0, 12.0, (1.0, math.inf)
    for _ in range(14):
        alpha = (low + high) / 2
        with vecattention.apply(transformer, threshold=math.exp(-alpha), **rule) as run:
            forward()
        reached = run.stats.mean_density
        if abs(reached - density) < abs(best[1] - density):
            best = (math.exp(-alpha), reached)
        if abs(reached - density) < 0.005:
            break
        low, high = (alpha, high) if reached < density else (low, alpha)
    return best[0]


def line(row: record.Record) -> str:
    """One record on one line."""
    if "failed" in row:
        return f"{row['key']['case']:<18} {row['failed']}"
    return (
        f"{row['case']:<18} P={row['pool']} R={row['block']} density {100 * row['density']:.1f} %  "
        f"forward {row['dense']['ms']:.2f} -> {row['sparse']['ms']:.2f} ms ({row['ratio']:.2f}x)  "
        f"attention {row['dense_attention_ms']:.2f} -> {row['attention_ms']:.2f} ms  "
        f"difference {row['difference']:.1e}  "
        f"coverage 0.9: {100 * row['coverage']['density']:.1f} %, {row['coverage']['ms']:.2f} ms"
    )


def main() -> None:
    """Measure what the record does not hold yet."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("out/video-layers.jsonl"), help="records (%(default)s)")
    parser.add_argument("--model", nargs="+", choices=MODELS, default=["wan2.1-14b-720p", "hunyuanvideo-720p"])
    parser.add_argument("--device", default="cuda", help="cpu: in float32, for the tiny ones (%(default)s)")
    args = parser.parse_args()
    steps: list[record.Step] = [
        ({"study": "layer", "case": name, "device": args.device, "pool": pool, "block": block},
         partial(measure, name, args.device, pool, block))
        for name in args.model
        for pool, block in ((64, 128), (32, 128))
    ]  # fmt: skip
    for row in record.run(args.out, steps):
        sys.stdout.write(line(row) + "\n")
        sys.stdout.flush()
    sys.stdout.write(f"records in {args.out}\n")


if __name__ == "__main__":
    main()
