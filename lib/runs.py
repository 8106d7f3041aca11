"""Runs: the folders HOME/runs/NAME, what they were trained with, and what they still lack."""

import ast
import hashlib
import re
import shlex
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pandas as pd

from lib import files, locks, ranks
from lib.cli import Stop, split
from lib.tables import EXACT, OOF_COLUMNS, fingerprint

WEIGHTS = 'model.safetensors'
MAX_SIZE = 4096  # pixels a side
NOTES = ('command', 'code_sha256')  # what config.json holds that does not tell two runs apart
ROOT = Path(__file__).parent.parent
CODE = (  # the recipe, of which a change is noticed
    'train.py', 'lib/augment.py', 'lib/data.py', 'lib/images.py', 'lib/learner.py', 'lib/model.py',
    'lib/sampling.py',
)  # fmt: skip


class Run:
    """A folder under HOME/runs: a run of train.py, or predictions that come from elsewhere.

    `asked`: the config.json that train.py's flags ask for; None in the other scripts, which take
    what the file says.
    """

    def __init__(self, folder: Path, asked: dict[str, Any] | None = None):
        self.folder, self.name, self.home = folder, folder.name, folder.parent.parent
        self.asked = asked

    def __str__(self) -> str:
        return str(self.folder)

    def fold(self, k: int) -> Path:
        """The folder of fold `k`."""
        return self.folder / f'fold{k}'

    @property
    def lock(self) -> Path:
        """The lock for files that any of several processes may write."""
        return self.folder / '.lock'

    @property
    def has_begun(self) -> bool:
        """Whether train.py made it; predictions that come from elsewhere have no config.json."""
        return (self.folder / 'config.json').exists()

    @property
    def config(self) -> dict[str, Any]:
        """train.py's flags, the model's mean and std, and the hash of the labelled rows."""
        return self.asked or self.read_config()

    def read_config(self) -> dict[str, Any]:
        """The config.json. Raises: Stop where an entry that rebuilds the model is missing or
        cannot be right, since a stranger may have made the file."""
        path = self.folder / 'config.json'
        config = files.read_json(path)

        def are_numbers(values: Any, low: float) -> bool:
            good = isinstance(values, list) and len(values) == 3
            return good and all(type(v) in (int, float) and low < v < 1e3 for v in values)

        texts, size = ('arch', 'folds_sha256'), config.get('size')
        good = {key: isinstance(config.get(key), str) for key in texts}
        good |= {'size': type(size) is int and 0 < size <= MAX_SIZE}
        good |= {'mean': are_numbers(config.get('mean'), -1e3)}
        good |= {'std': are_numbers(config.get('std'), 0)}
        good |= {'cutout': isinstance(config.get('cutout'), bool)}
        # it is printed for the reader to type
        command = str(config.get('command'))
        good['command'] = command.startswith('python train.py') and command.isprintable()
        if wrong := [key for key, is_good in good.items() if not is_good]:
            raise Stop(
                f'{path}: {", ".join(wrong)} is missing or holds what train.py never writes there; '
                'mend it, or name the other runs with --only'
            )
        return config

    def check(self) -> None:
        """Raises: Stop where the run has begun with other flags or on other labelled rows, or where
        its config.json is gone."""
        if not self.has_begun:
            for path in (p for end in ('*.csv', '*.pt', WEIGHTS) for p in self.folder.rglob(end)):
                why = 'is there, and no config.json that says what it was made with'
                raise Stop(f'{path} {why}; bring that back, or take another --name')
            return
        saved, now = self.read_config(), self.asked
        self.check_folds(now['folds_sha256'])
        differing = [k for k in saved | now if saved.get(k) != now.get(k) and k not in NOTES]
        if differing:
            pairs = ', '.join(f'{k} {saved.get(k)!r} (now {now.get(k)!r})' for k in differing)
            raise Stop(f'{self} was made with other flags: {pairs}; give this run another --name')

    def check_folds(self, sha256: str) -> None:
        """Raises: Stop where the run was begun on labelled rows of another `tables.fingerprint`."""
        if self.read_config()['folds_sha256'] != sha256:
            raise Stop(
                f'{self} was trained on another {self.home / "folds.csv"}: its labelled images, '
                'their labels, groups or folds were others. Bring that file back, take another '
                '--name to train, or name the other runs with --only'
            )

    def warn_of_code(self) -> None:
        """Print a warning where the recipe's code has changed since the run was begun."""
        saved = self.read_config().get('code_sha256') if self.has_begun else None
        if saved not in (None, hash_code()):
            print(
                f'warning: one of {", ".join(CODE)} has changed since {self} was begun; train anew '
                'under another --name'
            )

    def begin(self) -> None:
        """Write config.json, or check the one that is there. Raises: Stop as `check` does."""
        with locks.held(self.lock):  # another process may begin the run at the same time
            self.check()
            if not self.has_begun:
                files.write_json(self.folder / 'config.json', self.asked)

    def weights(self, k: int) -> Path:
        """The weights of fold `k`'s model."""
        return self.fold(k) / WEIGHTS

    def unfinished(self, folds: Iterable[int]) -> list[int]:
        """Those of `folds` that train.py has not finished."""
        return [k for k in folds if not (self.fold(k) / 'oof.csv').exists()]

    def claim(self, folds: Iterable[int]) -> Iterator[int]:
        """Those of `folds` that are unfinished and that no other process trains, each one locked.

        The processes of a launcher all get the same fold, to train it together.
        """
        ranks.join()
        of_lock = {self.fold(k) / '.lock': k for k in folds}
        for k in set(folds) - set(self.unfinished(folds)):
            print(f'{self}: fold {k} is finished')
            (self.fold(k) / 'state.pt').unlink(missing_ok=True)  # a kill may have left it
        yield from ranks.together(locks.claim(of_lock, lambda k: not self.unfinished([k])))

    def finish(self, k: int, held_out: pd.DataFrame, about: dict[str, Any]) -> None:
        """Write `about` to run.json, and fold `k`'s held-out rows with `pred_plain` to oof.csv.

        oof.csv is written last: its existence means that the fold is finished.
        """
        if not ranks.following:
            about = about | {'weights_sha256': files.sha256(self.weights(k))}
            (self.folder / 'scores.json').unlink(missing_ok=True)  # of earlier weights
        files.write_json(self.fold(k) / 'run.json', about)
        files.write_csv(self.fold(k) / 'oof.csv', held_out[[*OOF_COLUMNS, 'pred_plain']])
        if not ranks.following:
            (self.fold(k) / 'state.pt').unlink(missing_ok=True)

    def read_oof(self, folds: Iterable[int]) -> pd.DataFrame:
        """The folds' held-out images with train.py's plain predictions: OOF_COLUMNS, pred_plain. A
        line tells of a fold that has other weights since."""
        oofs = []
        for k in folds:
            record = self.fold(k) / 'run.json'
            saved = files.read_json(record).get('weights_sha256') if record.exists() else None
            if saved not in (None, files.sha256(self.weights(k))):
                print(
                    f'warning: {self.weights(k)} holds other weights than those that made oof.csv'
                )
            path = self.fold(k) / 'oof.csv'
            oofs.append(pd.read_csv(path, dtype={'image_name': str}, **EXACT))
        return pd.concat(oofs)

    @property
    def trained_folds(self) -> list[int]:
        """The folds that are trained and scored."""
        names = (path.parent.name for path in self.folder.glob('fold*/oof.csv'))
        return sorted(int(name[4:]) for name in names if re.fullmatch(r'fold\d+', name))

    def describe_unfinished(self, folds: list[int]) -> str:
        """A sentence that names the unfinished folds, and the command that trains them."""
        where = shlex.join(['--home', str(self.home), '--name', self.name])
        missing = ', '.join(map(str, self.unfinished(folds)))
        return (
            f'{self}: not trained yet: fold {missing}. If no other process trains it, type: '
            f'{self.config["command"]} {where}'
        )


def hash_code() -> str:
    """The SHA-256 of the syntax of CODE, in which comments, layout and docstrings do not count."""

    def describe(node: Any) -> Any:  # not ast.dump, whose text differs between versions of Python
        if isinstance(node, list):
            return [describe(child) for child in node]
        if not isinstance(node, ast.AST):
            return repr(node)
        kinds = (ast.Module, ast.ClassDef, ast.FunctionDef)
        if isinstance(node, kinds) and ast.get_docstring(node):
            node.body = node.body[1:]
        fields = [(k, v) for k, v in ast.iter_fields(node) if v is not None and v != []]
        return [type(node).__name__, *((name, describe(value)) for name, value in fields)]

    trees = [ast.parse((ROOT / name).read_text(encoding='utf-8')) for name in CODE]
    return hashlib.sha256(repr(describe(trees)).encode()).hexdigest()


def run_folder(home: Path, name: str) -> Path:
    """HOME/runs/NAME. Raises: Stop where `name` is not a plain folder name, or is a hidden one."""
    if not re.fullmatch(r'[\w+-][\w.+-]*', name):
        raise Stop(f'--name {name!r} must be letters, digits and _ + -, and . after the first')
    return home / 'runs' / name


def find_runs(home: Path, only: str | None = None, predicted: bool = False) -> list[Run]:
    """The runs that train.py has begun, in order of name, or those that `only` names.

    With `predicted` also predictions from elsewhere, which are folders with oof.csv or test.csv.
    `only`: names with commas between. Raises: Stop where one is missing, or where there is no run.
    """
    marks = ('config.json', 'oof.csv', 'test.csv') if predicted else ('config.json',)
    paths = sorted(path for mark in marks for path in home.glob(f'runs/[!.]*/{mark}'))
    runs = {path.parent.name: Run(path.parent) for path in paths}
    if not runs:
        raise Stop(f'no run under {home / "runs"}; train one first: python train.py')
    if only is None:
        return list(runs.values())
    names = split(only)
    if missing := [name for name in names if name not in runs]:
        there = ', '.join(runs)
        if (home / 'runs' / missing[0] / 'oof.csv').exists():
            raise Stop(f'{missing[0]} has predictions and no models, so it serves blend.py alone')
        raise Stop(
            f'no run named {", ".join(map(repr, missing))} under {home / "runs"}; there: {there}'
        )
    return [runs[name] for name in dict.fromkeys(names)]


def choose_finished(runs: list[Run], table: pd.DataFrame) -> list[Run]:
    """Those of `runs` that are trained in all folds of `table`, folds.csv, or that come from
    elsewhere; says what others miss.

    Raises: Stop where none is, or where one was trained on other labelled rows.
    """
    labelled = table[table.split == 'train']
    folds, sha256 = sorted(labelled.fold.astype(int).unique().tolist()), fingerprint(labelled)
    unfinished = [run for run in runs if run.has_begun and run.unfinished(folds)]
    for run in (run for run in runs if run.has_begun):
        run.check_folds(sha256)
    for run in unfinished:
        print(f'passed over {run.describe_unfinished(folds)}')
    if len(unfinished) == len(runs):
        raise Stop('no run is trained in all folds; the commands above train what is missing')
    return [run for run in runs if run not in unfinished]
