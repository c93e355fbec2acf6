"""Show versions, the processor, the GPU, and which backends run here.

For each backend it says whether it runs an ordinary problem on this machine, and if not, why not.
"""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

import torch

from vecattention import dispatch, machine, ops
from vecattention.spec import Problem

EXAMPLE = "vecattention env"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `vecattention env`."""
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")


def run(args: argparse.Namespace) -> int:
    """Print the environment; 1 when no backend runs here."""
    facts = machine.facts()
    reasons = {name: dispatch.why_not(name, ordinary_problem()) for name in dispatch.BACKENDS}
    if args.json:
        sys.stdout.write(json.dumps(facts | {"backends": reasons}, indent=2) + "\n")
    else:
        sys.stdout.write("\n".join(_lines(facts, reasons)) + "\n")
    return 0 if any(not why for why in reasons.values()) else 1


def ordinary_problem() -> Problem:
    """What a caller would ask of this machine: bfloat16 on its GPU, or float32 on its processor."""
    gpu = torch.cuda.is_available()
    dtype, device = (torch.bfloat16, "cuda") if gpu else (torch.float32, "cpu")
    return Problem(1, 8, 2, 4096, 4096, 128, dtype, torch.device(device), ops.rule_of(128))


def _lines(facts: dict[str, Any], reasons: dict[str, tuple[str, ...]]) -> list[str]:
    problem, cpu = ordinary_problem(), facts["processor"]
    kind = str(problem.dtype).removeprefix("torch.")
    lines = ["versions"]
    lines += [f"  {name:<14}{version or 'not installed'}" for name, version in facts["versions"].items()]
    lines += [
        "machine",
        f"  {'system':<14}{facts['system']}",
        f"  {'processor':<14}{cpu['name']}, {cpu['cores']} cores, {cpu['capability']}, {cpu['threads']} torch threads",
        f"  {'memory':<14}{cpu['memory_gib']} GiB",
    ]
    gpus = [f"{g['name']}, compute capability {g['compute_capability']}, {g['memory_gib']} GiB" for g in facts["gpus"]]
    none = "none that torch sees" + ("" if facts["cuda"] else " (this torch is built without CUDA)")
    lines += [f"  {'GPU':<14}{gpu}" for gpu in gpus or [none]]
    lines.append(f"backends, for {kind} on {problem.device}, D={problem.head_dim}")
    lines += [f"  {name:<14}{'runs' if not why else 'does not: ' + '; '.join(why)}" for name, why in reasons.items()]
    return lines
