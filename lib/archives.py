"""The reader of data as it lies: a competition and the sets beside it become one checked table.

The competition, or one's own images, lies in DATA, and each other set in a folder of DATA/external.
Which layout a set has is told by the tables in it, and these and its images may lie at any depth.
Optional in DATA are the competition's table of known duplicates; exclude.txt, the names of labelled
images to leave out; and ISIC 2024's test-image.hdf5 in the place of a folder of images.
"""

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
from PIL import Image

from lib import cli, tables
from lib.cli import Stop
from lib.hdf5 import unpack
from lib.images import FORMATS
from lib.layouts import DUPLICATES, LAYOUTS, SAMPLE, SUFFIXES, Layout

ISIC_ID = r'ISIC_\d+'
DEMO_LABEL = 'SYNTHETIC.txt'  # marks the demo, which is nobody's data
MADE = ('cache', 'runs', 'report', 'unpacked')  # folders of a HOME


class Archive(NamedTuple):
    """A set of images as it lies in its folder."""

    folder: Path
    layout: Layout
    source: str  # its name in folds.csv
    tables: dict[str, Path]  # by name, in lower case; of several of one name that nearest the top
    images: list[Path]


def choose_external(external: str | None, folder: Path) -> list[str]:
    """The folders in `folder` that --external names, in its order; by default all that are read, in
    the order of LAYOUTS. A line names the others. Raises: Stop where it names another."""
    there = [path.name for path in sorted(folder.glob('[!.]*/'))]
    names = there if external is None else [] if external == 'none' else cli.split(external)
    found = {name: open_archive(folder / name) for name in names if name in there}
    known = {name: archive for name, archive in found.items() if archive}
    unread = [name for name in names if name not in known]
    if external is None:
        if unread:
            print(f'{folder}: not read: {", ".join(unread)}; no table there is of a known layout')
        return sorted(known, key=lambda name: LAYOUTS.index(known[name].layout))
    if unread:
        listing = f'there is no such folder in {folder}, which holds {", ".join(there) or "none"}'
        why = 'no table there is of a known layout' if unread[0] in there else listing
        raise Stop(f'--external {unread[0]}: {why}')
    return names


def list_files(folder: Path) -> list[Path]:
    """The files below `folder`, those nearest to it first, less hidden ones, the demo, and what the
    scripts have made beside a folds.csv. Links are followed, each once."""
    paths, seen = [], set()
    for place, folders, names in os.walk(folder, followlinks=True):
        if DEMO_LABEL in names and Path(place) != folder:
            folders.clear()
            continue
        made = MADE if 'folds.csv' in names else ()
        real = {name: os.path.realpath(os.path.join(place, name)) for name in sorted(folders)}
        folders[:] = [
            n for n, at in real.items() if n[0] != '.' and n not in made and at not in seen
        ]
        seen.update(real.values())
        paths += [Path(place, name) for name in sorted(names) if name[0] != '.']
    return sorted(paths, key=lambda path: (len(path.parts), path))


def open_archive(folder: Path, own: bool = False) -> Archive | None:
    """The set in `folder`, or None where no table is of a known layout. `own`: whether it is DATA
    itself, without external/. Raises: Stop where there are several sets."""
    files = [p for p in list_files(folder) if not (own and folder / 'external' in p.parents)]
    images = [path for path in files if path.suffix.lower() in SUFFIXES]
    others = [path for path in files if path.suffix.lower() not in SUFFIXES]
    of_name = {path.name.lower(): path for path in reversed(others)}
    there = [(k, path) for k in LAYOUTS if (path := _locate(k.labels.names, of_name))]
    found = [(k, path) for k, path in there if _fits(path, k.labels.columns)]
    # Where no header fits, a table of an unmistakable name is taken: reading it says what it lacks
    found = found or [(k, path) for k, path in there if own or k.named][-1:]
    if not found:
        return None
    of_path = {path: layout for layout, path in reversed(found)}
    layout, chosen = found[0]
    beside = [p for p in others if p.name == chosen.name and len(p.parts) == len(chosen.parts)]
    if len({layout.source for layout in of_path.values()}) > 1 or len(beside) > 1:
        of_path |= dict.fromkeys(beside, layout)
        raise Stop(
            f'{folder} holds several sets, by {" and ".join(map(str, of_path))}: move all but one '
            'of them, with their images, to folders of their own under DATA/external'
        )
    source = layout.source if own or layout.named else folder.name
    if not own and source in tables.COMPETITIONS:  # only DATA's own images are a competition's
        source += '_beside'
    return Archive(folder, layout, source, of_name, images)


def _locate(names: Sequence[str], of_name: dict[str, Path]) -> Path | None:
    return next(filter(None, (of_name.get(name.lower()) for name in names)), None)


def _fits(path: Path, columns: Sequence[str]) -> bool:
    """Whether the header of a CSV has `columns`, by these names or by other words for them."""
    try:
        header = pd.read_csv(path, nrows=0, encoding='utf-8-sig')
    except (ValueError, OSError):
        return False
    return set(columns) <= {*header.columns, *map(tables.name_of, header.columns)}


def read_all(
    data: Path, external: Sequence[str], home: Path = Path(), labels: tables.Labels = tables.LABELS
) -> tuple[pd.DataFrame, dict[str, int]]:
    """The rows of DATA and those of the external sets, checked, each ISIC id once, less what
    exclude.txt names. Images in HDF5 are unpacked under `home`.

    `labels`: how the targets of DATA are told. Returns: the table (COLUMNS less `group`, with
    `lesion_id`, `licence` and `attribution`; `fold` where DATA has one; paths as `data` gives
    them), training rows sorted by source and name, test rows last; and how many rows of each source
    were dropped because a source before it has them. Raises: Stop.
    """
    own = open_archive(data, own=True)
    if own is None:
        raise Stop(
            f'there is no train.csv in {data}, nor another table of labels. The README, "Your own '
            'images", says what it holds; --data names another folder; --demo makes synthetic '
            'images to try it all on'
        )
    others = [open_archive(data / 'external' / name) for name in external]
    parts = [_read_labelled(own, labels), *(_read_labelled(k, tables.LABELS) for k in others)]
    table = pd.concat([*parts, _read_test(own, parts[0].image_name)], ignore_index=True)
    # the ISIC id: ISIC 2019 added _downsampled to the names of images that it shrank
    ends = table.file.str.split('/').str[-1].str.removesuffix('_downsampled')
    table['id'] = ends.where(ends.str.fullmatch(ISIC_ID), table.image_name)
    table = _leave_out(table, data)
    is_isic = table.id.str.fullmatch(ISIC_ID)
    twice = table[~is_isic & table.image_name.duplicated() & ~table.duplicated(['source', 'id'])]
    sentence = 'two sets have an image named {image_name}, and without an ISIC id it is not known'
    tables.refuse(twice, f'{sentence} whether it is the same one; rename that of {{source}}')
    more = ['lesion_id', 'licence', 'attribution', 'id', 'file', 'folder']
    table = table.reindex(columns=[*tables.COLUMNS, *more])
    text = ['patient_id', 'lesion_id', 'diagnosis', 'sex', 'anatom_site', 'skin_tone']
    table = tables.parse_columns(table.astype(dict.fromkeys(text, object)))
    # ISIC 2024 asks for other cancers too, which the older sets do not count
    if own.source in tables.COMPETITIONS:
        cancers = tables.COMPETITIONS[own.source].diagnoses
        table.loc[table.diagnosis.isin(cancers), 'target'] = 1.0
    # where only the dropped copy of an image names its lesion, the other copy takes the name over
    table['lesion_id'] = table.lesion_id.fillna(table.groupby('id').lesion_id.transform('first'))
    is_repeated = table.id.duplicated()
    sentence = 'the test image {image_name} is among the training images too'
    tables.refuse(table[is_repeated & (table.split == 'test')], sentence)
    dropped = table[is_repeated].source.value_counts().to_dict()
    table = table[~is_repeated].reset_index(drop=True)
    of_folder = {archive.folder: archive for archive in (own, *others)}
    parts = table.groupby(['folder', 'split'], sort=False)
    table['path'] = pd.concat([_find(rows, of_folder[key[0]], home) for key, rows in parts])
    unknown = table.width.isna() | table.height.isna()
    with ThreadPoolExecutor(8) as pool:  # the wait is for the disk
        sizes = list(pool.map(_native_size, table.path[unknown]))
    table.loc[unknown, ['width', 'height']] = np.array(sizes, dtype=float).reshape(-1, 2)
    return table.drop(columns=['group', 'id', 'file', 'folder']), dropped


def read_duplicates(data: Path) -> pd.DataFrame | None:
    """The known pairs of duplicates, two columns of names; None where the file is missing."""
    path = next((path for path in list_files(data) if path.name == DUPLICATES.names[0]), None)
    if path is None:
        return None
    pairs = tables.read_csv(path, DUPLICATES.columns)[list(DUPLICATES.columns)]
    if pairs.isna().any(axis=None):
        print(f'{pairs.isna().any(axis=1).sum()} known pairs of duplicates lack a name')
    return pairs.dropna()


def read_excluded(data: Path) -> set[str]:
    """The names in DATA/exclude.txt, one a line, as they are in a table or in folds.csv."""
    path = data / 'exclude.txt'
    text = path.read_text(encoding='utf-8-sig', errors='replace') if path.exists() else ''
    names = filter(None, map(str.strip, text.splitlines()))
    return {tables.plain_name(name).removesuffix('_downsampled') for name in names}


def _read_labelled(archive: Archive, labels: tables.Labels) -> pd.DataFrame:
    """The labelled rows of a set, sorted by name, in the columns of folds.csv. Raises: Stop."""
    layout, path = archive.layout, _locate(archive.layout.labels.names, archive.tables)
    try:
        rows = tables.read_csv(path, layout.labels.columns, only=layout.leaks)
        for column, values in layout.kept.items():
            if column not in rows:
                continue
            is_kept, words = rows[column].isin(values), ' or '.join(values)
            if is_kept.any():
                rows = rows[is_kept]
                print(f'{path}: {(~is_kept).sum()} rows whose {column} is not {words} are left out')
            else:
                print(f'{path}: no {column} is {words}, so all rows are taken')
        if layout.classes:
            is_class = rows[[c for c in layout.classes if c in rows]].astype(float) == 1
            rows['diagnosis'] = is_class.idxmax(axis=1).where(is_class.any(axis=1), layout.no_class)
        second = layout.metadata and _locate(layout.metadata.names, archive.tables)
        if layout.metadata and (second or not layout.metadata.optional):
            columns = list(map(tables.name_of, layout.metadata.columns))
            path_of = second or archive.folder / layout.metadata.names[0]
            metadata = tables.read_csv(path_of, columns)[columns]
            rows = rows.merge(metadata, on=columns[0], how='left')  # twice is refused later
    except ValueError as e:
        raise Stop(f'a table of {archive.source} does not hold what its layout says: {e}') from e
    for column, of_columns in layout.first.items():
        rows[column] = rows.reindex(columns=of_columns).bfill(axis=1).iloc[:, 0].str.lower()
    if layout.malignant:
        judged = rows[layout.judged]
        target = judged.isin(layout.malignant).astype(int).astype(str)
        rows['target'] = target.where(judged.notna() & ~judged.isin(layout.unclear))
    rows = tables.parse_target(rows, path, labels)
    return _of_archive(rows, archive, 'train').sort_values('image_name')


def _read_test(own: Archive, taken: pd.Series) -> pd.DataFrame:
    """The test rows, perhaps none, in the order of sample_submission.csv, if there is one. `taken`:
    the names of the labelled rows."""
    layout = own.layout
    folder = _locate(layout.labels.names, own.tables).parent
    # a test.csv in another folder belongs to another set
    of_name = {name: path for name, path in own.tables.items() if path.parent == folder}
    path, sample = (_locate(names, of_name) for names in (layout.test, SAMPLE.names))
    if path is None:
        print('there are no test images, so there is nothing to predict')
        return pd.DataFrame()
    columns = [c for c in layout.labels.columns if layout.leaks and c != 'target']
    options = {'only': layout.leaks, 'may_be_empty': True}
    test = tables.read_csv(path, columns or ['image_name'], **options)
    if sample:
        order = tables.read_csv(sample, SAMPLE.columns, may_be_empty=True).image_name
        if not order.is_unique or set(order) != set(test.image_name):
            raise Stop(f'{sample} and {path} name different images')
        test = test.set_index('image_name').loc[order].reset_index()
    test = test.drop(columns=['fold', 'target'], errors='ignore')
    return _of_archive(test, own, 'test', taken)


def _of_archive(
    rows: pd.DataFrame, archive: Archive, split: str, taken: Sequence[str] = ()
) -> pd.DataFrame:
    """`rows` with `file`, the name as it stands in the table, and what tells where they are from.

    A name may be a path below the set's folder. Its last part becomes the image's name, or where
    that is repeated or `taken`, all its parts.
    """
    leads_out = rows.image_name.str.contains(r'(?:^|/)\.*(?:/|$)|\\', na=True)
    expected = 'a name, or a path below the folder of the set'
    tables.refuse(rows[leads_out], f'{{image_name!r}} is no image_name; expected {expected}')
    ends = rows.image_name.str.split('/').str[-1]
    is_free = ~(ends.duplicated(keep=False) | ends.isin(taken))
    name = ends.where(is_free, rows.image_name.str.replace('/', '_'))
    known = {'split': split, 'source': archive.source, 'folder': archive.folder}
    return rows.assign(file=rows.image_name, image_name=name, **known)


def _leave_out(table: pd.DataFrame, data: Path) -> pd.DataFrame:
    """`table` without the images that exclude.txt names, in whatever source. Raises: Stop."""
    path, ids = data / 'exclude.txt', read_excluded(data)
    table_names = table.file.str.removesuffix('_downsampled')
    is_out = table.id.isin(ids) | table_names.isin(ids)
    sentence = '{file}: the test image {image_name} must stay, since a submission needs every row'
    tables.refuse(table[is_out & (table.split == 'test')], sentence, path)
    if ids:
        n = len(ids & {*table.id, *table_names})
        rest = f'; {len(ids) - n} match no labelled image' if n < len(ids) else ''
        print(f'{path}: {n} of {len(ids)} names are left out{rest}')
    return table[~is_out]


def _find(rows: pd.DataFrame, archive: Archive, home: Path) -> pd.Series:
    """The paths of the images of `rows`, all of one source and split. Raises: Stop."""
    source, split = archive.source, rows.split.iloc[0]
    images, packed = archive.images, archive.tables.get(f'{split}-image.hdf5')
    if packed and not {tables.plain_name(path.name) for path in images} & set(rows.image_name):
        unpack(packed, list(rows.image_name), folder := home / 'unpacked' / f'{split}-image')
        images = list(folder.glob('*.jpg'))
    named = [(tables.plain_name(path.name), path.as_posix()) for path in images]
    if rows.file.str.contains('/').any():  # names may be paths below the folder, too
        below = [(path.relative_to(archive.folder).as_posix(), path) for path in archive.images]
        named += [(tables.plain_name(name), p.as_posix()) for name, p in below if '/' in name]
    there = pd.DataFrame(named, columns=['file', 'path']).set_index('file').path
    there = there[there.index.isin(rows.file)].sort_values()
    if twice := list(there.index[there.index.duplicated()]):
        raise Stop(
            f'{len(twice)} images of {source} are several files, and only one can be meant, such '
            f'as {" and ".join(there[[twice[0]]])}; move the others away'
        )
    paths = rows.file.map(there)
    if missing := list(rows.file[paths.isna()]):
        first = ', '.join(missing[:3]) + ' ...' * (len(missing) > 3)
        counts = f'{len(missing)} of {len(rows)} {split} images of {source}'
        raise Stop(f'{counts} are not below {archive.folder}: {first}')
    return paths


def _native_size(path: str) -> tuple[float, float]:
    with suppress(Exception):  # decoders raise anything on a broken file
        if Path(path).is_file():  # to open a pipe would wait for ever
            with Image.open(path, formats=FORMATS) as image:
                return image.size
    return np.nan, np.nan  # train.py names such files, all of them
