"""folds.csv, the table that all later scripts read, and the checks of any table."""

import hashlib
import os
import re
import unicodedata
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import pandas as pd

from lib import layouts, splits
from lib.cli import Stop

EXACT = {}  # how pd.read_csv reads a number to its last bit
if int(pd.__version__.split('.')[0]) < 3:  # what version 3 does by itself
    EXACT = {'float_precision': 'round_trip'}
    pd.options.mode.copy_on_write = True
    pd.options.future.no_silent_downcasting = True
COLUMNS = [
    'image_name', 'path', 'split', 'source', 'patient_id', 'group', 'target', 'diagnosis', 'sex',
    'age_approx', 'anatom_site', 'skin_tone', 'width', 'height', 'fold',
]  # fmt: skip
SUFFIX = re.compile(f'({"|".join(map(re.escape, layouts.SUFFIXES))})$', re.IGNORECASE)
WORDS = {word: name for name, others in layouts.NAMES.items() for word in (name, *others)}
OOF_COLUMNS = ['image_name', 'patient_id', 'group', 'source', 'fold', 'target']
COMPETITION, ISIC2024, OWN = 'competition', 'isic2024', 'own'  # the sources of their own images


class Competition(NamedTuple):
    """A competition's own words and its measure; the first of COMPETITIONS is the default."""

    source: str  # of its own images
    id_column: str  # of its submission
    measure: str  # of score.MEASURES, what it is scored by
    diagnoses: Sequence[str]  # what else is a target of 1, of images that it did not label itself


COMPETITIONS = {
    c.source: c
    for c in (
        Competition(COMPETITION, 'image_name', 'auc', ()),
        Competition(OWN, 'image_name', 'auc', ()),
        Competition(
            ISIC2024, 'isic_id', 'pauc_80',
            ('melanoma', 'basal cell carcinoma', 'squamous cell carcinoma'),
        ),
    )
}  # fmt: skip


def competition_of(*tables: pd.DataFrame | None) -> Competition:
    """The competition whose own images are among the rows of `tables` (source)."""
    sources = {source for table in tables if table is not None for source in table.source.unique()}
    return next(
        (c for c in COMPETITIONS.values() if c.source in sources), COMPETITIONS[COMPETITION]
    )


def read_csv(
    path: Path, columns: Sequence[str] = (), may_be_empty: bool = False, only: bool = False
) -> pd.DataFrame:
    """The rows of a CSV file as text, empty cells as NaN; `only` its `columns`, or all.

    Columns have the names of folds.csv, whatever word of NAMES the file has for them. Names of
    images are in Unicode's NFC and have no suffix. Blanks at both ends of a cell are left out.
    Where several rows have a placeholder such as -1 for a patient or lesion, it becomes NaN, and a
    line counts them.

    Raises: Stop where it is missing, without rows unless it `may_be_empty`, no CSV in UTF-8,
    separated by anything but commas, without one of `columns`, or where two columns of one meaning
    hold different values.
    """
    options = {'dtype': str, 'encoding': 'utf-8-sig', 'skipinitialspace': True}
    options |= {'keep_default_na': False, 'na_values': ['']}  # a patient may be called NA
    columns = list(map(name_of, columns))
    wanted = (lambda column: name_of(column) in columns) if only else None
    try:
        with warnings.catch_warnings():
            # by default pandas would shift every column where a row is longer than the header
            warnings.simplefilter('error', pd.errors.ParserWarning)
            header = pd.read_csv(path, header=None, nrows=1, **options).iloc[0].dropna()
            for separator, name in (('\t', 'tabs'), (';', 'semicolons')):
                if len(header) == 1 and separator in header.iloc[0]:
                    raise Stop(f'{path} is separated by {name}; save it as CSV, with commas')
            table = pd.read_csv(path, index_col=False, usecols=wanted, **options)
    except (FileNotFoundError, IsADirectoryError):
        raise Stop(f'{path} is missing') from None
    except (ValueError, pd.errors.ParserWarning) as e:
        reason = ' '.join(str(e).split())
        raise Stop(f'{path} cannot be read as CSV in UTF-8 ({reason}); save it as that') from None
    if header.duplicated().any():  # pandas would give the second another name
        raise Stop(f'{path} has the column {header[header.duplicated()].iloc[0]} twice; drop one')
    there = ', '.join(c if c.isprintable() else repr(c) for c in table)
    table = table.rename(columns=name_of)
    if missing := [column for column in columns if column not in table]:
        raise Stop(f'{path} lacks the column {", ".join(missing)}; it has {there}')
    if table.empty and not may_be_empty:
        raise Stop(f'{path} has a header and no rows')
    cleaned: dict[str, pd.Series] = {}
    for i, name in enumerate(table.columns):
        cells = _clean(table.iloc[:, i], path)
        before = cleaned.get(name, cells)
        if (before != cells)[before.notna() & cells.notna()].any():
            raise Stop(f'{path} has two columns that mean {name} and differ ({there}); drop one')
        cleaned[name] = before.fillna(cells)
    return pd.DataFrame(cleaned)


def name_of(column: str) -> str:
    """The name in folds.csv of a column that others may call otherwise, as NAMES says."""
    return WORDS.get(column.strip().lower().replace(' ', '_'), column.strip())


class Labels(NamedTuple):
    """How the table of one's own images gives the target."""

    target: str | None = None  # its column
    positive: Sequence[str] = ()  # the values that are a target of 1, or () where they are numbers
    negative: Sequence[str] = ()  # those that are 0; () takes the plainly benign words


LABELS = Labels()


def parse_target(rows: pd.DataFrame, path: Path, labels: Labels = LABELS) -> pd.DataFrame:
    """The rows of the file `path` with a target of '0' or '1'; those without a label are left out,
    and a line counts them. Where words are labels, a line says of each what it is taken for.

    Raises: Stop where there is no column target, or where it is not clear what a value means.
    """
    if (column := name_of(labels.target or 'target')) not in rows:
        raise Stop(f'{path} lacks the column {column}; --target names the column of the target')
    text = rows[column].str.lower()
    sides = {'1': '1', '1.0': '1', 'true': '1', '0': '0', '0.0': '0', 'false': '0'}
    if labels.negative and not labels.positive:
        raise Stop('--negative needs --positive: which values are a target of 1?')
    if labels.positive:
        negative = [word.lower() for word in labels.negative or layouts.BENIGN]
        sides = dict.fromkeys(negative, '0') | {w.lower(): '1' for w in labels.positive}
        counts = text.value_counts()
        if unclear := [word for word in counts.index if word not in sides and not labels.negative]:
            raise Stop(
                f'{path}: is the target of {", ".join(unclear)} 0? If so name all such values by '
                '--negative; those that are named nowhere are left out then'
            )
        if absent := [w for w in (*labels.positive, *labels.negative) if w.lower() not in counts]:
            print(f'warning: {path}: no {column} is {", ".join(absent)}')
        for word, n in counts.items():
            print(f'{path}: {n} images of target {sides.get(word, "none, left out")}: {word}')
    elif len(wrong := rows[text.notna() & ~text.isin(sides)]):
        first = f'{path}: the target of {wrong.image_name.iloc[0]} is {wrong[column].iloc[0]!r}'
        raise Stop(f'{first}; expected 0 or 1, or --positive with the words that are 1')
    target = text.map(sides)
    if n := target.isna().sum():
        print(f'{path}: {n} images have no target and are left out')
    return rows.assign(target=target)[target.notna()]


def plain_name(name: str) -> str:
    """An image's name as all tables here have it: in Unicode's NFC, less a suffix such as .jpg."""
    return unicodedata.normalize('NFC', SUFFIX.sub('', name))


def _clean(cells: pd.Series, path: Path) -> pd.Series:
    """A column of text in the file `path`, as `read_csv` promises it."""
    cells = cells.str.strip().where(lambda text: text != '')
    if (name := cells.name) in ('image_name', 'image_name_1', 'image_name_2'):
        return cells.map(plain_name, na_action='ignore')
    if name in ('sex', 'age_approx', 'anatom_site', 'skin_tone'):
        return cells.where(~cells.str.lower().isin(layouts.UNKNOWN))
    if name not in ('patient_id', 'lesion_id', 'group'):
        return cells
    is_nobody = cells.str.lower().isin(layouts.NOBODY) & cells.duplicated(keep=False)
    if name == 'group' or not is_nobody.any():  # a group may be a number, and so 0
        return cells
    words = ', '.join(map(repr, sorted(cells[is_nobody].unique())))
    print(f'{path}: {name} {words} is taken as not known, in {is_nobody.sum()} rows')
    return cells.where(~is_nobody)


def read_folds(path: Path) -> pd.DataFrame:
    """folds.csv, with the checks that one made by hand needs: types, labels, names, folds.

    Returns: COLUMNS, `target` and `fold` as float (NaN on test rows), and `path` made relative to
    the current folder. Raises: Stop.
    """
    if not path.exists():
        raise Stop(f'{path} is missing; python folds.py --home {path.parent} makes it')
    table = read_csv(path, ['image_name', 'path', 'split', 'source', 'group', 'target', 'fold'])
    table = parse_columns(table.reindex(columns=COLUMNS))
    labelled = table.split == 'train'
    refuse(table[table.image_name.duplicated()], '{file}: {image_name} stands twice', path)
    table['fold'] = pd.to_numeric(table.fold, errors='coerce').where(labelled)
    is_fold = (table.fold % 1 == 0) & table.fold.between(0, 999)
    sentence = '{file}: {image_name} is labelled, so its fold must be a whole number from 0 to 999'
    refuse(table[labelled & ~is_fold], sentence, path)
    lacks = table.path.isna() | (labelled & table.group.isna())
    refuse(table[lacks], '{file}: every row needs a path, and every labelled row a group', path)
    refuse(table[table.path.str.contains(r'[\x00-\x1f]')], '{file}: {path!r} is no path', path)
    folder = '' if path.parent == Path() else path.parent
    table['path'] = [os.path.join(folder, p) for p in table.path]
    return table


def refuse(rows: pd.DataFrame, sentence: str, file: Path | None = None) -> None:
    """Raises: Stop where there are `rows`, with the sentence and the cells of the first of them."""
    if len(rows):
        raise Stop(sentence.format(**{**rows.iloc[0], 'file': file}))


def read_labelled(path: Path) -> pd.DataFrame:
    """The labelled rows of folds.csv, with `fold` and `target` as int and a new index.

    Raises: Stop as `read_folds` does, and where a group is in two folds, or where the rows outside
    one of the folds are all of one class.
    """
    labelled = read_folds(path).query("split == 'train'").reset_index(drop=True)
    table = labelled.astype({'fold': int, 'target': int})
    splits.check_groups(table.group, table.fold)
    splits.check_classes(table.target, table.fold)
    return table


def read_split(path: Path) -> tuple[pd.DataFrame | None, ...]:
    """All of folds.csv, its labelled rows, and its test rows; each None without the file."""
    if not path.exists():
        return None, None, None
    table = read_folds(path)
    labelled = table.query("split == 'train'").astype({'fold': int, 'target': int})
    return table, labelled, table.query("split == 'test'")


def fingerprint(labelled: pd.DataFrame) -> str:
    """The SHA-256 of what in the labelled rows of folds.csv decides the result of a run.

    Paths, native sizes and descriptions of the patient make no difference, nor do the test images:
    a run fits every folds.csv that agrees in the rest. Nor does the order of the rows, on which
    only the draws depend.
    """
    rows = labelled[['image_name', 'source', 'group', 'target', 'fold']]
    rows = rows.astype({'target': int, 'fold': int}).sort_values('image_name')
    return hashlib.sha256(rows.to_csv(index=False, lineterminator='\n').encode()).hexdigest()


def format_folds(table: pd.DataFrame) -> str:
    """The text of folds.csv, the same on every system; `table` has COLUMNS."""
    integers = dict.fromkeys(('target', 'width', 'height', 'fold'), 'Int64')
    return table[COLUMNS].astype(integers).to_csv(index=False, lineterminator='\n')


def parse_numbers(text: pd.Series) -> pd.Series:
    """Numbers of a column of text as float, to the last bit in any pandas; else NaN."""
    return text.where(pd.to_numeric(text, errors='coerce').notna()).astype(float)


def check_names(table: pd.DataFrame, column: str = 'image_name') -> None:
    """Check that the names in `column`, of text, can be parts of paths. Raises: Stop."""
    is_name = table[column].str.fullmatch(r'[^/\\:\x00-\x1f]*[^/\\:\x00-\x1f.]')
    expected = 'a name without slashes, backslashes and colons that does not end in a dot'
    refuse(table[~is_name], f'{{{column}!r}} is no {column}; expected {expected}')


def parse_columns(table: pd.DataFrame) -> pd.DataFrame:
    """`table` with the types of folds.csv and the competition's words for what it describes.

    `target` becomes float, NaN on test rows; ages in years and sizes in pixels become float, NaN
    where they cannot be true. Lines count what is not understood and becomes empty.

    Raises: Stop where a name is impossible or repeated, a label is not 0 or 1, a split is unknown,
    or no row is labelled.
    """
    for column in ('image_name', 'source'):
        table[column] = table[column].astype(object).fillna('')
        check_names(table, column)
    is_repeated = table.duplicated(['source', 'image_name'])
    refuse(table[is_repeated], '{image_name} stands twice in {source}')
    other = ~table.split.isin(['train', 'test'])
    refuse(table[other], "the column split may hold only 'train' and 'test'")
    labelled = table.split == 'train'
    target = pd.to_numeric(table.target, errors='coerce')
    wrong = labelled & ~target.isin([0, 1])
    refuse(table[wrong], 'the target of {image_name} is {target!r}; expected 0 or 1')
    if not labelled.any():
        raise Stop('there is no labelled image, so there is nothing to train on')
    table['target'] = target.where(labelled)
    table['diagnosis'] = table.diagnosis.map(lambda d: layouts.DIAGNOSES.get(str(d).lower(), d))
    table['anatom_site'] = table.anatom_site.map(lambda s: layouts.SITES.get(str(s).lower(), s))
    table['skin_tone'] = table.skin_tone.astype(object).str.removesuffix('.0')
    sex = table.sex.map(
        lambda word: layouts.SEXES.get(word.lower(), word.lower()), na_action='ignore'
    )
    parsed = {'sex': sex.where(sex.isin(['male', 'female']))}
    for column, most in (('age_approx', 120), ('width', 1e6), ('height', 1e6)):
        text = table[column].map(lambda cell: str(cell).rstrip('+'), na_action='ignore')  # 85+
        number = parse_numbers(text)
        is_whole = (number % 1 == 0) | (column == 'age_approx')  # pixels are whole
        parsed[column] = number.where(number.between(0, most) & is_whole)
    for column, values in parsed.items():
        lost = table[column][values.isna() & table[column].notna()]
        if len(lost):
            print(f'{column}: {len(lost)} cells are not understood, such as {lost.iloc[0]!r}')
        table[column] = values
    return table
