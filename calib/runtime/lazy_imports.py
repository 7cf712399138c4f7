"""Packages whose names are imported at their first use (PEP 562), so that to know a job's options takes no torch."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from importlib import import_module
from types import ModuleType
from typing import Any


def import_lazily(package: str, modules: Mapping[str, str]) -> None:
    """Let `package` have each name of `modules` from the module that stands there, which is imported only then.

    Where a function is called as its module is (`unlearn.unlearn`), the package's name is the function, also after
    someone has imported the module; that is found in `sys.modules`, and by `from unlearn.unlearn import ...`.
    """

    class Package(ModuleType):
        def __getattr__(self, name: str) -> Any:
            if name not in modules:
                raise AttributeError(f"module '{package}' has no attribute '{name}'")
            value = getattr(import_module(modules[name]), name)
            super().__setattr__(name, value)
            return value

        def __setattr__(self, name: str, value: Any) -> None:
            if name not in modules or not isinstance(value, ModuleType):  # the import system binds what it has imported
                super().__setattr__(name, value)

        def __dir__(self) -> list[str]:
            return sorted({*super().__dir__(), *modules})

    sys.modules[package].__class__ = Package
