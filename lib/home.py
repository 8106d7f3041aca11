"""HOME/folds.csv as folds.py makes it, so that the runs that were trained on it stay good."""

import os
from pathlib import Path

import pandas as pd

from lib import files, locks, splits, tables
from lib.cli import Stop


def choose_folds(rows: pd.DataFrame, home: Path, n_folds: int, seed: int) -> pd.Series:
    """The fold of each of the labelled `rows`: that of their column fold, if they have one. Else,
    where runs exist and no flag asks for others, those of HOME/folds.csv are kept. Else new ones
    are assigned. Raises: Stop where some have a fold and others not."""
    if rows.fold.notna().any():
        fold = pd.to_numeric(rows.fold, errors='coerce')
        wrong = rows[~((fold % 1 == 0) & (fold >= 0))]
        expected = 'expected 0, 1, ... or no such column'
        tables.refuse(wrong, f'the fold of {{image_name}} is {{fold!r}}; {expected}')
        if (n_folds, seed) != (5, 0):
            raise Stop('the table has a column fold; drop it, or leave --n_folds and --seed out')
        print('the folds are those of the column fold')
        return fold
    path = home / 'folds.csv'
    if has_runs(home) and (n_folds, seed) == (5, 0):
        kept = rows.image_name.map(tables.read_labelled(path).set_index('image_name').fold)
        if kept.notna().all() and not splits.find_leaks(rows.group, kept):
            print(f'the folds of {path} are kept, since runs were trained on them')
            return kept
    return pd.Series(splits.assign_folds(rows, n_folds, seed), rows.index)


def has_runs(home: Path) -> bool:
    """Whether runs have begun that HOME/folds.csv must fit."""
    return (home / 'folds.csv').exists() and any(home.glob('runs/*/config.json'))


def write_folds(table: pd.DataFrame, home: Path) -> None:
    """Write HOME/folds.csv, with paths relative to it. Raises: Stop where the runs there were
    trained on other rows."""
    folder = os.path.realpath(home)  # links resolved: '..' is taken from where they lead
    names = {*map(os.path.dirname, table.path)}
    to = {name: os.path.relpath(os.path.realpath(name), folder) for name in names}
    table['path'] = [Path(to[os.path.dirname(p)], Path(p).name).as_posix() for p in table.path]
    path, text = home / 'folds.csv', tables.format_folds(table)
    with locks.held(home / '.lock'):
        if has_runs(home):
            old = tables.fingerprint(tables.read_labelled(path))
            if old != tables.fingerprint(table[table.split == 'train']):
                raise Stop(
                    f'the labelled images of {path}, their groups or their folds would change, and '
                    f'the runs under {home / "runs"} were trained on them as they are: choose '
                    'another --home, or move the runs away. Of the same images and groups the '
                    'folds are kept, if --n_folds and --seed are left out'
                )
        files.write_text(path, text)
