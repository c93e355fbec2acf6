"""What this machine is: versions, processor, GPU. For records of measurements and for `vecattention env`."""

from __future__ import annotations

import functools
import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

PACKAGES = ("vecattention", "torch", "triton", "transformers", "diffusers", "numpy", "torchvision", "av", "safetensors")
"""The packages whose versions a result can depend on."""


def versions() -> dict[str, str | None]:
    """Version of Python and of each of `PACKAGES`, None for one that is not installed; nothing is imported."""
    return {"python": platform.python_version()} | {name: _version(name) for name in PACKAGES}


def processor() -> dict[str, Any]:
    """The processor: its name, the cores this process may use, torch's threads and the best vector instructions."""
    return {
        "name": _processor_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "memory_gib": _memory_gib(),
    }


def gpus() -> list[dict[str, Any]]:
    """Each NVIDIA GPU that torch sees: name, compute capability, memory in GiB."""
    found = []
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        facts = torch.cuda.get_device_properties(index)
        found.append(
            {
                "name": facts.name,
                "compute_capability": f"{facts.major}.{facts.minor}",
                "memory_gib": round(facts.total_memory / 2**30, 1),
            }
        )
    return found


def free_memory(device: torch.device) -> int:
    """Bytes of a GPU that torch can still give out, its own cache included; 0 for other devices."""
    if device.type != "cuda":
        return 0
    cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + cached


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Multiprocessors of a GPU of this machine; 0 for other devices."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return 0
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


STATE = ("clocks.sm", "power.draw", "power.limit", "temperature.gpu", "clocks_event_reasons.sw_power_cap")
"""What `gpu_state` asks nvidia-smi for."""


def gpu_state() -> dict[str, float | bool] | None:
    """What torch's current GPU does just now: its clock, its power, whether that holds the clock down; None without.

    Keys: sm_mhz, power_w, power_limit_w, temperature_c, power_capped. What the driver does not tell is left out.
    """
    mine = "0"
    if torch.cuda.is_available():  # by its name for the driver: numbers are those of CUDA_VISIBLE_DEVICES
        uuid = str(torch.cuda.get_device_properties(torch.cuda.current_device()).uuid)
        mine = uuid if uuid.startswith("GPU-") else f"GPU-{uuid}"
    command = ("nvidia-smi", "-i", mine, f"--query-gpu={','.join(STATE)}", "--format=csv,noheader,nounits")
    try:
        told = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    found: dict[str, float | bool] = {}
    names = ("sm_mhz", "power_w", "power_limit_w", "temperature_c", "power_capped")
    for name, value in zip(names, (x.strip() for x in told.split(",")), strict=False):
        if name == "power_capped" and value in ("Active", "Not Active"):
            found[name] = value == "Active"
        elif name != "power_capped" and value.replace(".", "", 1).isdigit():
            found[name] = float(value)
    return found


def facts() -> dict[str, Any]:
    """All of it, JSON-ready: what a record of a measurement holds about where it was made."""
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "processor": processor(),
        "gpus": gpus(),
        "cuda": torch.version.cuda,
        "versions": versions(),
    }


def commit() -> dict[str, Any] | None:
    """The commit of the checkout that this package runs from, and whether it was changed since; None outside of one."""
    here = Path(__file__).parent
    if not (here.parent.parent / ".git").exists():
        return None
    try:
        name, changed = (
            subprocess.run(("git", "-C", str(here), *words), capture_output=True, text=True, check=True).stdout.strip()
            for words in (("rev-parse", "HEAD"), ("status", "--porcelain", "--untracked-files=no"))
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return {"hash": name, "dirty": bool(changed)}


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _processor_name() -> str:
    listing = Path("/proc/cpuinfo")
    if listing.is_file():
        for line in listing.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _memory_gib() -> float | None:
    if not hasattr(os, "sysconf") or "SC_PHYS_PAGES" not in os.sysconf_names:
        return None
    return round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1)
