"""Vector-sparse attention for video transformers.

    select(query, key, ...)              -> Selection    which keys each block of queries will attend to
    attend(query, key, value, selection) -> output       exact softmax attention over exactly those keys
    vec_attention(query, key, value)     -> output       both, in bounded memory

Importing needs only torch; Triton, transformers and the rest are imported by what uses them. `vecattention.methods`
holds the methods of the published comparison and is imported on first use.
"""

from __future__ import annotations

import importlib
from types import ModuleType

from vecattention.integrations import apply, register
from vecattention.ops import attend, explain, select, vec_attention
from vecattention.spec import Selection
from vecattention.thresholds import ThresholdTable

__all__ = ["Selection", "ThresholdTable", "apply", "attend", "explain", "register", "select", "vec_attention"]
__version__ = "0.1.0"


def __getattr__(name: str) -> ModuleType:
    if name == "methods":
        return importlib.import_module("vecattention.methods")
    raise AttributeError(f"module 'vecattention' has no attribute {name!r}")
