"""Compile what the Triton backend launches, as it launches it, for GPUs that are not here, and read the machine code.

The backend's own functions run on CPU tensors, with each of its kernels replaced by one that compiles for the wanted
target instead of launching. So arguments, their specialisation and launch shapes are the shipped ones.
"""

from __future__ import annotations

import re
import subprocess
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import ModuleType
from typing import Any

import triton
from triton.backends.compiler import GPUTarget

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


@dataclass(frozen=True)
class Kernel:
    """One compiled kernel: its name and its code for a compute capability."""

    name: str
    capability: int
    cubin: bytes
    shared: int

    @cached_property
    def _dump(self) -> str:
        file = Path(f"{self.name}.cubin")
        file.write_bytes(self.cubin)
        command = [str(TOOLS / "cuobjdump"), "-sass", "-res-usage", str(file)]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    @cached_property
    def instructions(self) -> Counter[str]:
        """How often each instruction (without its modifiers) occurs."""
        return Counter(re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*)", self._dump))

    @cached_property
    def usage(self) -> dict[str, int]:
        """Registers, stack and local memory per thread."""
        line = next(line for line in self._dump.splitlines() if "REG:" in line)
        return {name: int(n) for name, n in re.findall(r"([A-Z]+):(\d+)", line)}

    @property
    def spills(self) -> str:
        """What it moves between registers and local memory; empty when nothing."""
        moved = {name: self.instructions[name] for name in ("LDL", "STL") if self.instructions[name]}
        kept = {name: self.usage[name] for name in ("STACK", "LOCAL") if self.usage[name]}
        return ", ".join(f"{name} {count}" for name, count in {**moved, **kept}.items())


def compiled(module: ModuleType, capability: int, launch: Callable[[], Any], **options: int) -> list[Kernel]:
    """The kernels that ``launch`` would start through ``module``, compiled for a compute capability such as 90.

    ``options`` are added to those of every launch.
    """
    found: list[Kernel] = []
    kernels = {name: x for name, x in vars(module).items() if isinstance(x, triton.runtime.jit.JITFunction)}
    with _driver(capability):
        try:
            for name, kernel in kernels.items():
                setattr(module, name, _Recorder(kernel, capability, found, options))
            launch()
        finally:
            for name, kernel in kernels.items():
                setattr(module, name, kernel)
    return found


class _Recorder:
    """Stands for a kernel: kernel[grid](...) compiles."""

    def __init__(self, kernel: Any, capability: int, found: list[Kernel], extra: dict[str, int]) -> None:
        self.kernel, self.capability, self.found, self.extra = kernel, capability, found, extra

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def compile_it(*arguments: Any, **options: Any) -> None:
            done = self.kernel.warmup(*arguments, grid=grid, **options, **self.extra)
            self.found.append(
                Kernel(self.kernel.__name__, self.capability, done.asm["cubin"], int(done.metadata.shared))
            )

        return compile_it


class _Absent:
    """A driver of a GPU that is not here. Its device number is one that no GPU has: compiled code is kept by device."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return 1000 + self.capability

    def get_current_stream(self, device: int) -> int:
        return 0


@contextmanager
def _driver(capability: int) -> Iterator[None]:
    before = triton.runtime.driver._active  # None until one is asked for, which fails without a GPU
    triton.runtime.driver.set_active(_Absent(capability))
    try:
        yield
    finally:
        triton.runtime.driver._active = before
