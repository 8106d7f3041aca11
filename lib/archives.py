"""The reader of data as it lies: a competition and the sets beside it become one checked table.

The competition lies in DATA, and each other set in DATA/external/NAME, as a row of LAYOUTS says.
Optional in DATA are the competition's table of known duplicates; exclude.txt, the names of labelled
images to leave out; and ISIC 2024's test-image.hdf5 in the place of a folder of images.
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image
from tqdm.contrib.concurrent import thread_map

from lib import tables
from lib.cli import Stop
from lib.files import atomic
from lib.images import FORMATS
from lib.layouts import DUPLICATES, LAYOUTS, NAMES, SAMPLE, SUFFIXES, Layout, Table
from lib.locks import held


def choose_external(external: str | None, folder: Path) -> list[str]:
    """The sets that --external names, in its order; by default all in `folder`. Raises: Stop."""
    known = [layout.source for layout in LAYOUTS.values() if not layout.test]
    if external is None:
        there = sorted(path.name for path in folder.glob('[!.]*/'))
        if unread := [name for name in there if name not in known]:
            print(f'{folder}: not read: {", ".join(unread)}; known are {", ".join(known)}')
        return [name for name in known if name in there]
    names = [] if external == 'none' else [name.strip() for name in external.split(',')]
    if unknown := [name for name in names if name not in known]:
        hint = '; the images of ISIC 2018 are read as ham10000' if 'isic2018' in unknown else ''
        raise Stop(f'--external knows {", ".join(known)}, none; not {", ".join(unknown)}{hint}')
    if absent := [name for name in names if not (folder / name).is_dir()]:
        raise Stop(f'--external {external}: there is no {folder / absent[0]}')
    return names


def read_all(
    data: Path, external: Sequence[str], home: Path = Path()
) -> tuple[pd.DataFrame, dict[str, int]]:
    """The competition's rows and those of the external sets, checked, each ISIC id once, less what
    exclude.txt names. Images in HDF5 are unpacked under `home`.

    Returns: the table (COLUMNS less `group` and `fold`, with `lesion_id`; paths as `data` gives
    them), training rows sorted by source and name, test rows last; and how many rows of each source
    were dropped because a source before it has them. Raises: Stop.
    """
    own = _choose_competition(data)
    folders = {own.source: data} | {name: data / 'external' / name for name in external}
    parts = [_read_labelled(folder, LAYOUTS[name]) for name, folder in folders.items()]
    table = pd.concat([*parts, _read_test(data, own)], ignore_index=True)
    # the ISIC id: ISIC 2019 added _downsampled to the names of images that it shrank
    table['id'] = table.image_name.str.removesuffix('_downsampled')
    table = _leave_out(table, data)
    table = table.reindex(columns=[*tables.COLUMNS, 'lesion_id', 'id'])
    text = ['patient_id', 'lesion_id', 'diagnosis', 'sex', 'anatom_site']
    table = tables.parse_columns(table.astype(dict.fromkeys(text, 'str')))
    # ISIC 2024 asks for other cancers too, which the older sets do not count
    table.loc[table.diagnosis.isin(tables.competition_of(table).diagnoses), 'target'] = 1.0
    # where only the dropped copy of an image names its lesion, the other copy takes the name over
    table['lesion_id'] = table.lesion_id.fillna(table.groupby('id').lesion_id.transform('first'))
    is_repeated = table.id.duplicated()
    sentence = 'the test image {image_name} is among the training images too'
    tables.refuse(table[is_repeated & (table.split == 'test')], sentence)
    dropped = table[is_repeated].source.value_counts().to_dict()
    table = table[~is_repeated].reset_index(drop=True).drop(columns=['group', 'fold', 'id'])
    parts = table.groupby(['source', 'split'], sort=False)
    table['path'] = pd.concat([_find(rows, folders[key[0]], home) for key, rows in parts])
    unknown = table.width.isna() | table.height.isna()
    with ThreadPoolExecutor(8) as pool:  # the wait is for the disk
        sizes = list(pool.map(_native_size, table.path[unknown]))
    table.loc[unknown, ['width', 'height']] = np.array(sizes, dtype=float).reshape(-1, 2)
    return table, dropped


def read_duplicates(data: Path) -> pd.DataFrame | None:
    """The known pairs of duplicates, two columns of names; None where the file is missing."""
    is_there = any((data / name).exists() for name in DUPLICATES.names)
    if not is_there:
        return None
    pairs = _read(data, DUPLICATES)[list(DUPLICATES.columns)]
    if pairs.isna().any(axis=None):
        print(f'{pairs.isna().any(axis=1).sum()} known pairs of duplicates lack a name')
    return pairs.dropna()


def read_excluded(data: Path) -> set[str]:
    """The ISIC ids in DATA/exclude.txt, one name a line, with a suffix such as .jpg or without."""
    path = data / 'exclude.txt'
    text = path.read_text(encoding='utf-8-sig', errors='replace') if path.exists() else ''
    names = filter(None, map(str.strip, text.splitlines()))
    return {tables.plain_name(name).removesuffix('_downsampled') for name in names}


def unpack(path: Path, names: Sequence[str], folder: Path) -> None:
    """Write the images `names` of ISIC 2024's HDF5 file `path` to `folder`, as NAME.jpg.

    Those that are there already are kept; a second process waits. Raises: Stop where the file
    cannot be read, lacks one of `names`, or has anything but a JPEG there.
    """
    with held(folder / '.lock'):
        there = {file.name for file in folder.iterdir()}
        missing = [name for name in names if f'{name}.jpg' not in there]
        if not missing:
            return
        try:
            import h5py  # optional: nothing else needs it

            file = h5py.File(path)
        except ImportError:
            raise Stop(f'{path} is read by h5py, which is missing: pip install h5py') from None
        except OSError as e:
            raise Stop(f'{path} cannot be read as HDF5 ({e}); fetch it again') from None
        print(f'{len(missing)} images to unpack from {path} to {folder}, once', flush=True)

        def write(name: str) -> None:
            try:
                data = bytes(file[name][()])
            except Exception as e:  # h5py raises anything on a broken file
                raise Stop(f'{name} cannot be read from {path} ({e}); fetch it again') from None
            if not data.startswith(b'\xff\xd8\xff'):
                raise Stop(f'{name} in {path} is no JPEG; fetch the file again')
            with atomic(folder / f'{name}.jpg') as temporary:
                temporary.write_bytes(data)

        with file:  # eight threads, since the wait is for the disk
            thread_map(write, missing, max_workers=8, unit=' images', disable=None)


def _choose_competition(data: Path) -> Layout:
    there = [k for k in LAYOUTS.values() if k.test and (data / k.labels.names[0]).exists()]
    if len(there) > 1:
        raise Stop(
            f'{data} holds two competitions: move {data / "train.csv"} and its images to '
            f'{data / "external" / "isic2020"}, where they are additional training images'
        )
    return there[0] if there else LAYOUTS[tables.COMPETITION]


def _read_labelled(folder: Path, layout: Layout) -> pd.DataFrame:
    """The labelled rows of a set, sorted by name, in the columns of folds.csv. Raises: Stop."""
    try:
        rows = _read(folder, layout.labels, only=layout.leaks)
        if layout.classes:
            is_class = rows[[c for c in layout.classes if c in rows]].astype(float) == 1
            rows['diagnosis'] = is_class.idxmax(axis=1).where(is_class.any(axis=1), layout.no_class)
        if layout.metadata:
            columns = list(layout.metadata.columns)
            metadata = _read(folder, layout.metadata)[columns]
            rows = rows.merge(metadata, on=columns[0], how='left')  # twice is refused later
    except ValueError as e:
        raise Stop(f'a table of {layout.source} does not hold what its layout says: {e}') from e
    rows = _rename(rows).assign(split='train', source=layout.source)
    if layout.malignant:
        rows['target'] = rows.diagnosis.isin(layout.malignant).astype(int)
    return rows.sort_values('image_name')


def _read_test(data: Path, own: Layout) -> pd.DataFrame:
    """The test rows, perhaps none, in the order of sample_submission.csv. Raises: Stop."""
    columns = [c for c in own.labels.columns if c != 'target']
    test = _read(data, Table([own.test], columns), may_be_empty=True, only=own.leaks)
    order = _read(data, SAMPLE, may_be_empty=True).image_name
    if not order.is_unique or set(order) != set(test.image_name):
        raise Stop(f'{data}/sample_submission.csv and {data}/{own.test} name different images')
    test = test.set_index('image_name').loc[order].reset_index()
    return _rename(test).assign(split='test', source=own.source)


def _read(folder: Path, table: Table, **options: bool) -> pd.DataFrame:
    paths = [folder / name for name in table.names]
    path = next((path for path in paths if path.exists()), paths[0])
    return tables.read_csv(path, table.columns, **options)


def _rename(rows: pd.DataFrame) -> pd.DataFrame:
    # of two columns of one meaning, that which has folds.csv's name is taken, else the first
    first = {NAMES[c]: c for c in reversed(rows.columns) if c in NAMES}
    return rows.rename(columns={old: new for new, old in first.items() if new not in rows})


def _leave_out(table: pd.DataFrame, data: Path) -> pd.DataFrame:
    """`table` without the images that exclude.txt names, in whatever source. Raises: Stop."""
    path, ids = data / 'exclude.txt', read_excluded(data)
    is_out = table.id.isin(ids)
    sentence = '{file}: the test image {image_name} must stay, since a submission needs every row'
    tables.refuse(table[is_out & (table.split == 'test')], sentence, path)
    if ids:
        n = len(ids & set(table.id))
        rest = f'; {len(ids) - n} match no labelled image' if n < len(ids) else ''
        print(f'{path}: {n} of {len(ids)} names are left out{rest}')
    return table[~is_out]


def _find(rows: pd.DataFrame, folder: Path, home: Path) -> pd.Series:
    """The paths of the images of `rows`, all of one source and split. Raises: Stop."""
    source, split = rows.source.iloc[0], rows.split.iloc[0]
    folders = [folder / name.format(split=split) for name in LAYOUTS[source].images]
    packed = folder / f'{split}-image.hdf5'
    if packed.exists() and not any(f.is_dir() for f in folders):
        folders = [home / 'unpacked' / f'{split}-image']
        unpack(packed, list(rows.image_name), folders[0])
    files = [p for f in folders if f.is_dir() for p in f.iterdir() if p.suffix.lower() in SUFFIXES]
    there = pd.Series([p.as_posix() for p in files], [tables.plain_name(p.name) for p in files])
    there = there[there.index.isin(rows.image_name)].sort_values()
    if twice := list(there.index[there.index.duplicated()]):
        raise Stop(
            f'{len(twice)} images of {source} are several files, and only one can be meant, such '
            f'as {" and ".join(there[[twice[0]]])}; move the others away'
        )
    paths = rows.image_name.map(there)
    if missing := list(rows.image_name[paths.isna()]):
        first = ', '.join(missing[:3]) + ' ...' * (len(missing) > 3)
        counts = f'{len(missing)} of {len(rows)} {split} images of {source}'
        raise Stop(f'{counts} are not in {" or ".join(map(str, folders))}: {first}')
    return paths


def _native_size(path: str) -> tuple[float, float]:
    with suppress(Exception):  # decoders raise anything on a broken file
        if Path(path).is_file():  # to open a pipe would wait for ever
            with Image.open(path, formats=FORMATS) as image:
                return image.size
    return np.nan, np.nan  # train.py names such files, all of them
