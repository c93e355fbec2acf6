"""Say which backend would run a problem, why not the others, and how much workspace it takes.

Nothing is computed and nothing is allocated, so that any size and any device can be asked about.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys

import torch

from vecattention import checks, dispatch, ops
from vecattention.commands.rules import add_rule, rule_of, threshold_of
from vecattention.spec import Problem

EXAMPLE = "vecattention explain --shape 1,28,4,131072,131072,128 --dtype bf16 --device cuda"
DTYPES = {
    "bf16": torch.bfloat16, "bfloat16": torch.bfloat16, "fp16": torch.float16, "float16": torch.float16,
    "fp32": torch.float32, "float32": torch.float32, "fp64": torch.float64, "float64": torch.float64,
}  # fmt: skip
DIMENSIONS = "B,H,Hkv,Sq,Sk,D"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `vecattention explain`."""
    parser.add_argument(
        "--shape", required=True, metavar=DIMENSIONS, help="batch, query and key heads, lengths, head size"
    )
    parser.add_argument("--dtype", default="bf16", help=f"{', '.join(DTYPES)} (%(default)s)")
    parser.add_argument("--device", default="cuda", help="cuda, cuda:N, cpu or meta (%(default)s)")
    parser.add_argument(
        "--causal",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="whether row i sees only keys up to it (yes)",
    )
    parser.add_argument("--chunk-size", type=int, help="queries handled at once (as many as the workspace allows)")
    parser.add_argument("--backend", default="auto", help="auto, or a backend to ask about alone (%(default)s)")
    add_rule(parser)


def run(args: argparse.Namespace) -> int:
    """Print the explanation; 1 when no backend can run the problem."""
    problem = problem_of(args)
    checks.threshold(threshold_of(args), problem.batch, problem.heads)
    told = dispatch.explain(problem, args.backend, checks.chunk_size(args.chunk_size))
    sys.stdout.write(f"{told}\n")
    if problem.device.type == "cuda" and not torch.cuda.is_available():
        wanted = "9.0" if told.backend == "hopper" else "8.0 or newer"
        sys.stdout.write(
            f"note       torch sees no GPU here: this is the answer for one of compute capability {wanted}\n"
        )
        if told.backend == "hopper" and args.backend == "auto":
            sys.stdout.write("           on others from 8.0 on it is triton\n")
    return 0 if told.backend else 1


def problem_of(args: argparse.Namespace) -> Problem:
    """The problem that the options describe, checked as tensors of that kind would be.

    Raises:
        TypeError, ValueError: an option that does not fit, with what was wanted and what to do.
    """
    batch, heads, kv_heads, q_len, k_len, dim = _sizes(args.shape)
    if args.dtype not in DTYPES:
        raise ValueError(f"--dtype is {args.dtype!r}, wanted one of {', '.join(DTYPES)}; bf16 is what most models use")
    query = torch.empty(batch, heads, q_len, dim, dtype=DTYPES[args.dtype], device="meta")
    key = torch.empty(batch, kv_heads, k_len, dim, dtype=DTYPES[args.dtype], device="meta")
    checks.tensors(args.causal, query=query, key=key, value=key)
    rule = ops.rule_of(dim, causal=args.causal, **rule_of(args))
    return dataclasses.replace(Problem.of(query, key, rule), device=_device(args.device))


def _sizes(text: str) -> list[int]:
    sizes = text.replace(" ", "").split(",")
    if len(sizes) != 6 or not all(size.isdecimal() for size in sizes):
        raise ValueError(f"--shape is {text!r}, wanted six whole numbers {DIMENSIONS}; such as 1,28,4,4096,4096,128")
    return [int(size) for size in sizes]


def _device(text: str) -> torch.device:
    try:
        device = torch.device(text)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cuda", "cpu", "meta"):
        raise ValueError(f"--device is {text!r}, wanted cuda, cuda:N, cpu or meta; cuda needs no GPU to be here")
    return device
