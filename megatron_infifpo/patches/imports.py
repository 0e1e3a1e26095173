"""What importing Megatron takes, without what a program does not need of it.

For Megatron 0.19. Needless once `megatron.core` imports in a second: it imports W&B for a name, and
decorates functions with PyTorch's compiler, which is imported for that, whether or not they run.
"""

import gc
import importlib
import importlib.util
import os
import sys
from types import ModuleType
from typing import Any

import torch


class Unread(ModuleType):
    """A package that is imported when somebody takes something from it."""

    def __getattr__(self, name: str) -> Any:
        """Become the package itself."""
        self.__class__ = ModuleType  # type: ignore[assignment]
        assert self.__spec__ is not None and self.__spec__.loader is not None
        self.__spec__.loader.exec_module(self)
        return getattr(self, name)


def import_when_used(name: str) -> None:
    """Let others import a package, if there is one, in name only."""
    spec = None if name in sys.modules else importlib.util.find_spec(name)
    if spec is not None:
        sys.modules[name] = importlib.util.module_from_spec(spec)
        sys.modules[name].__class__ = Unread


def import_for_good(name: str) -> None:
    """Import a large package without garbage collection: none now, of all that is there none later.

    It would look through a million objects that stay, again and again, and once more at the end:
    a third of the time that a short command takes.
    """
    gc.disable()
    try:
        importlib.import_module(name)
    finally:
        gc.freeze()
        gc.enable()


def import_no_compiler() -> None:
    """Let torch.compile return what it is given, unless somebody wants to compile on the CPU."""
    module: Any = torch
    if os.environ.get("TORCHDYNAMO_DISABLE", "1") == "1":
        module.compile = lambda model=None, **how: _as_it_is if model is None else model


def _as_it_is(function: Any) -> Any:
    return function
