"""The trained model, one film with its question, and what can be seen of a model from outside."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from vecattention.testbed import load, movies, prepare, question_for


@pytest.fixture(scope="session")
def trained() -> tuple[Any, Any]:
    return load()


@pytest.fixture(scope="session")
def film(trained: tuple[Any, Any]) -> tuple[dict[str, torch.Tensor], str]:
    """(inputs of 1,024 vision tokens and a question, the right answer)."""
    movie = movies.make(seed=41, tokens=1024)
    inputs = prepare(trained[1], movies.render(movie), movie.fps, question_for(movie.asked.shape))
    return inputs, movie.asked.colour
