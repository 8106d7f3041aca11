"""The command line: a strict `fire`, which refuses wrong flags and types before any work."""

import contextlib
import difflib
import errno
import functools
import inspect
import io
import math
import os
import re
import shlex
import signal
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, get_args

from lib import versions  # noqa: F401, checked before the packages are imported

# isort: split
import fire
from fastcore.docments import docments
from fire.helptext import HelpText
from fire.trace import FireTrace

# the import of fastai causes this warning of torch, and a user cannot do anything about it
warnings.filterwarnings('ignore', '`torch.jit.script` is deprecated', FutureWarning)


class Stop(Exception):
    """A sentence for the person at the keyboard: what was expected, what was found, what to do."""


ROOM = '; make room, then run this again'
ACCESS = '; change its permissions, or name another folder'
HINTS = {  # what to do about an error of the system
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT, errno.EFBIG), ROOM),
    **dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), ACCESS),
}


def check_within(low: float, high: float = math.inf, **flags: float | None) -> None:
    """Check `flags` that are not None. Raises: Stop that names one not from `low` to `high`."""
    for name, value in flags.items():
        if value is not None and not (low <= value <= high and value < math.inf):
            span = f'{low} or more' if high == math.inf else f'from {low} to {high}'
            raise Stop(f'--{name} must be {span}, not {value}')


def check_one_of(choices: Sequence[str | None], **flags: str | None) -> None:
    """Check `flags`. Raises: Stop that names one whose value is not among `choices`."""
    for name, value in flags.items():
        if value not in choices:
            raise Stop(f'--{name} is one of {", ".join(filter(None, choices))}, not {value}')


def split(text: str | None) -> list[str]:
    """The words of a flag with commas between."""
    return [word.strip() for word in text.split(',')] if text else []


def command(script: str, flags: dict[str, Any], defaults: dict[str, Any]) -> str:
    """The command that calls `script` with those of `flags` that differ from `defaults`."""
    words = ['python', script]
    for flag, value in flags.items():
        if isinstance(value, bool) and value != defaults[flag]:
            words.append(f'--{flag}' if value else f'--no{flag}')
        elif value != defaults[flag]:
            words += [f'--{flag}', str(value)]
    return shlex.join(words)


def run(main: Callable[..., None], args: Sequence[str] | None = None) -> None:
    """Call `main` with the flags of the command line; each of its parameters has a type.

    `--help` explains each flag by the comment beside it. What a user can get wrong ends in one
    sentence on stderr, with status 2 for the command line and 1 for any later `Stop`. Ctrl-C and
    SIGTERM end in one line with the command that goes on, with status 130.
    """
    args = list(sys.argv[1:] if args is None else args)
    sys.stdout.reconfigure(line_buffering=True)  # so that a log file can be followed
    if {'--help', '-h'} & set(args):
        return print(usage(main))
    try:
        flags = parse(main, args)
    except Stop as sentence:
        print(f'error: {sentence}', file=sys.stderr)
        raise SystemExit(2) from None
    interrupts, own = [], os.getpid()

    def interrupt(number: int, _frame: object) -> None:
        if os.getpid() != own:  # a process that reads images; its parent prints the line
            os._exit(1)
        interrupts.append(number)
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, interrupt)
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:  # a shell's & ignores Ctrl-C
        signal.signal(signal.SIGINT, interrupt)
    try:
        main(**flags)
    except BaseException as e:
        # torch may turn an interrupt into an error of ended workers
        if interrupts or isinstance(e, KeyboardInterrupt):
            again = shlex.join(['python', sys.argv[0], *args])
            print(f'stopped; what is finished is kept. To go on: {again}', file=sys.stderr)
            raise SystemExit(130) from None
        if sentence := explain(e):
            raise SystemExit(f'error: {sentence}') from None
        raise


def explain(error: BaseException) -> str | None:
    """The sentence for an error that the user can mend; None for a bug."""
    if isinstance(error, Stop):
        # fastai and torch add words to the errors of callbacks and of processes that read images
        text = re.sub(r'\A.*(lib\.cli\.Stop: |calling event `\w+`:\s)', '', str(error), flags=re.S)
        # a name in a stranger's table may hold control characters of a terminal
        return ''.join(c if c.isprintable() or c == '\n' else '\ufffd' for c in text.strip())
    if isinstance(error, OSError) and (error.filename is not None or error.errno is not None):
        where = '' if error.filename is None else f': {error.filename}'
        return f'{error.strerror or error}{where}{HINTS.get(error.errno, "")}'
    of_card = type(error).__name__ == 'OutOfMemoryError'  # torch's, which is not imported here
    if isinstance(error, RuntimeError) and (of_card or 'allocate memory' in str(error)):
        full = 'the GPU is out of memory' if of_card else 'out of memory'
        return f'{full}; try a smaller --batch_size (in training: --accumulate 2 --batch_size 4)'
    if isinstance(error, RuntimeError) and str(error).startswith('DataLoader worker'):
        return (
            'a process that reads images was ended from outside, perhaps for lack of memory; run '
            'this again with fewer --workers, or give the container more docker run --shm-size'
        )
    return None


def usage(main: Callable[..., None]) -> str:
    """The text of --help: fire's; each flag's meaning is the comment beside it in the signature."""

    @functools.wraps(main)
    def documented() -> None: ...

    meanings = docments(main, returns=False).items()
    listing = '\n'.join(f'    {flag}: {meaning}' for flag, meaning in meanings)
    documented.__doc__ = f'{inspect.getdoc(main)}\n\nArgs:\n{listing}'
    text = HelpText(documented, trace=FireTrace(documented, name=Path(sys.argv[0]).name))
    return re.sub(r'^    -\w, --', '    --', text, flags=re.MULTILINE)  # -h would be --home


def parse(main: Callable[..., None], args: Sequence[str]) -> dict[str, Any]:
    """The keyword arguments for `main` in `args`, each of its parameter's type.

    `fire` calls its target before it complains about unknown flags, and guesses types. So fire gets
    a function that only records its arguments, strings are kept as typed, and other types are
    compared with the annotation. Raises: Stop where a flag is unknown or its value of another type.
    """
    signature = inspect.signature(main)
    kinds = {name: _kind(p.annotation) for name, p in signature.parameters.items()}
    strings = {name: str for name, kind in kinds.items() if kind is str}
    words = [arg.split('=')[0].replace('-', '_') for arg in args if arg.startswith('--')]
    if twice := [word for word in words if words.count(word) > 1]:
        raise Stop(f'--{twice[0].strip("_")} is given twice')
    recorded: dict[str, Any] = {}

    @fire.decorators.SetParseFns(**strings)
    @functools.wraps(main)
    def recorder(**flags: Any) -> None:
        recorded.update(flags)

    try:
        with contextlib.redirect_stderr(io.StringIO()):  # it would print its whole usage text
            fire.Fire(recorder, command=list(args))  # it reads the signature that is wrapped
    except fire.core.FireExit as e:
        known = [*kinds, *(f'no{name}' for name, kind in kinds.items() if kind is bool)]
        typed = [word.strip('_') for word in words if word.strip('_') not in known]
        near = [name for word in typed for name in difflib.get_close_matches(word, known, 1)]
        hint = f'; did you mean --{near[0]}?' if near else '.'
        raise Stop(f'{e.trace.elements[-1].ErrorAsStr()}{hint} See --help') from None
    return {name: _value(name, kinds[name], value) for name, value in recorded.items()}


def _kind(annotation: Any) -> type:
    return next((kind for kind in get_args(annotation) if kind is not type(None)), annotation)


def _value(name: str, kind: type, value: Any) -> Any:
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        article = {int: 'a whole number', float: 'a number', bool: 'no value (or --no' + name + ')'}
        raise Stop(f'--{name} takes {article[kind]}, not {value!r}')
    if kind is str and value in ('', 'True', 'False'):  # fire turns a bare --name into these
        raise Stop(f'--{name} needs a value: --{name} VALUE')
    return value
