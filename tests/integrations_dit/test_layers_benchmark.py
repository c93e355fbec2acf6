"""benchmarks/video_layers.py runs, with small numbers, and its real configurations are those of the real classes."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import HunyuanVideoTransformer3DModel, WanTransformer3DModel

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "video_layers.py"


def test_it_measures_and_records(tmp_path: Path) -> None:
    out = tmp_path / "v.jsonl"
    command = [sys.executable, str(SCRIPT), "--device", "cpu", "--model", "tiny-wan", "tiny-hunyuan", "--out", str(out)]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in out.read_text().splitlines()]
    assert not [row["failed"] for row in found if "failed" in row]
    assert [(row["case"], row["pool"]) for row in found] == [
        (case, pool) for case in ("tiny-wan", "tiny-hunyuan") for pool in (64, 32)
    ]
    for row in found:
        assert abs(row["density"] - 0.5) < 0.02 and 0 < row["difference"] < 0.2
        assert row["ratio"] == pytest.approx(row["dense"]["ms"] / row["sparse"]["ms"], abs=1e-3)
        assert row["attention_ms"] > 0 and row["dense_kernel"] in ("cudnn", "flash")


@pytest.mark.parametrize(
    ("name", "kind", "tokens"),
    [
        ("wan2.1-14b-720p", WanTransformer3DModel, 75_600),
        ("hunyuanvideo-720p", HunyuanVideoTransformer3DModel, 118_800),
    ],
)
def test_real_sizes(name: str, kind: type, tokens: int) -> None:
    spec = importlib.util.spec_from_file_location("video_layers", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["video_layers"] = module
    spec.loader.exec_module(module)
    model = module.MODELS[name]
    with torch.device("meta"):
        transformer = kind(**model.config)
    _, frames, height, width = model.latent
    assert frames * (height // 2) * (width // 2) == tokens
    heads = model.config["num_attention_heads"]
    assert heads * model.config["attention_head_dim"] == transformer.config.num_attention_heads * 128
    if kind is HunyuanVideoTransformer3DModel:
        assert sum(model.config["rope_axes_dim"]) == 128
    else:
        assert transformer.blocks[0].ffn.net[0].proj.weight.shape == (13824, 5120)
