"""Tables and JPEGs to one checked table with leak-free folds, folds.csv.

python folds.py                   # Kaggle's layout under data/
python folds.py --demo            # no data? synthetic lesions, and a home for them
python folds.py --check FILE      # does a table of folds, anybody's, leak?
"""

import os
from collections.abc import Iterable
from pathlib import Path

from lib import cli


def main(
    *,
    data: str = 'data',
    home: str = '.',
    n_folds: int = 5,
    seed: int = 0,
    external: str | None = None,
    check: str | None = None,
    fold_column: str = 'fold',
    demo: bool = False,
) -> None:
    """Make HOME/folds.csv, the one table that train.py, infer.py and blend.py read.

    Args:
        data: folder with train.csv, test.csv, sample_submission.csv and the images; only read.
        home: folder that folds.csv is written to.
        n_folds: number of folds.
        seed: the same seed gives the same folds, byte for byte.
        external: sets under DATA/external to add, such as isic2019,isic2017: an image that two
            sets share counts once, for the first. By default all that are there; 'none' for none.
        check: a CSV with folds, anybody's: count the groups that are in two folds, make nothing.
        fold_column: the column of --check's file that holds the fold; a negative fold is none.
        demo: make synthetic images, which are not medical data, and their home in data/demo.
    """
    from lib.splits import assign, groups
    from lib.splits import check as check_folds
    from lib.tables import COLUMNS, EXTERNAL, read_all, read_duplicates

    if check is not None:
        return check_file(Path(check), fold_column, read_duplicates(Path(data)))
    cli.at_least(2, n_folds=n_folds)
    cli.at_least(0, seed=seed)
    if seed >= 2**32:
        raise cli.Stop(f'--seed must be below {2**32}, not {seed}')
    if demo:
        if (data, home) != ('data', '.'):
            raise cli.Stop('--demo has a place of its own, data/demo; leave --data and --home out')
        from lib.demo import make

        data = home = make(Path('data/demo'))
        print(f'{home}: synthetic images, drawn by a program. They are not medical data')
    data, home = Path(data), Path(home)
    if not (data / 'train.csv').exists():
        raise cli.Stop(
            f'there is no train.csv in {data}. The README, "Getting the data", says where it comes '
            'from; --data names another folder; --demo makes synthetic images to try it all on'
        )
    sources = chosen(external, data / 'external', EXTERNAL)
    table, dropped = read_all(data, sources)
    for source in sources:
        print(f'{source}: {dropped.get(source, 0)} images dropped that a set before it has')

    pairs = read_duplicates(data)
    if pairs is not None:
        print(f'{len(pairs)} known pairs of duplicates keep their groups together')
    table['group'] = groups(table, pairs)
    labelled = table.split == 'train'
    table.loc[labelled, 'fold'] = assign(table[labelled], n_folds, seed)
    check_folds(table.group[labelled], table.fold[labelled])
    base = os.path.realpath(home)  # links resolved: '..' is taken from where they lead
    table['path'] = [
        Path(os.path.relpath(os.path.realpath(p), base)).as_posix() for p in table.path
    ]
    write(table[COLUMNS], home)
    print_folds(table[labelled])
    print_floor(table[labelled])
    n_test = int((~labelled).sum())
    print(f'{home / "folds.csv"}: {int(labelled.sum())} labelled images, {n_test} to predict')


def chosen(external: str | None, folder: Path, known: Iterable[str]) -> list[str]:
    """The names in --external, in order; by default those in `known` whose folder exists."""
    if external is None:
        return [name for name in known if (folder / name).is_dir()]
    names = [] if external == 'none' else [name.strip() for name in external.split(',')]
    if unknown := [name for name in names if name not in known]:
        raise cli.Stop(f'--external knows {", ".join(known)} and none, not {", ".join(unknown)}')
    if absent := [name for name in names if not (folder / name).is_dir()]:
        raise cli.Stop(f'--external {external}: there is no {folder / absent[0]}')
    return names


def write(table, home: Path) -> None:
    """Write HOME/folds.csv, unless runs were trained on another one there."""
    from lib import files

    path = home / 'folds.csv'
    integers = dict.fromkeys(('target', 'width', 'height', 'fold'), 'Int64')
    text = table.astype(integers).to_csv(index=False, lineterminator='\n')
    if (
        path.exists()
        and path.read_bytes() != text.encode()
        and any(home.glob('runs/*/config.json'))
    ):
        raise cli.Stop(
            f'{path} would change, and the runs under {home / "runs"} were trained on it as it is: '
            'choose another --home, or move the runs away'
        )
    files.sweep(home)
    files.write_text(path, text)


def print_folds(table) -> None:
    """A row a fold and source."""
    rows = table.groupby(['fold', 'source']).agg(
        images=('target', 'size'),
        groups=('group', 'nunique'),
        melanomas=('target', 'sum'),
        rate=('target', 'mean'),
    )
    rows = rows.reset_index().astype({'fold': int, 'melanomas': int})
    print(rows.to_string(index=False, formatters={'rate': '{:.2%}'.format}))


def print_floor(table) -> None:
    """What these folds give a model that sees no pixel: what a score stands beside."""
    from lib import score, shortcuts

    pred, seen = shortcuts.floor(table)
    table = table.assign(pred=pred)
    found = {'pooled': score.part(table, 'pred'), 'seen': seen}
    if table.source.nunique() > 1:
        found['sources'] = score.by_source(table, 'pred')
    print(shortcuts.sentence(found))


def check_file(path: Path, fold_column: str, duplicates) -> None:
    """Print how many groups of any table lie in more than one fold. Raises: Stop if one does."""
    import pandas as pd

    from lib.splits import groups, leaks
    from lib.tables import read_csv

    table = read_csv(path, [fold_column])
    name = next((c for c in ('image_name', 'image_id', 'image') if c in table), None)
    by = next((c for c in ('group', 'patient_id', 'lesion_id') if c in table), None)
    if by is None or name is None:
        raise cli.Stop(f'{path} needs image_name, and one of group, patient_id, lesion_id')
    table['image_name'] = table[name]
    group = table.group.fillna(table.image_name) if by == 'group' else groups(table)
    number = pd.to_numeric(table[fold_column], errors='coerce')
    fold = number.where(number >= 0) if number.notna().any() else table[fold_column]
    used = fold.notna()
    if not used.any():
        raise cli.Stop(f'{path}: no row has a fold in {fold_column}')
    print(f'{path}: {used.sum()} of {len(table)} rows have a fold in {fold_column}')
    leaking = leaks(group, fold)
    n = group[used].nunique()
    print(f'{len(leaking)} of {n} groups (by {by}) are in more than one of {fold.nunique()} folds')
    split = []
    if duplicates is not None:
        of = dict(zip(table.image_name[used], fold[used], strict=True))
        pairs = duplicates.itertuples(index=False)
        split = [(a, b) for a, b in pairs if a in of and b in of and of[a] != of[b]]
        print(f'{len(split)} known pairs of duplicates are in different folds')
    if leaking or split:
        first = leaking[0] if leaking else ' and '.join(split[0])
        raise cli.Stop(f'{path} leaks, for one {first}: a score on these folds is too good')


if __name__ == '__main__':
    cli.run(main)
