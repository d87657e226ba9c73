"""Registers this package's classes at the moment FunASR is there, so that importing us costs nothing."""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Sequence
from types import ModuleType


def register_with_funasr() -> None:
    """Register now if FunASR is imported already, else as soon as it is.

    FunASR's own import takes seconds. Nobody can look into its tables before it is imported, so until then
    nobody can tell the difference; tools that do not need FunASR start at once.
    """
    if "funasr" in sys.modules:
        _register()
    elif not any(isinstance(finder, _AfterFunasr) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AfterFunasr())


class _AfterFunasr(importlib.abc.MetaPathFinder):
    """Finds FunASR as the import system would, and has our classes registered once it has run."""

    searching = False

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != "funasr" or self.searching:
            return None
        self.searching = True
        try:
            spec = importlib.util.find_spec(fullname)
        finally:
            self.searching = False
        if spec is not None and spec.loader is not None:
            run = spec.loader.exec_module

            def run_then_register(module: ModuleType) -> None:
                run(module)
                if self in sys.meta_path:
                    sys.meta_path.remove(self)
                _register()

            spec.loader.exec_module = run_then_register
        return spec


def _register() -> None:
    from funasr_mooer.register import register_all

    register_all()
