"""`lib.model` is imported when it is first used, so that --help needs no torch."""

from importlib import import_module
from types import ModuleType


def __getattr__(name: str) -> ModuleType:
    if name.startswith('_'):  # what Python itself looks for in a package
        raise AttributeError(name)
    return import_module(f'lib.{name}')
