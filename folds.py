"""Make folds.csv, one checked table with leak-free folds, from tables and JPEGs.

python folds.py                   # Kaggle's layout under data/
python folds.py --demo            # synthetic lesions and a home for them, where there is no data
python folds.py --check FILE      # whether anybody's table of folds leaks
"""

import os
from pathlib import Path

import pandas as pd

from lib import archives, cli, files, locks, shortcuts, splits, tables
from lib.demo import make as make_demo


def main(
    *,
    data: str = 'data',  # folder of a competition's tables and images, as on Kaggle; only read
    home: str = '.',  # folder that folds.csv is written to
    n_folds: int = 5,  # number of folds
    seed: int = 0,  # the same seed gives the same folds, byte for byte
    # folders under DATA/external to add, such as isic2019,isic2017, or 'none'; by default all that
    # are known. Of an image that several sets have, the copy of the first is kept
    external: str | None = None,
    target: str | None = None,  # the column of the target in DATA's table, where it is not `target`
    positive: str | None = None,  # its values that are a target of 1, with commas, if it has words
    negative: str | None = None,  # its values that are 0; by default benign, nevus, no and the like
    check: str | None = None,  # only count the groups that are in two folds of this CSV
    fold_column: str = 'fold',  # the column of --check's folds; a negative fold is none
    demo: bool = False,  # draw synthetic images, which are not medical data, and use data/demo
) -> None:
    """Make HOME/folds.csv, the one table that train.py, infer.py and blend.py read."""
    if check is not None:
        path, duplicates = Path(check), archives.read_duplicates(Path(data))
        table = tables.read_csv(path, ['image_name', fold_column])
        return splits.report_leaks(path, table, tables.name_of(fold_column), duplicates)
    cli.check_within(2, n_folds=n_folds)
    cli.check_within(0, 2**32 - 1, seed=seed)
    if demo:
        if (data, home) != ('data', '.'):
            raise cli.Stop('--demo has a place of its own, data/demo; leave --data and --home out')
        data = home = make_demo(Path('data/demo'))
        print(f'{home}: synthetic images, drawn by a program. They are not medical data')
    data, home = Path(data), Path(home)
    sets = archives.choose_external(external, data / 'external')
    labels = tables.Labels(target, cli.split(positive), cli.split(negative))
    table, dropped = archives.read_all(data, sets, home, labels)
    for source, n in dropped.items():
        print(f'{source}: {n} images dropped that an earlier set has already')
    duplicates = archives.read_duplicates(data)
    if duplicates is not None:
        print(f'{len(duplicates)} known pairs of duplicates keep their groups together')

    table['group'] = splits.join_groups(table, duplicates)
    labelled = table.split == 'train'
    splits.warn_of_groups(table[labelled], table.group[labelled])
    table['fold'] = choose_folds(table[labelled], home, n_folds, seed)  # test images have none
    splits.check_groups(table.group[labelled], table.fold[labelled])

    folder = os.path.realpath(home)  # links resolved: '..' is taken from where they lead
    names = {*map(os.path.dirname, table.path)}
    to = {name: os.path.relpath(os.path.realpath(name), folder) for name in names}
    table['path'] = [Path(to[os.path.dirname(p)], Path(p).name).as_posix() for p in table.path]
    write(table, home)
    credits = table.groupby(['source', 'licence', 'attribution'], dropna=False).size()
    if len(credits := credits.rename('images').reset_index().dropna(subset='licence')):
        files.write_csv(home / 'attribution.csv', credits)  # for the card of infer.py --export
    print_folds(table[labelled])
    # The AUC of a model that sees no pixel, to compare every later score with
    print(shortcuts.measure(table[labelled])[1])
    n_train, n_test = labelled.sum(), (~labelled).sum()
    print(f'{home / "folds.csv"}: {n_train} labelled images, {n_test} to predict')


def choose_folds(rows: pd.DataFrame, home: Path, n_folds: int, seed: int) -> pd.Series:
    """The fold of each of the labelled `rows`: that of their column fold; else, where runs exist
    and no flag asks for others, that of HOME/folds.csv, which another scikit-learn would not make;
    else new ones. Raises: Stop where some have a fold and others not."""
    if rows.fold.notna().any():
        fold = pd.to_numeric(rows.fold, errors='coerce')
        wrong = rows[(fold % 1 != 0) | (fold < 0)]
        tables.refuse(
            wrong, 'the fold of {image_name} is {fold!r}; expected 0, 1, ... or no column'
        )
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


def write(table: pd.DataFrame, home: Path) -> None:
    """Write HOME/folds.csv. Raises: Stop where the runs there were trained on other rows."""
    path, text = home / 'folds.csv', tables.format_folds(table)
    with locks.held(home / '.lock'):
        if has_runs(home):
            old = tables.fingerprint(tables.read_labelled(path))
            if old != tables.fingerprint(table[table.split == 'train']):
                raise cli.Stop(
                    f'the labelled images of {path}, their groups or their folds would change, and '
                    f'the runs under {home / "runs"} were trained on them as they are: choose '
                    'another --home, or move the runs away; without --n_folds and --seed the folds '
                    'are kept'
                )
        files.write_text(path, text)


def print_folds(table: pd.DataFrame) -> None:
    """Print the counts of images, groups and malignant ones by fold and source."""
    columns = {'images': ('target', 'size'), 'groups': ('group', 'nunique')}
    columns |= {'malignant': ('target', 'sum'), 'rate': ('target', 'mean')}
    table = table.astype({'fold': int, 'target': int})
    rows = table.groupby(['fold', 'source']).agg(**columns)
    print(rows.reset_index().to_string(index=False, formatters={'rate': '{:.2%}'.format}))


if __name__ == '__main__':
    cli.run(main)
