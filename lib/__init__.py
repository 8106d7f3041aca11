"""`lib.score` is imported when it is first used, so that --help and a misspelt flag are quick."""

from importlib import import_module
from types import ModuleType


def __getattr__(name: str) -> ModuleType:
    if name.startswith('_'):
        raise AttributeError(name)
    return import_module(f'lib.{name}')
