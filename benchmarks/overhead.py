"""What `vecattention.apply` costs a model whose calls it leaves dense: python benchmarks/overhead.py OUT.jsonl

Layers as wide as those of Qwen2.5-VL-7B, with random weights, read prompts that are too short to be sparse, and decode
one token after a prompt: the model as it is and under `apply`, in turns. Milliseconds of a whole forward, with what the
host takes; where the GPU waits for the host, all that `apply` adds shows.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import random
import statistics
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

import vecattention
from vecattention.bench import record, timer

WIDE = {"hidden_size": 3584, "intermediate_size": 18944, "num_attention_heads": 28, "num_key_value_heads": 4}
NARROW = {"hidden_size": 256, "intermediate_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1}
LONG = 10**9
"""min_length under which every call is too short."""


def model_of(shape: dict[str, int], layers: int, device: str) -> Qwen2_5_VLForConditionalGeneration:
    """A Qwen2.5-VL of so many layers with random weights; its vision tower is as small as can be and is not used."""
    tower = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 1, "out_hidden_size": 16}
    config = Qwen2_5_VLConfig(
        text_config=shape | {"num_hidden_layers": layers, "vocab_size": 1024, "bos_token_id": 0, "eos_token_id": 0},
        vision_config=tower,
    )
    torch.manual_seed(0)
    with torch.device(device):
        model = Qwen2_5_VLForConditionalGeneration(config)
    return model.to(torch.bfloat16 if device == "cuda" else torch.float32).eval()


def forward_of(model: Qwen2_5_VLForConditionalGeneration, tokens: int, decoding: bool) -> Callable[[], object]:
    """A forward over a prompt of so many tokens, or over one token after it."""
    ids = torch.randint(1024, (1, tokens), device=model.device)
    if not decoding:
        return partial(model, input_ids=ids, use_cache=False, logits_to_keep=1)
    cache = model(input_ids=ids, use_cache=True, logits_to_keep=1).past_key_values

    def decode() -> None:
        model(input_ids=ids[:, :1], past_key_values=cache, use_cache=True)
        cache.crop(-1)

    return decode


@torch.no_grad()
def measure(model: Qwen2_5_VLForConditionalGeneration, tokens: int, decoding: bool, rounds: int,
            ms: float) -> list[record.Record]:  # fmt: skip
    """A record of the model as it is and one of it under `apply`: medians of the rounds."""
    call, device = forward_of(model, tokens, decoding), model.device.type
    times: dict[bool, list[float]] = {False: [], True: []}
    for _ in range(rounds):
        for applied in random.sample((False, True), 2):
            with vecattention.apply(model, min_length=LONG) if applied else contextlib.nullcontext() as run:
                times[applied].append(timer.measure(call, ms, device).median)
                if run is not None and run.stats.sparse_calls:
                    raise RuntimeError("a call was sparse, wanted dense ones alone; raise LONG")
    layers = model.config.get_text_config().num_hidden_layers
    of = "1 token after" if decoding else "prompt of"
    ratios = sorted(under / plain for plain, under in zip(times[False], times[True], strict=True))
    share = {"ratio": round(statistics.median(ratios), 4), "ratio_q1": round(ratios[len(ratios) // 4], 4),
             "ratio_q3": round(ratios[-1 - len(ratios) // 4], 4)}  # fmt: skip
    return [
        {"study": "trials", "run": 1, "case": f"{layers} layers of qwen2.5-vl", "of": f"{of} {tokens} tokens",
         "variant": "under apply" if applied else "as it is", "ms": round(statistics.median(times[applied]), 4),
         "rounds": rounds, **(share if applied else {})}
        for applied in (False, True)
    ]  # fmt: skip


def main() -> None:
    """Measure what the record does not hold yet."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--tokens", nargs="*", type=int, default=[64, 256, 512, 1024, 2048, 4096, 8000])
    parser.add_argument("--layers", type=int, default=8, help="(%(default)s)")
    parser.add_argument("--rounds", type=int, default=21, help="(%(default)s)")
    parser.add_argument("--ms", type=float, default=50.0, help="that each measurement takes about (%(default)s)")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"), help="cpu: narrow layers (%(default)s)")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("torch sees no CUDA device; pass --device cpu to measure this host with narrow layers")
    logging.getLogger("vecattention").setLevel(logging.ERROR)  # that calls stay dense is what is wanted here
    model = model_of(WIDE if args.device == "cuda" else NARROW, args.layers, args.device)
    steps: list[record.Step] = []
    for tokens, decoding in [*((n, False) for n in args.tokens), (4096, True)]:
        asked = {"tokens": tokens, "decoding": decoding, "layers": args.layers, "rounds": args.rounds, "ms": args.ms}
        key = {"study": "overhead", **asked, "device": args.device}
        steps.append((key, partial(measure, model, tokens, decoding, args.rounds, args.ms)))
    for row in record.run(args.out, steps):
        if "failed" in row:
            sys.stdout.write(f"{row['key']}: {row['failed']}\n")
            continue
        share = ""
        if "ratio" in row:
            share = f"  {row['ratio']:.3f} times as long ({row['ratio_q1']:.3f} to {row['ratio_q3']:.3f})"
        sys.stdout.write(f"{row['case']}, {row['of']:<26} {row['variant']:<12} {row['ms']:9.3f} ms{share}\n")


if __name__ == "__main__":
    main()
