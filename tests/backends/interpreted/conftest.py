"""These run in their own process, where Triton interprets its kernels: see ../test_triton_interpreted.py."""

import os

if os.environ.get("TRITON_INTERPRET") != "1":
    collect_ignore_glob = ["*.py"]
