"""Small calls of every kernel kind, for compute-sanitizer: it watches, this only calls, twice each.

    python benchmarks/sanitize.py                                    (once, so that Triton has compiled everything)
    compute-sanitizer --tool memcheck python benchmarks/sanitize.py
    compute-sanitizer --tool racecheck python benchmarks/sanitize.py
    compute-sanitizer --tool synccheck python benchmarks/sanitize.py

Exits with 1 where two equal calls differ. ``--device cpu`` tries the script where there is no GPU. ``--control`` calls
instead a small kernel of three roles that has no race, and exits with 1 where its result is wrong: what is reported of
it is the tool's own.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from typing import Any

import torch
from torch import Tensor

import vecattention

RULES = (
    {"q_pooling_size": 32, "q_block_size": 128},
    {"q_pooling_size": 64, "q_block_size": 128, "max_scope": "row"},
    {"q_pooling_size": 64, "q_block_size": 64},
)
LENGTHS = ((300, 556), (300, 557))  # keys of their own begin with a whole stretch of 16 keys, or within one
DIMS = (128, 64)
CONTROLS = {
    "alone": "that share nothing",
    "before": "that share nothing, after barriers among the warps of the first role alone",
    "barrier": "each with a barrier among its own warps",
    "handed": "of which one hands the others a number through shared memory, by an mbarrier",
}


def call(query: Tensor, key: Tensor, value: Tensor, rule: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """What is selected, and the attention over it."""
    selection = vecattention.select(query, key, threshold=0.5, **rule)
    return selection.words, vecattention.attend(query, key, value, selection)


def control(kind: str) -> int:
    """Three roles, each of which writes 128 numbers; the exit code. ``kind`` says what else they do: see CONTROLS."""
    from triton.experimental import gluon
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.language.nvidia.hopper import mbarrier

    barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier

    @gluon.jit
    def role(out, shared, ready, number: gl.constexpr, KIND: gl.constexpr):
        layout: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
        at = gl.arange(0, 128, layout)
        if KIND == "barrier":
            barrier()
        if KIND == "handed":
            if number == 2:
                shared.store(gl.full([1], 0, gl.int32, layout))
                mbarrier.arrive(ready)
            else:
                mbarrier.wait(ready, 0)
                at += gl.sum(shared.load(layout), 0)
        gl.store(out + 128 * number + gl.arange(0, 128, layout), at + number)

    @gluon.jit
    def roles(out, KIND: gl.constexpr):
        shared = gl.allocate_shared_memory(gl.int32, [1], gl.SwizzledSharedLayout(1, 1, 1, [0]))
        ready = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
        mbarrier.init(ready, count=1)
        if KIND == "before":
            for _ in range(8):
                barrier()
        gl.warp_specialize(
            [(role, (out, shared, ready, gl.constexpr(0), KIND)),
             (role, (out, shared, ready, gl.constexpr(1), KIND)),
             (role, (out, shared, ready, gl.constexpr(2), KIND))],
            [4, 4],
            [208, 88],
        )  # fmt: skip

    out = torch.zeros(3, 128, dtype=torch.int32, device="cuda")
    roles[(1,)](out, kind, num_warps=4, maxnreg=168)
    right = torch.equal(out.cpu(), torch.arange(128) + torch.arange(3)[:, None])
    sys.stdout.write(f"three roles, {CONTROLS[kind]}: {'right' if right else 'WRONG'}\n")
    return 0 if right else 1


def main() -> int:
    """Call everything; the exit code."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n\n")[0], epilog="\n".join((__doc__ or "").split("\n")[1:]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="default: cuda")
    parser.add_argument(
        "--control",
        choices=CONTROLS,
        help="call instead three roles: " + "; or ".join(f"{what} ({kind})" for kind, what in CONTROLS.items()),
    )
    args = parser.parse_args()
    device = torch.device(args.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error("--device is 'cuda', wanted a device that torch sees; ask for --device cpu to try the script")
    if args.control and device.type != "cuda":
        parser.error("--control is a kernel for a GPU, --device is 'cpu'; leave --device out")
    if args.control:
        return control(args.control)
    generator = torch.Generator(device).manual_seed(0)
    wrong = 0
    for dim, (q_len, k_len), rule, causal in itertools.product(DIMS, LENGTHS, RULES, (True, False)):
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        query, key, value = (
            torch.randn(1, heads, length, dim, device=device, generator=generator).to(dtype)
            for heads, length in ((4, q_len), (2, k_len), (2, k_len))
        )
        first, second = (call(query, key, value, {**rule, "causal": causal}) for _ in range(2))
        same = all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
        wrong += not same
        sys.stdout.write(f"head_dim {dim}, {q_len} queries, {k_len} keys, causal {causal}, {rule}: "
                         f"{'equal' if same else 'TWO CALLS DIFFER'}\n")  # fmt: skip
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
