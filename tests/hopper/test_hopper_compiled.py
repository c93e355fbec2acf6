"""The Hopper kernels as they ship, compiled for sm_90 without a GPU: spills, instructions, no serialised products."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

triton = pytest.importorskip("triton", reason="Triton is not installed")
gluon = pytest.importorskip("triton.experimental.gluon._runtime", reason="this Triton has no Gluon")

from triton.backends.compiler import GPUTarget  # noqa: E402

from vecattention.backends.hopper import launch  # noqa: E402
from vecattention.backends.hopper.attend import attend_kernel  # noqa: E402
from vecattention.backends.hopper.select import select_kernel  # noqa: E402

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
HALVES = ("Q", "K", "V", "OUT", "POOLED")
WORDS = ("WORDS", "COUNTS", "RINGS")
FLOATS = ("LSE", "ALPHA", "TOPS")


def build(kernel: Any, constants: dict[str, Any], dtype: str, tmp_path: Path) -> tuple[str, str]:
    """(what the assembler says, the disassembly) of a kernel with these constants."""
    names = kernel.arg_names
    kinds = {}
    for name in names:
        if name in constants:
            kinds[name] = "constexpr"
        elif name in HALVES:
            kinds[name] = f"*{dtype}"
        elif name in WORDS:
            kinds[name] = "*i32"
        elif name in FLOATS:
            kinds[name] = "*fp32"
        else:
            kinds[name] = "fp32" if name == "scale" else "i32"
    whole = [i for i, n in enumerate(names) if kinds[n][0] == "*" or n[:2] in ("sq", "sk", "sv", "so") or n == "span"]
    source = gluon.GluonASTSource(
        kernel,
        kinds,
        {(names.index(name),): value for name, value in constants.items()},
        {(i,): [["tt.divisibility", 16]] for i in whole},
    )
    built = triton.compile(
        source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4, "maxnreg": launch.REGISTERS}
    )
    assert built.metadata.shared <= 232_448, "more shared memory than a multiprocessor gives a block"
    text, binary = tmp_path / "kernel.ptx", tmp_path / "kernel.cubin"
    text.write_text(built.asm["ptx"])
    said = subprocess.run(
        [TOOLS / "ptxas", "-arch=sm_90a", "-v", text, "-o", binary], capture_output=True, text=True, check=True
    )
    shown = subprocess.run([TOOLS / "cuobjdump", "-sass", binary], capture_output=True, text=True, check=True)
    return said.stderr + said.stdout, shown.stdout


def spilled(said: str) -> int:
    line = next(line for line in said.splitlines() if "spill stores" in line)
    return int(line.split(" bytes spill stores")[0].split()[-1])


def loops_that_spill(shown: str) -> int:
    """Number of loops of the machine code, but for those that start roles, that load or store spilled registers."""
    found = re.findall(r"/\*([0-9a-f]{4,})\*/\s+((?:@!?U?P\w+\s+)?[A-Z][^;]*);", shown)
    code = [(int(address, 16), text) for address, text in found]
    spills = [address for address, text in code if "STL" in text or "LDL" in text]
    starts = [address for address, text in code if "USETMAXREG" in text]
    loops = 0
    for address, text in code:
        target = re.search(r"BRA\S*\s+(?:\S+,\s*)?`?\(?(0x[0-9a-f]+)", text)
        if target and int(target[1], 16) < address:
            inside = range(int(target[1], 16), address)
            loops += any(at in inside for at in spills) and not any(at in inside for at in starts)
    return loops


def test_a_loop_that_spills_is_seen() -> None:
    lines = ["/*0010*/ MOV R1, R2 ;", "/*0020*/ LDL R3, [R1] ;", "/*0030*/ @P0 BRA 0x10 ;", "/*0040*/ STL [R1], R3 ;"]
    assert loops_that_spill("\n".join(lines)) == 1
    assert loops_that_spill("\n".join(lines[:1] + lines[2:])) == 0
    starting = [*lines[:2], "/*0028*/ USETMAXREG.DEALLOC.CTAPOOL 0x78 ;", *lines[2:]]
    assert loops_that_spill("\n".join(starting)) == 0


def attend_constants(causal: bool, pair: bool, dim: int) -> dict[str, Any]:
    shape = launch.AttendShape()
    return {
        "D": dim, "R": launch.BLOCK, "N": shape.step, "STAGES": shape.stages, "SEG": launch.WORDS, "RING": launch.RING,
        "QUEUE": launch.QUEUE, "CAUSAL": causal, "PAIR": pair, "CONSUMER_REGS": shape.consumer_registers,
        "LOADER_REGS": shape.loader_registers,
    }  # fmt: skip


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("dim, dtype", [(128, "bf16"), (64, "fp16")])
def test_attention_over_lists_of_128_rows(causal: bool, dim: int, dtype: str, tmp_path: Path) -> None:
    said, shown = build(attend_kernel, attend_constants(causal, False, dim), dtype, tmp_path)
    assert "serialized" not in said
    # The pinned Triton spills one register at most; other versions get a little room, for such too.
    assert spilled(said) <= (4 if triton.__version__.startswith("3.6.") else 48)
    assert shown.count("HGMMA") == 2 * 2 * (dim // 16 + 8), "of two consumers the first scores, a step, the last values"
    assert "LDGSTS.E.BYPASS.128" in shown and "USETMAXREG" in shown
    assert "HMMA.16" not in shown.replace("HGMMA", "")
    loader = max(shown.split("USETMAXREG"), key=lambda role: role.count("LDGSTS"))
    addresses = set(re.findall(r"LDGSTS[^;]*\]\[(R\d+)", loader))
    assert len(addresses) >= 8, "with one pair of registers for all addresses each copy waits for the one before"
    waits = 5  # of a consumer: first keys, second keys; in a step values and the next keys; last values
    assert shown.count("FENCE.VIEW.ASYNC") >= 2 * waits, "of two consumers, each wait has its fence"


@pytest.mark.parametrize("causal", [True, False])
def test_attention_over_pairs_of_lists(causal: bool, tmp_path: Path) -> None:
    said, shown = build(attend_kernel, attend_constants(causal, True, 128), "bf16", tmp_path)
    assert "serialized" not in said
    assert spilled(said) <= (4 if triton.__version__.startswith("3.6.") else 64)
    assert "HGMMA" in shown


@pytest.mark.parametrize(
    "given",
    [
        {"P": 32, "SHARE": 4},
        {"P": 64, "SHARE": 1},
        {"P": 64, "SHARE": 2},
        {"P": 64, "SHARE": 2, "ROW_SCOPE": True},
        {"P": 64, "SHARE": 2, "ROW_SCOPE": True, "MAXIMA": True},
        {"P": 32, "SHARE": 4, "WHOLE": False},
        {"P": 128, "SHARE": 1, "B": 128},
        {"P": 128, "SHARE": 1, "B": 128, "CAUSAL": False},
    ],
    ids=["P32 R128", "P64 R64", "P64 R128", "row", "row maxima", "P32 R128 prefix", "P128 B128", "P128 B128 full"],
)
def test_selection(given: dict[str, Any], tmp_path: Path) -> None:
    shape = launch.SelectShape()
    constants = {
        "D": 128, "B": 16, "N": launch.TILE, "STAGES": shape.stages, "ROW_SCOPE": False, "CAUSAL": True,
        "MAXIMA": False, "WHOLE": True, "CONSUMER_REGS": shape.consumer_registers,
        "LOADER_REGS": shape.loader_registers,
    } | given  # fmt: skip
    said, shown = build(select_kernel, constants, "bf16", tmp_path)
    assert "serialized" not in said
    assert spilled(said) == 0
    assert not loops_that_spill(shown)
    assert "HGMMA" in shown and "LDGSTS.E.BYPASS.128" in shown
