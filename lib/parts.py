"""The parts of infer.py's work: the predictions of one fold's model for one set of images."""

import hashlib
import json
import shlex
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from lib import files, locks
from lib.cli import Stop
from lib.images import cache
from lib.runs import WEIGHTS, Run
from lib.tables import FINGERPRINT, OOF_COLUMNS, read_csv

PREDS = ['pred', 'pred_plain']
# To be raised by one where the same settings give other predictions. 2: each model has draws of its
# own. A record without it is of version 1
DRAWS = 2


@dataclass(frozen=True)
class Settings:
    """The settings that decide predictions, beside the weights; saved in the record of a part."""

    n_tta: int
    seed: int
    batch_size: int
    precision: str  # with 'auto' a part of any precision will do

    def matches(self, record: dict[str, Any]) -> bool:
        """Whether a part with this record was made with these settings."""
        asked = asdict(self)
        if self.precision == 'auto':
            del asked['precision']
        return asked.items() <= record.items()


@dataclass(frozen=True)
class Part:
    """Images that one fold's model predicts: held-out images, test images, or those of --images."""

    run: Run
    k: int  # the fold
    kind: str  # 'oof', 'test', or 'images' for infer.py --images
    rows: pd.DataFrame  # of folds.csv

    def __str__(self) -> str:
        return f'{self.run}: fold {self.k}, {len(self.rows)} {self.kind} images'

    @property
    def path(self) -> Path:
        """The CSV of the part, written last: its existence means that the part is finished."""
        return self.run.fold(self.k) / f'tta_{self.kind}.csv'

    @property
    def lock(self) -> Path:
        """The lock of the process that predicts the part."""
        return self.path.with_name(f'.{self.path.stem}.lock')

    @property
    def weights(self) -> Path:
        """The weights of the fold's model."""
        return self.run.fold(self.k) / WEIGHTS

    @property
    def pooled_path(self) -> Path:
        """The CSV of the run, of all folds together."""
        return self.run.folder / f'{self.kind}.csv'

    @cached_property
    def weights_sha256(self) -> str:
        """The hash of the weights that the fold has now."""
        return files.sha256(self.weights)

    @property
    def record(self) -> dict[str, Any]:
        """The settings that the part was made with; empty where it is not made.

        Older versions of infer.py wrote one record, infer.json, for all parts of a run.
        """
        path, old = self.path.with_suffix('.json'), self.run.folder / 'infer.json'
        if old.exists() and self.pooled_path.exists():
            record = files.read_json(old)
            of_fold = dict(enumerate(record.get('weights_sha256', [])))
            return record | {'weights_sha256': of_fold.get(self.k)}
        return files.read_json(path) if path.exists() and self.path.exists() else {}

    @property
    def has_current_weights(self) -> bool:
        """Whether the part is made, by the weights that the fold has now."""
        return self.record.get('weights_sha256') == self.weights_sha256

    @property
    def has_current_images(self) -> bool:
        """Whether a part that is made holds the images of folds.csv, which may have other test
        images since. A run does not fit a folds.csv of other labelled images at all.
        """
        if self.kind != 'test':
            return True
        path = self.path if self.path.exists() else self.pooled_path
        if not path.exists():  # another process is about to write it
            return False
        names = read_csv(path, ['image_name'], only=True).image_name
        return set(names) == set(self.rows.image_name)

    def is_made(self, settings: Settings) -> bool:
        """Whether the part is made of its images, with these settings and by the fold's weights.

        Draws of an older version count where all parts have them, and so have been pooled.
        """
        is_current = self.record.get('draws', 1) == DRAWS or self.pooled_path.exists()
        fits = self.has_current_weights and self.has_current_images
        return fits and settings.matches(self.record) and is_current

    @property
    def seeds(self) -> tuple[int, int]:
        """Seeds that give each run and fold its own draws: a hash of the config, and the fold."""
        not_these = ('command', *FINGERPRINT[1:])  # the first decides draws since version 2 of them
        decides = {k: v for k, v in self.run.config.items() if k not in not_these}
        text = json.dumps(decides, sort_keys=True)
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8]), self.k

    def write(
        self, pred: np.ndarray, plain: np.ndarray, settings: Settings, precision: str
    ) -> None:
        """Save predictions, (n,) each in the order of `rows`, and the record of the settings."""
        columns = OOF_COLUMNS if self.kind == 'oof' else ['image_name']
        used = {'precision': precision, 'draws': DRAWS, 'weights_sha256': self.weights_sha256}
        with locks.held(self.run.lock):  # no other process may pool meanwhile
            # they were made without this part
            for name in ('infer.json', 'oof.csv', 'test.csv', 'scores.json', 'heat/heat.json'):
                (self.run.folder / name).unlink(missing_ok=True)
            self.path.unlink(missing_ok=True)
            files.write_json(self.path.with_suffix('.json'), asdict(settings) | used)
            files.write_csv(self.path, self.rows[columns].assign(pred=pred, pred_plain=plain))


def list_parts(run: Run, table: pd.DataFrame, folds: list[int]) -> list[Part]:
    """The parts of a run: of each fold the held-out images, and of each fold the test images.

    `table`: folds.csv. Images that the run leaves out are in no part.
    """
    table = table[~table.image_name.isin(run.config['skipped'])]
    test, labelled = table[table.split == 'test'], table[table.split == 'train']
    labelled = labelled.astype({'fold': int, 'target': int})
    parts = [Part(run, k, 'oof', labelled[labelled.fold == k]) for k in folds]
    return parts + [Part(run, k, 'test', test) for k in folds if len(test)]


def claim(parts: list[Part], settings: Settings) -> Iterator[Part]:
    """The parts that are not made with `settings` and that no other process makes, each locked.

    The rows of a part have the paths of their images in `cached`. Raises: Stop where an image
    cannot be read, before the first part is predicted.
    """
    run = parts[0].run
    missing = [part.rows for part in parts if not part.is_made(settings)]
    if not missing:
        print(f'{run} is finished with these weights and flags')
        return
    cache(pd.concat(missing).drop_duplicates('image_name'), run.home, run.config['size'])
    # all parts, since those of older draws are missing too as soon as one is written
    for part in locks.claim({part.lock: part for part in parts}, lambda p: p.is_made(settings)):
        cached = cache(part.rows, run.home, run.config['size'])
        part = replace(part, rows=part.rows.assign(cached=cached))
        _ = part.weights_sha256  # hashed now, since the fold may be trained again meanwhile
        yield part


def pool(parts: list[Part]) -> dict[str, pd.DataFrame]:
    """A run's predictions by kind, 'oof' and 'test', as text.

    Those of the test images are the mean over the folds. Files that are pooled already are read.
    """
    pooled = {}
    for kind, path in {part.kind: part.pooled_path for part in parts}.items():
        if path.exists():
            pooled[kind] = read_csv(path)
            continue
        tables = [read_csv(part.path) for part in parts if part.kind == kind]
        if kind == 'oof':
            pooled[kind] = pd.concat(tables, ignore_index=True)
        else:
            rows = pd.concat(tables).astype(dict.fromkeys(PREDS, float))
            means = rows.groupby('image_name', sort=False)[PREDS].mean()
            pooled[kind] = means.reset_index()
    return pooled


def join_table(table: pd.DataFrame, oof: pd.DataFrame) -> pd.DataFrame:
    """The rows of folds.csv (`table`) that `oof`, as `pool` returns it, predicts, with PREDS."""
    preds = oof[['image_name', *PREDS]].astype(dict.fromkeys(PREDS, float))
    return table.merge(preds, on='image_name').astype({'fold': int, 'target': int})


def describe_missing(parts: list[Part]) -> str:
    """A sentence that says that parts are missing, and which process makes them."""
    notes = ''.join(dict.fromkeys(locks.describe_holder(part.lock) for part in parts))
    whose = f'another process is making them{notes}; when it has ended, ' if notes else ''
    return f'{parts[0].run}: some predictions are missing; {whose}type this again'


def read_n_tta(parts: list[Part]) -> int:
    """The number of TTA passes in a run's predictions.

    Raises: Stop with the command to type where infer.py still has to make them.
    """
    run = parts[0].run
    if missing := sorted({p.pooled_path.name for p in parts if not p.pooled_path.exists()}):
        why = f'has no {", ".join(missing)}'
    elif not all(part.has_current_weights for part in parts):
        why = 'was trained again since infer.py ran'
    elif not all(part.has_current_images for part in parts):
        why = 'was predicted for other test images'
    elif len(passes := {part.record['n_tta'] for part in parts}) == 1:
        return passes.pop()
    else:
        why = f'has parts of {" and ".join(map(str, sorted(passes)))} TTA passes'
    record = next((part.record for part in parts if part.record), {})
    words = ['python', 'infer.py', '--home', str(run.home), '--only', run.name]
    for flag in ('n_tta', 'seed', 'batch_size'):
        words += [f'--{flag}', str(record[flag])] if flag in record else []
    raise Stop(f'{run} {why}: {shlex.join(words)}')
