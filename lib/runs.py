"""Runs: the folders HOME/runs/NAME, what they were trained with, and what they still lack."""

import re
import shlex
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from lib import files, locks, ranks
from lib.cli import Stop
from lib.tables import FINGERPRINT, OOF_COLUMNS, is_same

WEIGHTS = 'model.safetensors'
BLEND = 'blend.json'  # in the folder of a blend, where a trained run has config.json
MAX_SIZE = 4096  # pixels a side
# Raised by one where training gives other weights for the same flags; 2: the head's start, and
# whole batches. Absent from config.json means 1
RECIPE = 2
# Entries of config.json that are not flags, or that are compared separately
NOT_COMPARED = ('command', 'skipped', 'recipe', *FINGERPRINT)


class Run:
    """A folder under HOME/runs: a run of train.py, a kept blend, or the predictions of others."""

    def __init__(self, folder: Path):
        self.folder, self.name, self.home = folder, folder.name, folder.parent.parent

    def __str__(self) -> str:
        return str(self.folder)

    def fold(self, k: int) -> Path:
        """The folder of fold `k`."""
        return self.folder / f'fold{k}'

    @property
    def skipped(self) -> list[str]:
        """The images that the run leaves out, since they could not be read when it began."""
        return self.config['skipped'] if self.has_begun else []

    @property
    def has_begun(self) -> bool:
        """Whether train.py made it; a blend or the predictions of others have no config.json."""
        return (self.folder / 'config.json').exists()

    @property
    def blend(self) -> dict[str, Any]:
        """The blend.json of a kept blend; empty for anything else."""
        path = self.folder / BLEND
        return files.read_json(path) if path.exists() else {}

    @property
    def config(self) -> dict[str, Any]:
        """The config.json: train.py's flags, the model's mean and std, and the hash of folds.csv.

        Raises: Stop where an entry that rebuilds the model is missing or wrong: a stranger may have
        made the file. timm checks the architecture's name.
        """
        path = self.folder / 'config.json'
        config = files.read_json(path)

        def are_numbers(values: Any, low: float) -> bool:
            good = isinstance(values, list) and len(values) == 3
            return good and all(type(v) in (int, float) and low < v < 1e3 for v in values)

        size, skipped = config.get('size'), config.get('skipped', [])
        good = {
            'arch': isinstance(config.get('arch'), str),
            'size': type(size) is int and 0 < size <= MAX_SIZE,
            'mean': are_numbers(config.get('mean'), -1e3),
            'std': are_numbers(config.get('std'), 0),
            'cutout': isinstance(config.get('cutout', False), bool),
            'folds_sha256': isinstance(config.get('folds_sha256'), str),
            'command': isinstance(config.get('command', ''), str),
            'skipped': isinstance(skipped, list) and all(isinstance(s, str) for s in skipped),
        }
        if wrong := [key for key, is_good in good.items() if not is_good]:
            raise Stop(
                f'{path}: {", ".join(wrong)} is missing or holds what train.py never writes there; '
                'mend it, or name the other runs with --only'
            )
        return {'cutout': False, 'skipped': [], 'command': '', 'recipe': 1} | config

    def check(
        self, config: dict[str, Any], defaults: dict[str, Any], folds: Iterable[int] = ()
    ) -> None:
        """Check that the run can go on with `config`; a flag that is absent means its default.

        Raises: Stop where the run has begun with other flags, on another folds.csv, or by another
        version of the recipe, so that it cannot train `folds` to the end.
        """
        path = self.folder / 'config.json'
        if not path.exists():
            return
        saved = {k: defaults.get(k) for k in config} | files.read_json(path)
        differing = [k for k in saved if saved[k] != config.get(k) and k not in NOT_COMPARED]
        if not is_same(files.read_json(path), config):
            raise Stop(
                f'folds.csv has changed since {self} began, so its folds mean something else now; '
                'bring the old folds.csv back, or train under another --name'
            )
        if differing:
            pairs = ', '.join(f'{k} {saved[k]!r} (now {config.get(k)!r})' for k in differing)
            raise Stop(f'{self} was made with other flags: {pairs}; give this run another --name')
        if self.config['recipe'] != RECIPE and self.unfinished(folds):
            raise Stop(
                f'{self} was begun by version {self.config["recipe"]} of the recipe, and this code '
                f'trains by version {RECIPE}. Train it anew under another --name, or finish it by '
                "the code that began it (its folds' run.json name the commit)"
            )

    def begin(self, config: dict[str, Any], defaults: dict[str, Any]) -> None:
        """Write config.json, or check the one that is there. Raises: Stop as `check` does."""
        with locks.held(self.lock):  # another process may begin the run at the same time
            path, results = self.folder / 'config.json', ('state.pt', WEIGHTS, 'oof.csv')
            if not path.exists():
                if made := [p for p in sorted(self.folder.glob('fold*/*')) if p.name in results]:
                    why = 'is there and no config.json says what it was made with'
                    raise Stop(f'{made[0]} {why}; bring {path} back, or choose another --name')
                if any((self.folder / name).exists() for name in (BLEND, 'oof.csv', 'test.csv')):
                    why = 'holds a blend or the predictions of others'
                    raise Stop(f'{self} {why}; choose another --name')
                files.write_json(path, config)
        self.check(config, defaults)
        if self.skipped != config.get('skipped', self.skipped):
            raise Stop(f'{self} was begun meanwhile with other images left out; type this again')

    @property
    def lock(self) -> Path:
        """The lock for files that any of several processes may write."""
        return self.folder / '.lock'

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

    def finish(self, k: int, held_out: pd.DataFrame, pred: np.ndarray, about: dict) -> None:
        """Write `about` to run.json, and fold `k`'s held-out rows with `pred`, (n,), to oof.csv.

        oof.csv is written last: its existence means that the fold is finished.
        """
        files.write_json(self.fold(k) / 'run.json', about)
        oof = held_out[OOF_COLUMNS].assign(pred_plain=pred)
        files.write_csv(self.fold(k) / 'oof.csv', oof)
        if not ranks.following:
            (self.folder / 'scores.json').unlink(missing_ok=True)  # of earlier weights
            (self.fold(k) / 'state.pt').unlink(missing_ok=True)

    def read_oof(self, folds: Iterable[int]) -> pd.DataFrame:
        """The folds' held-out images with train.py's plain predictions: OOF_COLUMNS, pred_plain."""
        paths = [self.fold(k) / 'oof.csv' for k in folds]
        return pd.concat([pd.read_csv(path, dtype={'image_name': str}) for path in paths])

    @property
    def trained_folds(self) -> list[int]:
        """The folds that are trained and scored."""
        return sorted(int(path.parent.name[4:]) for path in self.folder.glob('fold*/oof.csv'))

    def check_fingerprint(self, fingerprint: dict[str, str]) -> None:
        """Check the `fingerprint` of folds.csv. Raises: Stop where the run has another."""
        if not is_same(self.config, fingerprint):
            raise Stop(
                f'{self} was trained on another {self.home / "folds.csv"}, so its held-out images '
                'are others; bring that file back, or name the other runs with --only'
            )

    def describe_unfinished(self, folds: list[int]) -> str:
        """A sentence that names the unfinished folds, who trains them, and what trains the rest."""
        notes = ((k, locks.describe_holder(self.fold(k) / '.lock')) for k in self.unfinished(folds))
        missing = ', '.join(f'{k}{note}' for k, note in notes)
        saved, command = self.config['command'], 'python train.py with its flags'
        if saved.startswith('python train.py') and saved.isprintable():  # it may be a stranger's
            # the run may have been moved or renamed since
            words = re.sub(r" --(home|name) ('[^']*'|\S+)", '', saved)
            command = f'{words} {shlex.join(["--home", str(self.home), "--name", self.name])}'
        return f'{self}: fold {missing} still to be trained: {command}'


def run_folder(home: Path, name: str) -> Path:
    """HOME/runs/NAME. Raises: Stop where `name` is not a plain folder name, or is a hidden one."""
    if not re.fullmatch(r'[\w+-][\w.+-]*', name):
        raise Stop(f'--name {name!r} must be letters, digits and _ + -, and . after the first')
    return home / 'runs' / name


def find_runs(home: Path, only: str | None = None, predicted: bool = False) -> list[Run]:
    """The runs that train.py has begun, in order of name, or those that `only` names.

    With `predicted` also the predictions of others, which are folders with oof.csv or test.csv,
    and kept blends where `only` names them. `only`: names with commas between. Raises: Stop where
    one of them is missing, or where there is no run.
    """
    marks = ('config.json', 'oof.csv', 'test.csv') if predicted else ('config.json',)
    paths = sorted(path for mark in marks for path in home.glob(f'runs/[!.]*/{mark}'))
    runs = {path.parent.name: Run(path.parent) for path in paths}
    if only is not None:
        names = [only] if only in runs else [name.strip() for name in only.split(',')]
        if '' in names:
            raise Stop(f'--only {only!r} holds an empty name; put single commas between names')
        if missing := [name for name in names if name not in runs]:
            have = ', '.join(runs) or 'none'
            raise Stop(f'no run named {", ".join(missing)} under {home / "runs"}; there: {have}')
        return [runs[name] for name in dict.fromkeys(names)]
    if not runs:
        raise Stop(f'no run under {home / "runs"}; train one first: python train.py')
    return [run for run in runs.values() if not (run.folder / BLEND).exists()]


def choose_finished(runs: list[Run], folds: list[int], fingerprint: dict[str, str]) -> list[Run]:
    """Those of `runs` that are trained in all `folds`; says what the others miss.

    Raises: Stop where none is, or where one was trained on a folds.csv of another fingerprint.
    """
    for run in runs:
        run.check_fingerprint(fingerprint)
        if missing := run.unfinished(folds):
            print(f'passed over {run.describe_unfinished(missing)}')
    if not (trained := [run for run in runs if not run.unfinished(folds)]):
        raise Stop('no run is trained in all folds; the commands above train what is missing')
    return trained
