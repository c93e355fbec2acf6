"""Files that appear whole or not at all."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[str]:
    """A temporary name beside `path`, which takes its place when the block ends well and is removed otherwise.

    Raises:
        FileNotFoundError: the folder does not exist.

    Example:
        >>> import pathlib, tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     target = pathlib.Path(folder, "note.txt")
        ...     with replacing(target) as name:
        ...         _ = pathlib.Path(name).write_text("whole")
        ...     target.read_text(), len(list(pathlib.Path(folder).iterdir()))
        ('whole', 1)
    """
    target = Path(path)
    if not target.parent.is_dir():
        raise FileNotFoundError(f"path is {str(target)!r}, wanted a file in an existing folder; create {target.parent}")
    name = str(target.with_name(f".{target.stem}.{uuid.uuid4().hex}{target.suffix}"))
    os.close(os.open(name, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
    try:
        yield name
        os.replace(name, target)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
