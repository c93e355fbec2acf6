"""Pipelines that are made once, and what they generate without vecattention."""

from __future__ import annotations

import functools

import pytest
import torch
from diffusers import HunyuanVideoPipeline, WanPipeline
from integrations_dit.tiny_generators import MAKERS


@functools.cache
def _made(name: str) -> tuple[object, torch.Tensor]:
    make, generate = MAKERS[name]
    pipe = make()
    return pipe, generate(pipe)


@pytest.fixture(params=list(MAKERS))
def case(request: pytest.FixtureRequest) -> tuple[object, object, torch.Tensor]:
    """(pipeline, its generate function, what the stock pipeline makes)."""
    pipe, stock = _made(request.param)
    return pipe, MAKERS[request.param][1], stock


@pytest.fixture
def wan() -> tuple[WanPipeline, torch.Tensor]:
    return _made("wan")


@pytest.fixture
def hunyuan() -> tuple[HunyuanVideoPipeline, torch.Tensor]:
    return _made("hunyuan")
