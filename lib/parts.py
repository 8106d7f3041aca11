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
from lib.runs import NOTES, Run
from lib.tables import EXACT, OOF_COLUMNS, read_csv

PREDS = ['pred', 'pred_plain']


@dataclass(frozen=True)
class Settings:
    """The flags of infer.py that decide predictions; saved in the record of a part."""

    n_tta: int
    seed: int
    batch_size: int
    precision: str  # with 'auto' a part of any precision will do


@dataclass(frozen=True)
class Part:
    """Images that one fold's model predicts: held-out images, test images, or those of --images."""

    run: Run
    k: int  # the fold
    kind: str  # 'oof', 'test', or 'other' for infer.py --images
    rows: pd.DataFrame  # of folds.csv, or of images.list_images

    def __str__(self) -> str:
        kind = {'oof': 'held-out', 'test': 'test', 'other': 'other'}[self.kind]
        return f'{self.run}: fold {self.k}, {len(self.rows)} {kind} images'

    @property
    def path(self) -> Path:
        """The CSV of the part, written last: its existence means that the part is finished."""
        return self.run.fold(self.k) / f'tta_{self.kind}.csv'

    @property
    def readable(self) -> pd.DataFrame:
        """The rows whose image is in the cache; that of a test image may be impossible to read."""
        return self.rows[self.rows.cached.notna()]

    @property
    def weights(self) -> Path:
        """The weights of the fold's model."""
        return self.run.weights(self.k)

    @cached_property
    def weights_sha256(self) -> str:
        """The hash of the weights that the fold has when this is first asked for."""
        return files.sha256(self.weights)

    @property
    def record(self) -> dict[str, Any]:
        """What the part was made with; empty where it is not made."""
        path = self.path.with_suffix('.json')
        return files.read_json(path) if self.path.exists() and path.exists() else {}

    def changes(self, settings: Settings) -> list[str]:
        """What is other now than when the part was made, in words; empty where it is not made."""
        if not (record := self.record):
            return []
        now = {flag: value for flag, value in asdict(settings).items() if value != 'auto'}
        differing = [flag for flag in now if now[flag] != record.get(flag)]
        words = [f'--{flag} was {record.get(flag)} and is {now[flag]}' for flag in differing]
        if record.get('weights_sha256') != self.weights_sha256:  # it may be trained again
            words.append(f'fold {self.k} has other weights now')
        return words + ([] if is_of(self.path, self.rows) else ['the list of images has changed'])

    def is_made(self, settings: Settings) -> bool:
        """Whether the part is made, and would not be another one now."""
        return bool(self.record) and not self.changes(settings)

    @property
    def seeds(self) -> tuple[int, int]:
        """Seeds that give each run and fold its own draws: a hash of the config, and the fold."""
        decides = {k: v for k, v in self.run.config.items() if k not in NOTES}
        text = json.dumps(decides, sort_keys=True)
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8]), self.k

    def write(self, pred: np.ndarray, plain: np.ndarray, settings: Settings, used: str) -> None:
        """Save predictions, (n,) each in the order of `readable`, and the record of the settings.

        `used`: the precision that they were made in. Other rows get empty cells.
        """
        columns = OOF_COLUMNS if self.kind == 'oof' else ['image_name']
        record = asdict(settings) | {'precision': used, 'weights_sha256': self.weights_sha256}
        preds = pd.DataFrame({'pred': pred, 'pred_plain': plain}, self.readable.index)
        with locks.held(self.run.lock):  # no other process may pool meanwhile
            self.path.unlink(missing_ok=True)
            files.write_json(self.path.with_suffix('.json'), record)
            files.write_csv(self.path, self.rows[columns].join(preds))


def list_parts(run: Run, table: pd.DataFrame) -> list[Part]:
    """The parts of a run: of each fold the held-out images, and of each fold the test images.

    `table`: folds.csv.
    """
    labelled, test = table[table.split == 'train'], table[table.split == 'test']
    by_fold = list(labelled.astype({'fold': int, 'target': int}).groupby('fold'))
    parts = [Part(run, k, 'oof', rows) for k, rows in by_fold]
    return parts + [Part(run, k, 'test', test) for k, _ in by_fold if len(test)]


def is_of(path: Path, rows: pd.DataFrame) -> bool:
    """Whether the predictions in the file `path` are of just the images of `rows`."""
    return set(read_csv(path, ['image_name'], only=True).image_name) == set(rows.image_name)


def read_settings(parts: list[Part], settings: Settings) -> Settings:
    """The settings that all parts of a run were made with, or `settings` where they differ."""
    flags = {flag: parts[0].record.get(flag) for flag in asdict(settings)}
    saved = Settings(**flags)
    return saved if all(part.is_made(saved) for part in parts) else settings


def read_prior(run: Run) -> float | None:
    """The --prior that a run's pooled predictions were made with; None where there was none."""
    path = run.folder / 'oof.json'
    return files.read_json(path).get('prior') if path.exists() else None


def claim(parts: list[Part], settings: Settings) -> Iterator[Part]:
    """The parts that are not made with `settings` and that no other process makes, each locked.

    A line says before what will be replaced, and why. What was pooled stays until `save`.
    The rows of a part have the paths of their images in `cached`. Raises: Stop where a labelled
    image cannot be read, before the first part is predicted.
    """
    parts[0].run.warn_of_code()
    missing = [part for part in parts if not part.is_made(settings)]
    if not missing:
        print(f'{parts[0].run} is finished with these weights and flags')
        return
    if changes := dict.fromkeys(word for part in missing for word in part.changes(settings)):
        print(f'{parts[0].run}: predictions will be replaced, since {"; ".join(changes)}')
    missing = cache_images(missing, parts[0].run.home)
    of_lock = {part.path.with_name(f'.{part.path.stem}.lock'): part for part in missing}
    for part in locks.claim(of_lock, lambda part: part.is_made(settings)):
        _ = part.weights_sha256  # of the weights that are loaded now
        yield part


def cache_images(parts: list[Part], home: Path) -> list[Part]:
    """The parts of a run with `cached` in their rows, the paths of the images in `home`; None for
    one without a label that cannot be read. Raises: Stop where a labelled one cannot."""
    paths: dict[str, Path | None] = {}
    for kind in dict.fromkeys(part.kind for part in parts):
        rows = pd.concat([part.rows for part in parts if part.kind == kind])
        rows = rows.drop_duplicates('image_name')
        cached = cache(rows, home, parts[0].run.config['size'], may_fail=kind != 'oof')
        paths |= dict(zip(rows.image_name, cached, strict=True))
    of_part = (part.rows.assign(cached=part.rows.image_name.map(paths)) for part in parts)
    return [replace(part, rows=rows) for part, rows in zip(parts, of_part, strict=True)]


def pool(parts: list[Part], settings: Settings) -> dict[str, pd.DataFrame] | None:
    """A run's predictions by kind, 'oof' and 'test'; those of test images are means over folds.
    None where one is not made with `settings`, since another process makes it; a line says so.

    A test image that could not be read gets the median of the others, and a line says so: it may
    be one that nobody can replace, and a submission needs every row.
    """
    if not all(part.is_made(settings) for part in parts):
        return print(f'{parts[0].run}: another process predicts the rest; type this again later')
    types = {'image_name': str, 'patient_id': str, 'group': str, 'source': str}
    tables: dict[str, list[pd.DataFrame]] = {}
    for part in parts:
        tables.setdefault(part.kind, []).append(pd.read_csv(part.path, dtype=types, **EXACT))
    pooled = {kind: pd.concat(of_folds, ignore_index=True) for kind, of_folds in tables.items()}
    if 'test' in pooled:
        means = pooled['test'].groupby('image_name', sort=False)[PREDS].mean().reset_index()
        if unread := list(means.image_name[means.pred.isna()]):
            print(
                f'{parts[0].run}: {len(unread)} test images that cannot be read get the median '
                f'prediction, such as {unread[0]}. Once they can be read, delete '
                f'{parts[0].run}/fold*/tta_test.csv and type this again'
            )
        pooled['test'] = means.fillna(means[PREDS].median())
    return pooled


def save(
    parts: list[Part], pooled: dict[str, pd.DataFrame], settings: Settings, prior: float | None
) -> None:
    """Write a run's oof.csv and test.csv, and oof.json with what they were made with, `prior` for
    their `prob`; that is away meanwhile, so that they are never of two kinds. The caller holds the
    run's lock."""
    folder = parts[0].run.folder
    for name in ('oof.json', 'scores.json'):
        (folder / name).unlink(missing_ok=True)
    for kind, rows in pooled.items():
        files.write_csv(folder / f'{kind}.csv', rows)
    record = asdict(settings) | {'prior': prior, 'weights_sha256': hash_weights(parts)}
    files.write_json(folder / 'oof.json', record)


def hash_weights(parts: list[Part]) -> list[str]:
    """The hash of each fold's weights."""
    return [part.weights_sha256 for part in parts if part.kind == 'oof']


def join_table(table: pd.DataFrame, oof: pd.DataFrame) -> pd.DataFrame:
    """The rows of folds.csv (`table`) that `oof`, as `pool` returns it, predicts, with PREDS."""
    rows = table.merge(oof[['image_name', *PREDS]], on='image_name')
    return rows.astype({'fold': int, 'target': int})


def check_predicted(runs: list[Run], table: pd.DataFrame | None) -> None:
    """Check the predictions of those runs that were trained here, on `table`, folds.csv; of several
    print the number of passes. Raises: Stop as `read_n_tta` does."""
    for run in runs if table is not None else ():
        if run.has_begun:
            n_tta = read_n_tta(list_parts(run, table))
            if len(runs) > 1:
                print(f'{run}: mean of {n_tta} TTA passes' if n_tta else f'{run}: plain pass')


def read_n_tta(parts: list[Part]) -> int:
    """The number of TTA passes in a run's pooled predictions.

    Raises: Stop with the command to type where infer.py still has to make them.
    """
    run, path = parts[0].run, parts[0].run.folder / 'oof.json'
    rows = {part.kind: pd.concat([p.rows for p in parts if p.kind == part.kind]) for part in parts}
    tables = {run.folder / f'{kind}.csv': of_kind for kind, of_kind in rows.items()}
    record = files.read_json(path) if path.exists() else parts[0].record
    if missing := [made.name for made in (*tables, path) if not made.exists()]:
        why = f'has no {", ".join(missing)}'
    elif record.get('weights_sha256') != hash_weights(parts):
        why = 'was predicted by other weights'
    elif not all(is_of(*table) for table in tables.items()):
        why = 'was predicted for other images'
    else:
        return record['n_tta']
    words = ['python', 'infer.py', '--home', str(run.home), '--only', run.name]
    for flag in ('n_tta', 'seed', 'batch_size'):
        words += [f'--{flag}', str(record[flag])] if flag in record else []
    raise Stop(f'{run} {why}: {shlex.join(words)}')
