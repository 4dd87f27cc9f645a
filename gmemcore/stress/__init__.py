"""Fleets of guests: seeded, checked, resumable. ``gmemcore.stress(spec)`` runs one."""

import sys
from importlib import import_module
from types import ModuleType
from typing import Any


class _Callable(ModuleType):
    """A package that can be called: ``gm.stress`` is a submodule and what runs a fleet."""

    def __call__(self, spec: Any, **options: Any) -> Any:
        """Run a fleet; see `gmemcore.front.stress`."""
        return import_module("gmemcore.front").stress(spec, **options)


sys.modules[__name__].__class__ = _Callable
