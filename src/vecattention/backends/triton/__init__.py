"""Triton kernels for NVIDIA GPUs from compute capability 8.0 on, and for Triton's interpreter on the CPU."""

from __future__ import annotations

import torch
import triton

from vecattention import spec
from vecattention.backends.triton.launch import attend, select

__all__ = ["attend", "select", "why_not"]

DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def why_not(problem: spec.Problem) -> tuple[str, ...]:
    """float16, bfloat16 or float32 on a CUDA device of compute capability 8.0 or newer, or interpreted on the CPU."""
    reasons = []
    if problem.dtype not in DTYPES:
        reasons.append(f"it does not take {problem.dtype}")
    if problem.device.type == "cuda":
        if torch.version.hip:
            reasons.append("it is tested on NVIDIA GPUs only, this is a ROCm build of torch")
        elif torch.cuda.is_available() and torch.cuda.get_device_capability(problem.device) < (8, 0):
            major, minor = torch.cuda.get_device_capability(problem.device)
            reasons.append(f"it needs compute capability 8.0 or newer, {problem.device} has {major}.{minor}")
    elif not (problem.device.type == "cpu" and triton.knobs.runtime.interpret):
        reasons.append(f"it runs on CUDA tensors, these are on {problem.device}")
    return tuple(reasons)
