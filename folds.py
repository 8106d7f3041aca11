"""Make folds.csv, one checked table with leak-free folds, from tables and JPEGs.

python folds.py                   # one's own images, or a competition, under data/
python folds.py --demo            # synthetic lesions and a home for them, where there is no data
python folds.py --check FILE      # whether anybody's table of folds leaks
"""

from pathlib import Path

from lib import cli  # first, since it checks the versions of packages

# isort: split
import pandas as pd

from lib import archives, files, shortcuts, splits, tables
from lib.demo import make as make_demo
from lib.home import choose_folds, write_folds


def main(
    *,
    data: str = 'data',  # folder of the tables and images, one's own or a competition's; only read
    home: str = '.',  # folder that folds.csv is written to
    n_folds: int = 5,  # number of folds
    seed: int = 0,  # the same seed gives the same folds, byte for byte
    # folders under DATA/external to add, such as isic2019,isic2017, or 'none'; by default all that
    # are known. Of an image that several sets have, the copy of the first is kept
    external: str | None = None,
    target: str | None = None,  # the column of the target in DATA's table, where it is not `target`
    positive: str | None = None,  # words that are a target of 1, with commas, if targets are words
    negative: str | None = None,  # words that are 0, and drop all others; default: nevus and so on
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

    write_folds(table, home)
    with_licence = table[table.source.isin(table.source[table.licence.notna()])]
    if len(with_licence):  # for the card of infer.py --export
        credits = with_licence.groupby(['source', 'licence', 'attribution'], dropna=False).size()
        files.write_csv(home / 'attribution.csv', credits.rename('images').reset_index())
    print_folds(table[labelled])
    # The AUC of a model that sees no pixel, to compare every later score with
    print(shortcuts.measure(table[labelled])[1])
    n_train, n_test = labelled.sum(), (~labelled).sum()
    print(f'{home / "folds.csv"}: {n_train} labelled images, {n_test} to predict')


def print_folds(table: pd.DataFrame) -> None:
    """Print the counts of images, groups and malignant ones by fold and source."""
    columns = {'images': ('target', 'size'), 'groups': ('group', 'nunique')}
    columns |= {'malignant': ('target', 'sum'), 'rate': ('target', 'mean')}
    table = table.astype({'fold': int, 'target': int})
    rows = table.groupby(['fold', 'source']).agg(**columns)
    print(rows.reset_index().to_string(index=False, formatters={'rate': '{:.2%}'.format}))


if __name__ == '__main__':
    cli.run(main)
