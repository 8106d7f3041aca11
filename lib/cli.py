"""Strict `fire`: an unknown flag or a wrong type ends the program before any work."""

import difflib
import errno
import functools
import inspect
import io
import os
import re
import shlex
import signal
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, get_args

import fire
from fire.helptext import HelpText
from fire.trace import FireTrace

from lib import ranks


class Stop(Exception):
    """A sentence for the person at the keyboard: what was expected, what was found, what to do."""


ROOM = '; make room, and the same command goes on'
ACCESS = '; change its permissions, or take another --home'
HINTS = {  # what to do about an error of the system
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT, errno.EFBIG), ROOM),
    **dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), ACCESS),
}


def at_least(low: float, **flags: float) -> None:
    """Raises: Stop that names the first of `flags` below `low`, or not a number."""
    for name, value in flags.items():
        if not low <= value < float('inf'):
            raise Stop(f'--{name} must be {low} or more, not {value}')


def one_of(choices: Sequence[str | None], **flags: str | None) -> None:
    """Raises: Stop that names the first of `flags` that is none of `choices`."""
    for name, value in flags.items():
        if value not in choices:
            raise Stop(f'--{name} is one of {", ".join(filter(None, choices))}, not {value}')


def rate(**flags: float | None) -> None:
    """Raises: Stop that names the first of `flags` that is given and not from .0001 to .9999."""
    for name, value in flags.items():
        if value is not None and not 0.0001 <= value <= 0.9999:
            raise Stop(f'--{name} must be from .0001 to .9999, not {value}')


def processes(workers: int | None) -> None:
    """Raises: Stop where so many processes cannot be meant; None leaves the number open."""
    if workers is not None and not 0 <= workers <= 256:
        raise Stop(f'--workers must be 0 to 256, not {workers}')


def command(script: str, flags: dict[str, Any], defaults: dict[str, Any]) -> str:
    """What to type to call `script` with `flags`: those that differ from `defaults`."""
    words = ['python', script]
    for flag, value in flags.items():
        if isinstance(value, bool) and value != defaults[flag]:
            words.append(f'--{flag}' if value else f'--no{flag}')
        elif value != defaults[flag]:
            words += [f'--{flag}', str(value)]
    return shlex.join(words)


def run(main: Callable[..., None], args: Sequence[str] | None = None) -> None:
    """Call `main` with the flags of the command line; every parameter needs a type and a default.

    `--help` prints the docstring's `Args:`. Whatever a user can get wrong, here or later as a
    `Stop`, ends as one sentence on stderr: status 2 for the command line, 1 for the rest. Ctrl-C
    and SIGTERM end alike: a KeyboardInterrupt, which may say what is kept, and status 130.
    """
    args = list(sys.argv[1:] if args is None else args)
    sys.stdout.reconfigure(line_buffering=True)  # a log file shows each line when it is printed
    if ranks.RANK:  # of several processes the first alone prints; errors come from all
        sys.stdout = io.StringIO()
    # fastai and kornia script functions, which torch deprecates: nothing a user can act on
    warnings.filterwarnings('ignore', '`torch.jit.script` is deprecated', FutureWarning)
    if {'--help', '-h'} & set(args):
        print(usage(main))
        return
    try:
        flags = parse(main, args)
    except Stop as sentence:
        print(f'error: {sentence}', file=sys.stderr)
        raise SystemExit(2) from None
    received = _interrupt_on_signals()
    try:
        try:
            main(**flags)
        except Exception:
            if received:  # a library's own way to say so, as of an import or of workers that ended
                raise KeyboardInterrupt from None
            raise
    except Stop as sentence:
        # fastai and torch put words around what a callback or a process that reads images raises
        text = re.sub(
            r'\A.*(lib\.cli\.Stop: |calling event `\w+`:\s)', '', str(sentence), flags=re.S
        )
        # names out of a stranger's table may hold what a terminal obeys
        text = ''.join(c if c.isprintable() or c == '\n' else '\ufffd' for c in text.strip())
        raise SystemExit(f'error: {text}') from None
    except OSError as e:
        if e.filename is None and e.errno is None:
            raise  # not about a file: a bug, and a traceback says more than a sentence
        hint = HINTS.get(e.errno, '')
        reason = f'{e.strerror or e}: {e.filename or "while writing"}'
        raise SystemExit(f'error: {reason}{hint}') from None
    except RuntimeError as e:
        # torch's, which is not imported here
        if type(e).__name__ == 'OutOfMemoryError':
            reason = 'the GPU is out of memory; try a smaller --batch_size'
        elif 'allocate memory' in str(e):
            reason = 'out of memory; try a smaller --batch_size'
        elif str(e).startswith('DataLoader worker'):
            reason = 'a process that reads images was ended from outside, perhaps for its memory; '
            reason += 'the same command goes on, with fewer --workers'
        else:
            raise
        raise SystemExit(f'error: {reason}') from None
    except KeyboardInterrupt as interrupt:
        _stopped(str(interrupt) or 'what is finished', args)


def _interrupt_on_signals() -> list[int]:
    """Have Ctrl-C, and SIGTERM, which a scheduler sends, raise KeyboardInterrupt.

    And once more after a while: Python drops what is raised in the hooks of a fork and the like,
    and the work would go on. Returns: a list that the signals are put into.
    """
    received: list[int] = []
    main_process = os.getpid()
    again = hasattr(signal, 'setitimer')  # not on Windows

    def interrupt(number: int, _frame: object) -> None:
        if os.getpid() != main_process:  # a fork that reads images; the parent speaks
            os._exit(1)
        received.append(number)
        if again:
            signal.setitimer(signal.ITIMER_REAL, 3)
        raise KeyboardInterrupt

    def dropped(unraisable: Any) -> None:
        if not received:
            sys.__unraisablehook__(unraisable)

    sys.unraisablehook = dropped
    signal.signal(signal.SIGTERM, interrupt)
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:  # as a shell's & has it
        signal.signal(signal.SIGINT, interrupt)
    if again:
        signal.signal(signal.SIGALRM, interrupt)
    return received


def _stopped(kept: str, args: Sequence[str]) -> None:
    """Say in one line what an interrupt has left and how to go on, and end."""
    if hasattr(signal, 'setitimer'):
        signal.setitimer(signal.ITIMER_REAL, 0)
    again = shlex.join(['python', sys.argv[0], *args])
    print(f'stopped; kept: {kept}. The same command goes on: {again}', file=sys.stderr)
    raise SystemExit(130) from None


def usage(main: Callable[..., None]) -> str:
    """The text of --help: fire's, less its one-letter flags, which are refused here."""
    name = Path(sys.argv[0]).name
    text = HelpText(main, trace=FireTrace(main, name=name))
    return re.sub(r'^    -\w, --', '    --', text, flags=re.MULTILINE)


def parse(main: Callable[..., None], args: Sequence[str]) -> dict[str, Any]:
    """The keyword arguments for `main` that `args` spell, each of its parameter's type.

    `fire` calls its target before it complains about what is left over, accepts `--n` for
    `--name` and guesses types; so the names are checked first, fire is handed a recorder in place
    of `main`, strings are kept as they are, and the other types are compared with the annotation.

    Raises: Stop, with the nearest flag where one is misspelt.
    """
    signature = inspect.signature(main)
    kinds = {name: _kind(p.annotation) for name, p in signature.parameters.items()}
    _check_names(kinds, args)
    strings = {name: str for name, kind in kinds.items() if kind is str}
    recorded: dict[str, Any] = {}

    @fire.decorators.SetParseFns(**strings)
    @functools.wraps(main)
    def recorder(**flags: Any) -> None:
        recorded.update(flags)

    # fire reads the wrapped signature; anything it still cannot place is a value without a flag
    fire.Fire(recorder, command=list(args))
    return {name: _value(name, kinds[name], value) for name, value in recorded.items()}


def _kind(annotation: Any) -> type:
    return next((kind for kind in get_args(annotation) if kind is not type(None)), annotation)


def _check_names(kinds: dict[str, type], args: Sequence[str]) -> None:
    known = [*kinds, *(f'no{name}' for name, kind in kinds.items() if kind is bool)]
    takes_value, seen = False, set()
    for arg in args:
        flag = re.fullmatch(r'--?([A-Za-z][\w-]*)(=.*)?', arg, re.DOTALL)
        if flag is None:
            if not takes_value:
                raise Stop(
                    f'{arg!r} belongs to no flag; flags are written --flag VALUE. See --help'
                )
            takes_value = False
            continue
        name = flag[1].replace('-', '_')
        if name not in known or not arg.startswith('--'):
            near = difflib.get_close_matches(name, known, n=1)
            hint = f'; did you mean --{near[0]}?' if near else '.'
            raise Stop(f'there is no flag {arg.split("=")[0]}{hint} See --help')
        if name in seen:
            raise Stop(f'--{name} is given twice')
        if name not in kinds and flag[2]:
            raise Stop(f'--{name} takes no value')
        seen.add(name)
        takes_value = flag[2] is None and name in kinds


def _value(name: str, kind: type, value: Any) -> Any:
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        article = {int: 'a whole number', float: 'a number', bool: 'no value (or --no' + name + ')'}
        raise Stop(f'--{name} takes {article[kind]}, not {value!r}')
    if kind is str and value in ('', 'True', 'False'):  # what fire makes of a bare --name
        raise Stop(f'--{name} needs a value: --{name} VALUE')
    return value
