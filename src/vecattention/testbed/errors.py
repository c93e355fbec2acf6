"""The errors of the testbed that a caller may want to catch by name. Each is also a ValueError."""

from __future__ import annotations


class VideoError(ValueError):
    """A file that cannot be read as the whole video that it should be."""


class ModelError(ValueError):
    """A directory that does not hold a model that can be loaded."""


class QuestionError(ValueError):
    """A question that the tokenizer cannot spell."""
