"""What is timed: the shapes of real models, inputs whose maps look like those of videos, and lists of keys."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vecattention import bits
from vecattention.spec import Selection

RUN = 16  # neighbouring keys that a bright stretch of a map is made of


@dataclass(frozen=True)
class Case:
    """One attention call: query heads, key heads, lengths, whether causal, head_dim (128); batch 1."""

    name: str
    heads: int
    kv_heads: int
    q_len: int
    k_len: int
    causal: bool
    head_dim: int = 128

    @property
    def dense_flop(self) -> float:
        """Floating-point operations of dense attention: 4 H Sq Sk D, or what the causal half of it takes."""
        pairs = self.q_len * self.k_len - (self.q_len * (self.q_len - 1) // 2 if self.causal else 0)
        return 4.0 * self.heads * self.head_dim * pairs


CASES = {
    case.name: case
    for case in (
        *(Case(f"qwen2.5-vl-{n}k", 28, 4, n * 1024, n * 1024, True) for n in (4, 8, 16, 32, 64, 128)),
        *(Case(f"square-{n}k", 8, 8, n * 1024, n * 1024, False) for n in (8, 32, 128)),
        Case("wan2.1-14b-720p", 40, 40, 75_600, 75_600, False),
        Case("hunyuanvideo-720p", 24, 24, 118_800, 119_056, False),
        Case("internvl3-1b-32k", 14, 2, 32 * 1024, 32 * 1024, True, head_dim=64),
        Case("cogvideox-5b-480p", 48, 48, 17_776, 17_776, False, head_dim=64),
    )
}


def case_of(name: str) -> Case:
    """The case of this name.

    Raises:
        ValueError: there is none.
    """
    if name not in CASES:
        raise ValueError(f"case is {name!r}, wanted one of {', '.join(CASES)}; pick one of these shapes")
    return CASES[name]


@dataclass(frozen=True)
class Source:
    """Where the tensors of a measurement come from: a case's shape, and captured tensors or random ones.

    Attributes:
        case: name and shape.
        device, dtype, seed: of random tensors, float by float normal.
        structure: how strongly the queries of a head agree on a direction that a tenth of the keys, in stretches of 16,
            point to: 0 for plain noise, 1 for maps with bright vertical stretches like those of videos.
        given: captured query [1, H, Sq, D], key and value [1, Hkv, Sk, D] instead.
    """

    case: Case
    device: str = "cuda"
    dtype: torch.dtype = torch.bfloat16
    seed: int = 0
    structure: float = 0.0
    given: tuple[Tensor, Tensor, Tensor] | None = None

    @classmethod
    def captured(cls, name: str, query: Tensor, key: Tensor, value: Tensor, causal: bool, device: str = "cuda",
                 dtype: torch.dtype = torch.bfloat16) -> Source:  # fmt: skip
        """The source of tensors that a model computed."""
        case = Case(name, query.shape[1], key.shape[1], query.shape[2], key.shape[2], causal, query.shape[3])
        moved = (query.to(device, dtype), key.to(device, dtype), value.to(device, dtype))
        return cls(case, device, dtype, given=moved)

    @property
    def key(self) -> dict[str, object]:
        """What a record's key says of it."""
        name = {"case": self.case.name, "device": self.device, "dtype": str(self.dtype).removeprefix("torch.")}
        return name | ({"structure": self.structure} if self.structure else {})

    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """Query [1, H, Sq, D], key and value [1, Hkv, Sk, D]."""
        if self.given is not None:
            return self.given
        case = self.case
        generator = torch.Generator(self.device).manual_seed(self.seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, device=self.device, dtype=self.dtype, generator=generator)

        query = normal(1, case.heads, case.q_len, case.head_dim)
        key = normal(1, case.kv_heads, case.k_len, case.head_dim)
        value = normal(1, case.kv_heads, case.k_len, case.head_dim)
        if self.structure:
            direction = normal(1, case.kv_heads, 1, case.head_dim).float()
            direction = torch.nn.functional.normalize(direction, dim=-1).to(self.dtype)
            chance = torch.rand(1, case.kv_heads, -(-case.k_len // RUN), 1, device=self.device, generator=generator)
            bright = (chance < 0.1).repeat_interleave(RUN, dim=2)[:, :, : case.k_len]
            key += bright * direction * (self.structure * 12)
            query += direction.repeat_interleave(case.heads // case.kv_heads, dim=1) * (self.structure * 2)
        return query, key, value


def lists(case: Case, density: float, kind: str = "random", seed: int = 0, block: int = 128,
          device: str = "cuda") -> Selection:  # fmt: skip
    """A selection of about this density: "random" single keys, or "clustered" stretches that a head's blocks share.

    Raises:
        ValueError: another kind.
    """
    if kind not in ("random", "clustered"):
        raise ValueError(f"kind is {kind!r}, wanted 'random' or 'clustered'; pick one of the two")
    generator = torch.Generator(device).manual_seed(seed)
    blocks, words = -(-case.q_len // block), bits.words_for(case.k_len)
    out = torch.empty(1, case.heads, blocks, words, dtype=torch.int32, device=device)
    rows = max(1, 2**27 // case.k_len)
    for head in range(case.heads):
        stretch = torch.rand(-(-case.k_len // RUN), device=device, generator=generator).repeat_interleave(RUN)
        for first in range(0, blocks, rows):
            shape = (min(rows, blocks - first), case.k_len)
            noise = torch.rand(shape, device=device, generator=generator)
            # Four fifths of a clustered list are the head's own stretches, one fifth differs from block to block.
            kept = noise < density
            if kind == "clustered":
                kept = (stretch[: case.k_len] < 0.8 * density) | (noise < 0.2 * density)
            out[0, head, first : first + rows] = bits.pack(kept)
    return Selection(out, case.q_len, case.k_len, block, case.causal)
