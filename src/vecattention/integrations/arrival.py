"""Does something once another library has been imported, without importing it."""

from __future__ import annotations

import importlib.util
import logging
import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

logger = logging.getLogger(__name__)


def when_imported(module: str, action: Callable[[], None]) -> None:
    """Call ``action`` when ``module`` has been imported: now if it is, else right after it will be.

    An action that cannot import what it needs (a version that is too old) is logged for debugging and otherwise left,
    so that nobody's import of the other library fails because of us.

    Example:
        >>> when_imported("json", lambda: print("json is there"))
        json is there
    """
    if module in sys.modules:
        _try(action)
    else:
        sys.meta_path.insert(0, _Watch(module, action))


class _Watch(MetaPathFinder):
    """Finds nothing by itself: the one time that the module is looked for, it goes on and lets the others find it."""

    def __init__(self, module: str, action: Callable[[], None]) -> None:
        self._module = module
        self._action = action

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != self._module:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            loader: Any = spec.loader  # of this module alone
            execute = loader.exec_module

            def then_act(module: ModuleType) -> None:
                execute(module)
                _try(self._action)

            loader.exec_module = then_act
        return spec


def _try(action: Callable[[], None]) -> None:
    try:
        action()
    except ImportError as error:
        logger.debug("vecattention did not register itself: %s", error)
