"""Warp-specialised kernels for Hopper GPUs (compute capability 9.0), written in Triton's Gluon dialect."""

from __future__ import annotations

import torch

from vecattention import spec
from vecattention.backends.hopper.launch import BLOCK, TILE, attend, select

__all__ = ["attend", "select", "why_not"]

DTYPES = (torch.float16, torch.bfloat16)
HEAD_DIMS = (64, 128)


def why_not(problem: spec.Problem) -> tuple[str, ...]:
    """float16 or bfloat16, head_dim 64 or 128, lists of 64 or 128 rows, on a device of compute capability 9.0."""
    rule = problem.rule
    reasons = []
    if problem.device.type != "cuda":
        reasons.append(f"it runs on CUDA tensors, these are on {problem.device}")
    elif torch.version.hip:
        reasons.append("it is written for NVIDIA GPUs, this is a ROCm build of torch")
    elif torch.cuda.is_available() and torch.cuda.get_device_capability(problem.device) != (9, 0):
        major, minor = torch.cuda.get_device_capability(problem.device)
        reasons.append(f"it needs compute capability 9.0, {problem.device} has {major}.{minor}")
    if problem.dtype not in DTYPES:
        reasons.append(f"it takes float16 and bfloat16, not {problem.dtype}")
    if problem.head_dim not in HEAD_DIMS:
        reasons.append(f"it takes head_dim 64 and 128, not {problem.head_dim}")
    if max(problem.q_len, problem.k_len) * problem.head_dim >= 2**31:
        rows = max(problem.q_len, problem.k_len)
        reasons.append(f"it takes heads of less than 2**31 numbers, these have {rows} rows of {problem.head_dim}")
    if rule.q_block_size not in (BLOCK // 2, BLOCK):
        reasons.append(f"it wants lists of {BLOCK // 2} or {BLOCK} rows (q_block_size), these are {rule.q_block_size}")
    window = rule.k_local_size * rule.group_k_block
    if rule.max_scope == "window" and window % TILE and window < problem.k_len:
        reasons.append(f"it wants windows of a multiple of {TILE} keys, these have {window}")
    return tuple(reasons)
