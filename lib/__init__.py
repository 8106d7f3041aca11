"""The library of the four scripts, one concept a file.

A module is imported when it is first used, as `lib.model`, so that --help and a misspelt flag do
not wait for torch.
"""

from importlib import import_module
from types import ModuleType


def __getattr__(name: str) -> ModuleType:
    if name.startswith('_'):
        raise AttributeError(name)
    return import_module(f'lib.{name}')
