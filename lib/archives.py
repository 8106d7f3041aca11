"""The layouts of the competition and of the ISIC archives, read into one checked table.

data/
  train.csv test.csv sample_submission.csv
  jpeg/train/*.jpg jpeg/test/*.jpg                # or train/ and test/, as in resized copies
  ISIC_2020_Training_Duplicates.csv               # optional, as is all that follows
  external/isic2019/  ISIC_2019_Training_GroundTruth.csv ISIC_2019_Training_Metadata.csv
                      ISIC_2019_Training_Input/
  external/isic2017/  ISIC-2017_Training_Part3_GroundTruth.csv ISIC-2017_Training_Data/
  external/ham10000/  HAM10000_metadata.csv HAM10000_images_part_1/ HAM10000_images_part_2/
  external/isic2020/  train.csv, jpeg/train/ and the duplicates, beside the next competition

ISIC 2024, in the place of the first two lines:
  train-metadata.csv test-metadata.csv sample_submission.csv
  train-image/image/*.jpg test-image.hdf5        # either split as files, or as HDF5
On a synthetic set of its size (401,059 training images, 3,000 to predict), on one of two shared
cores: folds.py 47 s and 1.1 GB, of which 3,000 images to unpack 2 s; the cache at 128 px 2 ms and
6 KB an image; an epoch of tf_efficientnet_lite0 at 128 px 20 s; blend.py of three runs 28 s and
0.7 GB.
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image

from lib.cli import Stop
from lib.images import FORMATS, SUFFIXES
from lib.tables import (
    COLUMNS,
    COMPETITION,
    DIAGNOSES,
    ISIC2024,
    check_names,
    competition_of,
    parse_columns,
    read_csv,
)
from lib.unpack import unpack

# The columns of the archives that folds.csv has under another name
NAMES = {
    'image': 'image_name', 'image_id': 'image_name', 'MEL': 'target', 'melanoma': 'target',
    'dx': 'diagnosis', 'age': 'age_approx', 'age_approximate': 'age_approx',
    'localization': 'anatom_site', 'anatom_site_general': 'anatom_site',
}  # fmt: skip


def read_competition(data: Path, home: Path) -> pd.DataFrame:
    """SIIM-ISIC 2020 as Kaggle lays it out, or a resized copy, or ISIC 2024: training rows, then
    test rows.

    Test rows come in the order of sample_submission.csv; both may be headers without rows, where
    there is nothing to submit. Of ISIC 2024's columns only those that are named here are read:
    iddx_*, mel_* and tbp_lv_dnn_lesion_confidence tell the answer. Its HDF5 files are unpacked
    under `home`.
    Sources: https://www.kaggle.com/c/siim-isic-melanoma-classification/data
    https://www.kaggle.com/competitions/isic-2024-challenge/data
    """
    is_2024, older = (data / 'train-metadata.csv').exists(), data / 'train.csv'
    if is_2024 and older.exists():
        raise Stop(
            f'{data} holds two competitions: move {older} and its images to '
            f'{data / "external" / "isic2020"}, where they are additional training images'
        )
    site, end = 'anatom_site_general_challenge', '.csv'
    if is_2024:
        site, end = 'anatom_site_general', '-metadata.csv'
    meta = ['image_name', 'patient_id', 'sex', 'age_approx', site]
    train = read_csv(data / f'train{end}', [*meta, 'target'], only=is_2024)
    test = read_csv(data / f'test{end}', meta, may_be_empty=True, only=is_2024)
    sample = read_csv(data / 'sample_submission.csv', ['image_name', 'target'], may_be_empty=True)
    order = sample.image_name
    if not order.is_unique or set(order) != set(test.image_name):
        raise Stop(f'{data}/sample_submission.csv and {data}/test{end} name different images')
    folder = data / 'jpeg' if (data / 'jpeg').is_dir() else data
    parts = []
    for split, rows in (('train', train), ('test', test.set_index('image_name').loc[order])):
        rows = rows.reset_index().rename(columns={site: 'anatom_site'})
        of_split = _isic2024_images(data, home, split, rows) if is_2024 else folder / split
        rows = _add_paths(rows, [of_split], str(data / f'{split}{end}'))
        parts.append(rows.assign(split=split, source=ISIC2024 if is_2024 else COMPETITION))
    return pd.concat(parts, ignore_index=True)


def _isic2024_images(data: Path, home: Path, split: str, rows: pd.DataFrame) -> Path:
    """The folder of a split's images: in `data`, or under `home`, unpacked from HDF5 in `data`."""
    folder, packed = data / f'{split}-image' / 'image', data / f'{split}-image.hdf5'
    if folder.is_dir() or not packed.exists():
        return folder
    check_names(rows.astype({'image_name': 'str'}))  # they become parts of paths
    folder = home / 'unpacked' / f'{split}-image'
    unpack(packed, list(rows.image_name), folder)
    return folder


def read_isic2019(folder: Path) -> tuple[pd.DataFrame, list[Path]]:
    """ISIC 2019's training images. Source: https://challenge.isic-archive.com/data/#2019"""
    rows = read_csv(folder / 'ISIC_2019_Training_GroundTruth.csv', ['image', 'MEL', 'NV'])
    classes = [c for c in rows.columns if c.lower() in DIAGNOSES]
    rows['diagnosis'] = rows[classes].astype(float).idxmax(axis=1).str.lower()
    columns = ['image', 'age_approx', 'anatom_site_general', 'lesion_id', 'sex']
    metadata = read_csv(folder / 'ISIC_2019_Training_Metadata.csv', columns)[columns]
    images = folder / 'ISIC_2019_Training_Input'
    rows = rows.merge(metadata, on='image', how='left', validate='one_to_one')
    return rows, [images, images / images.name]


def read_isic2017(folder: Path) -> tuple[pd.DataFrame, list[Path]]:
    """ISIC 2017, part 3. Source: https://challenge.isic-archive.com/data/#2017"""
    images = folder / 'ISIC-2017_Training_Data'
    columns = ['image_id', 'melanoma', 'seborrheic_keratosis']
    rows = read_csv(folder / 'ISIC-2017_Training_Part3_GroundTruth.csv', columns)
    name = 'ISIC-2017_Training_Data_metadata.csv'  # the archive has it among the images
    path = folder / name if (folder / name).exists() else images / name
    metadata = read_csv(path, ['image_id', 'age_approximate', 'sex'])
    is_either = [rows[c].astype(float) == 1 for c in columns[1:]]
    rows['diagnosis'] = np.select(is_either, ['melanoma', 'seborrheic keratosis'], 'nevus')
    return rows.merge(metadata, on='image_id', how='left', validate='one_to_one'), [images]


def read_ham10000(folder: Path) -> tuple[pd.DataFrame, list[Path]]:
    """HAM10000, in one or two parts. Source: https://doi.org/10.7910/DVN/DBW86T"""
    # with or without the suffix; Dataverse offers a .tab first, for which read_csv says what to do
    paths = [folder / f'HAM10000_metadata{suffix}' for suffix in ('.csv', '', '.tab')]
    path = next((path for path in paths if path.exists()), paths[0])
    rows = read_csv(path, ['lesion_id', 'image_id', 'dx', 'age', 'sex', 'localization'])
    rows['target'] = (rows.dx == 'mel').astype(int)
    parts = ['HAM10000_images_part_1', 'HAM10000_images_part_2', 'ISIC2018_Task3_Training_Input']
    return rows, [folder / part for part in parts]


def read_isic2020(folder: Path) -> tuple[pd.DataFrame, list[Path]]:
    """SIIM-ISIC 2020's training images, beside another competition's."""
    site = 'anatom_site_general_challenge'
    columns = ['image_name', 'patient_id', 'sex', 'age_approx', site, 'diagnosis', 'target']
    rows = read_csv(folder / 'train.csv', columns).rename(columns={site: 'anatom_site'})
    return rows, [folder / 'jpeg' / 'train', folder / 'train']


# A new layout is a function, which returns its rows and the folders of its images, and a name here,
# that of its folder under DATA/external
EXTERNAL = {
    'isic2019': read_isic2019, 'isic2017': read_isic2017, 'ham10000': read_ham10000,
    'isic2020': read_isic2020,
}  # fmt: skip


def choose_external(external: str | None, folder: Path) -> list[str]:
    """The sets that --external names, in its order; by default all in `folder`. Raises: Stop."""
    if external is None:
        return [name for name in EXTERNAL if (folder / name).is_dir()]
    names = [] if external == 'none' else [name.strip() for name in external.split(',')]
    if unknown := [name for name in names if name not in EXTERNAL]:
        hint = '; the images of ISIC 2018 are read as ham10000' if 'isic2018' in unknown else ''
        known = ', '.join(EXTERNAL)
        raise Stop(f'--external knows {known} and none, not {", ".join(unknown)}{hint}')
    if absent := [name for name in names if not (folder / name).is_dir()]:
        raise Stop(f'--external {external}: there is no {folder / absent[0]}')
    return names


def read_all(
    data: Path, external: Sequence[str], home: Path = Path()
) -> tuple[pd.DataFrame, dict[str, int]]:
    """The competition's rows and those of the external sets, checked, each ISIC id once.

    Images in HDF5 are unpacked under `home`.

    Returns: the table (COLUMNS less `group` and `fold`, with `lesion_id`; paths as `data` gives
    them), training rows sorted by source and name, test rows last; and how many rows of each source
    were dropped because a source before it has them.
    """
    competition = read_competition(data, home)
    is_test = competition.split == 'test'
    parts = [competition[~is_test]]
    for source in external:
        try:
            rows, folders = EXTERNAL[source](data / 'external' / source)
        except (ValueError, pd.errors.MergeError) as e:
            raise Stop(f'a table of {source} does not hold what its layout says: {e}') from e
        rows = _add_paths(rows.rename(columns=NAMES), folders, f'the table of {source}')
        parts.append(rows.assign(split='train', source=source))
    parts = [rows.sort_values('image_name') for rows in parts]
    table = pd.concat([*parts, competition[is_test]], ignore_index=True)
    columns = [*COLUMNS, 'lesion_id']
    text = ['patient_id', 'lesion_id', 'diagnosis', 'sex', 'anatom_site']
    table = table.reindex(columns=columns).astype(dict.fromkeys(text, 'str'))
    table = parse_columns(table.drop(columns=['group', 'fold']))
    # ISIC 2024 asks for other cancers too, which the older sets do not count
    table.loc[table.diagnosis.isin(competition_of(table).diagnoses), 'target'] = 1.0
    # the ISIC id: ISIC 2019 added _downsampled to the names of images that it shrank
    ids = table.image_name.str.removesuffix('_downsampled')
    # where only the dropped copy of an image names its lesion, the other copy takes the name over
    table['lesion_id'] = table.lesion_id.fillna(table.groupby(ids).lesion_id.transform('first'))
    is_repeated = ids.duplicated()
    if (both := is_repeated & (table.split == 'test')).any():
        name = table.image_name[both].iloc[0]
        raise Stop(f'the test image {name} is among the training images too')
    dropped = table[is_repeated].source.value_counts().to_dict()
    return _add_native_size(table[~is_repeated].reset_index(drop=True)), dropped


def read_duplicates(data: Path) -> pd.DataFrame | None:
    """The known pairs of duplicates, two columns of names; None where the file is missing."""
    name, columns = 'ISIC_2020_Training_Duplicates.csv', ['image_name_1', 'image_name_2']
    paths = [folder / name for folder in (data, data / 'external' / 'isic2020')]
    path = next((path for path in paths if path.exists()), None)
    return read_csv(path, columns)[columns] if path else None


def _add_paths(rows: pd.DataFrame, folders: list[Path], origin: str) -> pd.DataFrame:
    """`rows` with `path`: the file in `folders` that has the row's name. Raises: Stop."""
    paths = [p for f in folders if f.is_dir() for p in f.iterdir() if p.suffix.lower() in SUFFIXES]
    rows = rows.assign(path=rows.image_name.map({p.stem: p.as_posix() for p in paths}))
    if missing := list(map(str, rows.image_name[rows.path.isna()])):
        where = ' or '.join(map(str, folders))
        first = ', '.join(missing[:3]) + ' ...' * (len(missing) > 3)
        raise Stop(f'{len(missing)} of {len(rows)} images of {origin} are not in {where}: {first}')
    return rows


def _add_native_size(table: pd.DataFrame) -> pd.DataFrame:
    """`table` with `width` and `height` in pixels, from the files' headers where no table says."""

    def read_size(path: str) -> tuple[float, float]:
        with suppress(Exception):  # decoders raise anything on a broken file
            if Path(path).is_file():  # to open a pipe would wait for ever
                with Image.open(path, formats=FORMATS) as image:
                    return image.size
        return np.nan, np.nan  # train.py names such files, all of them

    unknown = table.width.isna() | table.height.isna()
    with ThreadPoolExecutor(8) as pool:  # the wait is for the disk
        sizes = list(pool.map(read_size, table.path[unknown]))
    table.loc[unknown, ['width', 'height']] = np.array(sizes, dtype=float).reshape(-1, 2)
    return table
