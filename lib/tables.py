"""A competition's layout, and the archives beside it, to one checked table."""

import warnings
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image

from lib.cli import Stop

COLUMNS = [
    'image_name', 'path', 'split', 'source', 'patient_id', 'group', 'target', 'diagnosis', 'sex',
    'age_approx', 'anatom_site', 'width', 'height', 'fold',
]  # fmt: skip
OOF_COLUMNS = ['image_name', 'patient_id', 'group', 'source', 'fold', 'target']
SUFFIXES = ('.jpg', '.jpeg', '.png')
FORMATS = ('JPEG', 'PNG')  # whatever the suffix says; Pillow opens an EPS by a program
CONTROL = r'[\x00-\x1f]'  # characters that no name has
COMPETITION = 'competition'
DUPLICATES = 'ISIC_2020_Training_Duplicates.csv'

DIAGNOSES = {
    'mel': 'melanoma', 'nv': 'nevus', 'bcc': 'basal cell carcinoma', 'ak': 'actinic keratosis',
    'akiec': 'actinic keratosis', 'bkl': 'benign keratosis', 'df': 'dermatofibroma',
    'vasc': 'vascular lesion', 'scc': 'squamous cell carcinoma', 'unk': 'unknown',
}  # fmt: skip
# The competition's names for the sites; a site that is not listed keeps its name
SITES = {
    'anterior torso': 'torso', 'posterior torso': 'torso', 'lateral torso': 'torso',
    'abdomen': 'torso', 'back': 'torso', 'chest': 'torso', 'trunk': 'torso',
    'face': 'head/neck', 'ear': 'head/neck', 'neck': 'head/neck', 'scalp': 'head/neck',
    'foot': 'lower extremity', 'hand': 'upper extremity', 'acral': 'palms/soles',
    'genital': 'oral/genital', 'unknown': None,
}  # fmt: skip


def read_csv(path: Path, columns: Iterable[str] = ()) -> pd.DataFrame:
    """The rows of a CSV file as text, empty cells as NaN.

    Raises: Stop where it is missing, empty, no CSV in UTF-8, or lacks one of `columns`.
    """
    options = {'dtype': str, 'encoding': 'utf-8-sig', 'skipinitialspace': True}
    try:
        with warnings.catch_warnings():
            # by default a row longer than the header would shift every column, silently
            warnings.simplefilter('error', pd.errors.ParserWarning)
            table = pd.read_csv(path, index_col=False, **options)
            header = pd.read_csv(path, header=None, nrows=1, **options).iloc[0].dropna()
    except (FileNotFoundError, IsADirectoryError):
        raise Stop(f'{path} is missing') from None
    except (ValueError, pd.errors.ParserError, pd.errors.ParserWarning) as e:
        reason = ' '.join(str(e).split())
        raise Stop(f'{path} cannot be read as CSV in UTF-8 ({reason}); save it as that') from None
    if header.duplicated().any():  # pandas would give the second another name
        raise Stop(f'{path} has the column {header[header.duplicated()].iloc[0]} twice; drop one')
    if missing := [c for c in columns if c not in table.columns]:
        raise Stop(f'{path} lacks the column {", ".join(missing)}; it has {", ".join(table)}')
    if table.empty:
        raise Stop(f'{path} has a header and no rows')
    return table


def competition(data: Path) -> pd.DataFrame:
    """SIIM-ISIC 2020 as Kaggle lays it out, or a resized copy: training rows, then test rows.

    `data` holds train.csv, test.csv, sample_submission.csv and the images in jpeg/train and
    jpeg/test, or in train and test. Test rows come in sample_submission's order.
    Source: https://www.kaggle.com/c/siim-isic-melanoma-classification/data
    """
    site = 'anatom_site_general_challenge'
    meta = ['image_name', 'patient_id', 'sex', 'age_approx', site]
    train = read_csv(data / 'train.csv', [*meta, 'target'])
    test = read_csv(data / 'test.csv', meta)
    order = read_csv(data / 'sample_submission.csv', ['image_name', 'target']).image_name
    if not order.is_unique or set(order) != set(test.image_name):
        raise Stop(f'{data}/sample_submission.csv and {data}/test.csv name different images')
    test = test.set_index('image_name').loc[order].reset_index().assign(target=np.nan)
    folder = data / 'jpeg' if (data / 'jpeg').is_dir() else data
    parts = []
    for split, rows in (('train', train), ('test', test)):
        rows = rows.rename(columns={site: 'anatom_site'}).assign(split=split, source=COMPETITION)
        parts.append(_with_paths(rows, [folder / split], str(data / f'{split}.csv')))
    return pd.concat(parts, ignore_index=True)


def isic2019(folder: Path) -> pd.DataFrame:
    """ISIC 2019: ground truth (one-hot), metadata, ISIC_2019_Training_Input/.

    Source: https://challenge.isic-archive.com/data/#2019
    """
    truth = read_csv(folder / 'ISIC_2019_Training_GroundTruth.csv', ['image', 'MEL', 'NV'])
    classes = [c for c in truth.columns if c.lower() in DIAGNOSES]
    truth['diagnosis'] = truth[classes].astype(float).idxmax(axis=1).str.lower()
    columns = ['image', 'age_approx', 'anatom_site_general', 'lesion_id', 'sex']
    metadata = read_csv(folder / 'ISIC_2019_Training_Metadata.csv', columns)
    rows = truth.merge(metadata[columns], on='image', how='left', validate='one_to_one').rename(
        columns={'image': 'image_name', 'MEL': 'target', 'anatom_site_general': 'anatom_site'}
    )
    images = folder / 'ISIC_2019_Training_Input'
    return _with_paths(rows, [images, images / images.name], 'the ISIC 2019 ground truth')


def ham10000(folder: Path) -> pd.DataFrame:
    """HAM10000: HAM10000_metadata(.csv) and the images in one or two parts.

    Source: https://doi.org/10.7910/DVN/DBW86T
    """
    path = folder / 'HAM10000_metadata.csv'
    path = path if path.exists() else folder / 'HAM10000_metadata'
    columns = ['lesion_id', 'image_id', 'dx', 'age', 'sex', 'localization']
    rows = read_csv(path, columns).rename(
        columns={
            'image_id': 'image_name', 'dx': 'diagnosis', 'age': 'age_approx',
            'localization': 'anatom_site',
        }
    )  # fmt: skip
    rows['target'] = (rows.diagnosis == 'mel').astype(int)
    parts = ['HAM10000_images_part_1', 'HAM10000_images_part_2', 'ISIC2018_Task3_Training_Input']
    return _with_paths(rows, [folder / part for part in parts], str(path))


def isic2017(folder: Path) -> pd.DataFrame:
    """ISIC 2017, part 3: the ground truth, the metadata and ISIC-2017_Training_Data/.

    Source: https://challenge.isic-archive.com/data/#2017
    """
    images = folder / 'ISIC-2017_Training_Data'
    columns = ['image_id', 'melanoma', 'seborrheic_keratosis']
    rows = read_csv(folder / 'ISIC-2017_Training_Part3_GroundTruth.csv', columns)
    name = 'ISIC-2017_Training_Data_metadata.csv'  # the archive has it among the images
    path = folder / name if (folder / name).exists() else images / name
    metadata = read_csv(path, ['image_id', 'age_approximate', 'sex'])
    rows = rows.merge(metadata, on='image_id', how='left', validate='one_to_one')
    rows['diagnosis'] = np.where(
        rows.melanoma.astype(float) == 1,
        'melanoma',
        np.where(rows.seborrheic_keratosis.astype(float) == 1, 'seborrheic keratosis', 'nevus'),
    )
    rows = rows.rename(
        columns={'image_id': 'image_name', 'melanoma': 'target', 'age_approximate': 'age_approx'}
    )
    return _with_paths(rows, [images], 'the ISIC 2017 ground truth')


# A folder's name under DATA/external to what reads it: a new layout is a function and a line here
EXTERNAL: dict[str, Callable[[Path], pd.DataFrame]] = {
    'isic2019': isic2019,
    'isic2017': isic2017,
    'ham10000': ham10000,
}


def isic_id(names: pd.Series) -> pd.Series:
    """What identifies an image across the archives: ISIC 2019 renamed those that it shrank."""
    return names.str.removesuffix('_downsampled')


def read_all(data: Path, external: Sequence[str]) -> tuple[pd.DataFrame, dict[str, int]]:
    """The competition's rows and those of the external sets, checked, each ISIC id once.

    Returns: the table (COLUMNS less `group` and `fold`, with `lesion_id`; paths as given by
    `data`), training rows sorted by source and name, test rows last; and how many rows of each
    source were dropped because a source before it has them.
    """
    main = competition(data)
    parts = [main[main.split == 'train']]
    for source in external:
        try:
            rows = EXTERNAL[source](data / 'external' / source)
        except (ValueError, pd.errors.MergeError) as e:
            raise Stop(f'a table of {source} does not hold what its layout says: {e}') from e
        parts.append(rows.assign(split='train', source=source))
    parts = [rows.sort_values('image_name') for rows in parts] + [main[main.split == 'test']]
    table = pd.concat(parts, ignore_index=True)
    for column in ('patient_id', 'lesion_id', 'diagnosis', 'sex', 'anatom_site'):
        table[column] = table[column].astype('str') if column in table else None
    kept = [c for c in COLUMNS if c not in ('group', 'fold', 'width', 'height')]
    native = [c for c in ('width', 'height') if c in table]
    table = _checked(table[[*kept, 'lesion_id', *native]])
    ids = isic_id(table.image_name)
    # a lesion that only the dropped copy names still holds its images together
    table['lesion_id'] = table.lesion_id.fillna(table.groupby(ids).lesion_id.transform('first'))
    again = ids.duplicated() & (table.split == 'train')
    if (ids.duplicated() & (table.split == 'test')).any():
        both = table[ids.duplicated() & (table.split == 'test')].image_name.iloc[0]
        raise Stop(f'the test image {both} is among the training images too')
    dropped = {source: int(n) for source, n in table[again].source.value_counts().items()}
    table = table[~again].reset_index(drop=True)
    return _with_native_size(table), dropped


def read_duplicates(data: Path) -> pd.DataFrame | None:
    """Two columns of image names, the known pairs; None where DATA does not have the file."""
    columns = ['image_name_1', 'image_name_2']
    path = data / DUPLICATES
    return read_csv(path, columns)[columns] if path.exists() else None


def read_folds(path: Path) -> pd.DataFrame:
    """folds.csv, checked as a hand-made one would need it: types, labels, names, folds.

    Returns: COLUMNS, `target` and `fold` as numbers (NaN on test rows), `path` made relative to
    the current folder. Raises: Stop.
    """
    if not path.exists():
        raise Stop(f'{path} is missing; python folds.py --home {path.parent} makes it')
    table = read_csv(path, ['image_name', 'path', 'split', 'source', 'group', 'target', 'fold'])
    table = _checked(table.reindex(columns=COLUMNS))
    labelled = table.split == 'train'
    if not table.image_name.is_unique:
        raise Stop(
            f'{path}: {table.image_name[table.image_name.duplicated()].iloc[0]} stands twice'
        )
    table['fold'] = pd.to_numeric(table.fold, errors='coerce').where(labelled)
    folds = table.fold[labelled]
    wrong = ~((folds >= 0) & (folds % 1 == 0) & (folds < 1000))
    if wrong.any():
        name = table.image_name[labelled][wrong].iloc[0]
        raise Stop(f'{path}: {name} is labelled and has no fold from 0 up (to 999)')
    if table.path.isna().any() or table.group[labelled].isna().any():
        raise Stop(f'{path}: every row needs a path, and every labelled row a group')
    if (odd := table.path.str.contains(CONTROL)).any():
        raise Stop(f'{path}: {table.path[odd].iloc[0]!r} is no path')
    table['path'] = [str(path.parent / p) for p in table.path]
    return table


def _with_paths(rows: pd.DataFrame, folders: list[Path], origin: str) -> pd.DataFrame:
    """`rows` with `path`: the file in `folders` that bears the row's name. Raises: Stop."""
    found = {}
    for folder in (f for f in folders if f.is_dir()):
        found |= {p.stem: p.as_posix() for p in folder.iterdir() if p.suffix.lower() in SUFFIXES}
    if missing := [str(name) for name in rows.image_name if name not in found]:
        where = ' or '.join(str(folder) for folder in folders)
        raise Stop(
            f'{len(missing)} of {len(rows)} images of {origin} are not in {where}: '
            f'{", ".join(missing[:3])}{" ..." if len(missing) > 3 else ""}'
        )
    return rows.assign(path=rows.image_name.map(found))


def _checked(table: pd.DataFrame) -> pd.DataFrame:
    """`table` with its types, if every name, label and split is one. Raises: Stop."""
    for column in ('image_name', 'source'):  # both become parts of paths
        names = table[column].astype('str').fillna('')
        wrong = ~names.str.fullmatch(r'[^/\\:\x00-\x1f]*[^/\\:\x00-\x1f.]')
        if wrong.any():
            raise Stop(f'{names[wrong].iloc[0]!r} is no {column}: no slashes, colons, empty ones')
    twice = table.duplicated(['source', 'image_name'])
    if twice.any():
        raise Stop(
            f'{table.image_name[twice].iloc[0]} stands twice in {table.source[twice].iloc[0]}'
        )
    if not table.split.isin(['train', 'test']).all():
        raise Stop("the column split may hold only 'train' and 'test'")
    labelled = table.split == 'train'
    targets = pd.to_numeric(table.target, errors='coerce')
    if not targets[labelled].isin([0, 1]).all():
        row = table[labelled & ~targets.isin([0, 1])].iloc[0]
        raise Stop(f'the target of {row.image_name} is {row.target!r}; expected 0 or 1')
    table['target'] = targets.where(labelled)
    if not labelled.any():
        raise Stop('there is no labelled image, so nothing to train on')
    table['diagnosis'] = table.diagnosis.map(lambda d: DIAGNOSES.get(d, d))
    table['anatom_site'] = table.anatom_site.map(lambda s: SITES.get(s, s))
    table['sex'] = table.sex.where(table.sex.isin(['male', 'female']))
    for column, most in (('age_approx', 120), ('width', 1e6), ('height', 1e6)):
        if column in table:
            number = pd.to_numeric(table[column], errors='coerce')
            is_whole = (number % 1 == 0) | (column == 'age_approx')  # pixels are
            table[column] = number.where(number.between(0, most) & is_whole)
    return table


def _with_native_size(table: pd.DataFrame) -> pd.DataFrame:
    """`table` with `width` and `height` in pixels, from the files' headers where no table says.

    A header that cannot be read leaves both empty: train.py names such files, all of them.
    """

    def size(path: str) -> tuple[float, float]:
        try:
            if not Path(path).is_file():  # to open a pipe would wait for ever
                return np.nan, np.nan
            with Image.open(path, formats=FORMATS) as image:
                return image.size
        except Exception:  # decoders raise anything on a broken file
            return np.nan, np.nan

    table = table.reindex(columns=[*table.columns, *({'width', 'height'} - set(table.columns))])
    unknown = table.width.isna() | table.height.isna()
    with ThreadPoolExecutor(8) as pool:  # the wait is for the disk
        sizes = list(pool.map(size, table.path[unknown]))
    table.loc[unknown, ['width', 'height']] = np.array(sizes, dtype=float).reshape(-1, 2)
    return table
