"""Whether requirements.txt is met. Importing this ends the program with a sentence where it is not,
before a package is imported that may fail in its own words."""

import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

FILE = Path(__file__).parent.parent / 'requirements.txt'
try:
    from packaging.requirements import Requirement
except ImportError:
    sys.exit(f'error: packaging is missing. To install all: pip install -r {FILE}')


def find_wrong(file: Path) -> list[str]:
    """The packages of a requirements `file` that are missing, or of another version, in words."""
    wrong = []
    for line in file.read_text(encoding='utf-8').splitlines():
        if text := line.split('#')[0].strip():
            wanted = Requirement(text)
            try:
                found = version(wanted.name)
            except PackageNotFoundError:
                wrong.append(f'{text} is missing')
                continue
            if not wanted.specifier.contains(found, prereleases=True):
                wrong.append(f'{wanted.name} is {found} and must be {wanted.specifier}')
    return wrong


if wrong := find_wrong(FILE):
    sys.exit(f'error: {"; ".join(wrong)}. To install what fits: pip install -r {FILE}')
