"""The cache of square, resized JPEGs, and how one image is read into it."""

import math
import os
import shutil
from collections import Counter
from contextlib import suppress
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from tqdm.contrib.concurrent import thread_map

from lib.cli import Stop
from lib.files import atomic
from lib.locks import Lock

CGROUP = Path('/sys/fs/cgroup')  # where Linux keeps the limits of a container
SUFFIXES = ('.jpg', '.jpeg', '.png')
FORMATS = ('JPEG', 'PNG')  # whatever the suffix says: Pillow would start a program for an EPS


def cache(
    table: pd.DataFrame,
    home: Path,
    size: int,
    skip_bad: bool = False,
    advice: str = 'Replace them and run this again',
) -> list[Path | None]:
    """Paths of the images of `table` (image_name, path, source) as `size` x `size` pixel JPEGs.

    The files are HOME/cache/SIZE/SOURCE/NAME.jpg. Those that are missing, or whose source has
    changed, are made on all cores; a second process waits. With `skip_bad` the path of an image
    that cannot be read is None. Raises: Stop that lists all such images, and ends with `advice`.
    """
    folder = home / 'cache' / str(size)
    rows = table[['source', 'image_name', 'path']].itertuples(index=False, name=None)
    jobs = [(Path(path), folder / source / f'{name}.jpg') for source, name, path in rows]
    paths = [path for _, path in jobs]
    if all(_is_fresh(*job) for job in jobs):
        return paths
    with Lock(folder / '.lock') as lock:
        if not lock.take():
            print(f'{lock.holder()} makes {folder}; waiting', flush=True)
            lock.take(wait=True)
        jobs = [job for job in jobs if not _is_fresh(*job)]
        if jobs:
            print(f'{len(jobs)} images to resize to {size} x {size} pixels, once', flush=True)
        # threads do: Pillow releases Python's lock while it decodes, resizes and encodes
        options = {'max_workers': n_cores(), 'unit': ' images', 'disable': None}
        results = thread_map(lambda job: _make(*job, size), jobs, **options)
    errors = {path: error for (_, path), error in zip(jobs, results, strict=True) if error}
    if errors:
        listing = f'{len(errors)} images cannot be read:\n  ' + '\n  '.join(errors.values())
        if not skip_bad:
            raise Stop(f'{listing}\n{advice}')
        print(listing)
    return [None if path in errors else path for path in paths]


def prepare(
    table: pd.DataFrame, home: Path, size: int, skipped: list[str], skip_bad: bool
) -> tuple[pd.DataFrame, list[str]]:
    """Cache the images of `table`, without those that a run leaves out.

    `skipped`: the names that it leaves out already; with `skip_bad` those of images that cannot be
    read are added. Returns: the remaining rows with a column `cached`, the paths, and a new index;
    and all the names that are left out. Raises: Stop as `cache` does, and where a fold is left
    without an image.
    """
    rows = table[~table.image_name.isin(skipped)]
    advice = 'Replace them, or begin a run that leaves them out: train.py --skip_bad'
    rows = rows.assign(cached=cache(rows, home, size, skip_bad, advice))
    is_bad = rows.cached.isna()
    if set(rows.fold[~is_bad]) != set(table.fold):
        raise Stop('a fold is left without an image that can be read; replace one of its images')
    return rows[~is_bad].reset_index(drop=True), [*skipped, *rows.image_name[is_bad]]


def list_images(folder: Path) -> pd.DataFrame:
    """A table of the images in and below `folder`, or of this one image: image_name, path, source.

    A name is the path relative to `folder`, with its suffix. Hidden files and folders are ignored;
    a line counts the files of other formats. Raises: Stop where there is no image.
    """
    if not folder.exists():
        raise Stop(f'there is no {folder}')
    base, paths = folder.parent, [folder]
    if folder.is_dir():
        base, below = folder, [p for p in sorted(folder.rglob('*')) if p.is_file()]
        shown = [p for p in below if not any(s.startswith('.') for s in p.relative_to(base).parts)]
        paths = [path for path in shown if path.suffix.lower() in SUFFIXES]
        suffixes = Counter(path.suffix.lower() or 'without a suffix' for path in shown)
        if others := [f'{n} {_escape(s)}' for s, n in suffixes.most_common() if s not in SUFFIXES]:
            print(f'{folder}: only JPEG and PNG are read; left out: {", ".join(others)}')
    if not paths:
        raise Stop(f'there is no JPEG or PNG image in {folder}')
    names = [path.relative_to(base).as_posix() for path in paths]
    return pd.DataFrame({'image_name': names, 'path': list(map(str, paths)), 'source': 'images'})


def _escape(text: object) -> str:
    """`text` for a message, quoted with escapes where it holds control characters."""
    return str(text) if str(text).isprintable() else repr(str(text))


def square(path: Path, size: int) -> Image.Image:
    """The largest centred square of an image as a viewer shows it, at `size` x `size` pixels, RGB.

    The image is cropped and not letter-boxed, since bars would show the model the camera's aspect
    ratio.
    """
    with Image.open(path, formats=FORMATS) as image:
        # A JPEG is decoded at 1/2, 1/4 or 1/8 of its size, but to at least 1.9 times what is asked
        # for: that scaling is coarse, and hairs and rulers would alias if it came closer to `size`
        scale = min(1, 1.9 * size / min(image.size))
        image.draft(None, (math.ceil(image.width * scale), math.ceil(image.height * scale)))
        image = _to_rgb(ImageOps.exif_transpose(image))
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    cropped = image.crop((left, top, left + side, top + side))
    return cropped.resize((size, size), Image.Resampling.LANCZOS)


def _to_rgb(image: Image.Image) -> Image.Image:
    """An image of any mode as 8-bit RGB; 16 bits are scaled, and transparency is put on white."""
    if image.mode.startswith('I'):  # a grey value of 0..65535
        image = Image.fromarray((np.asarray(image) // 257).clip(0, 255).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert('RGBA')
        return Image.alpha_composite(Image.new('RGBA', image.size, 'white'), image).convert('RGB')
    return image.convert('RGB')


def n_cores() -> int:
    """The number of cores that this process may use; a scheduler or a container may limit it."""
    n = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()
    for names in (['cpu.max'], ['cpu/cpu.cfs_quota_us', 'cpu/cpu.cfs_period_us']):  # cgroup v2, v1
        with suppress(OSError, ValueError):  # no such file, or 'max'
            texts = [(CGROUP / name).read_text() for name in names]
            quota, period = map(int, ' '.join(texts).split())  # microseconds of all cores together
            if quota > 0:  # -1 means none
                n = min(n, max(quota // period, 1))
    return n


def _stamp(source: Path) -> int:
    """The modification time, in ns, that a cached file gets: it depends on its source's time and
    size. A copy of the cache must keep times (cp -p, rsync -t), or the cache is made again.
    """
    stat = source.stat()
    return stat.st_mtime_ns + stat.st_size


def _is_fresh(source: Path, path: Path) -> bool:
    """Whether `path` is the cached image of `source`, which may no longer be on this machine."""
    if not path.exists() or not source.exists():
        return path.exists()
    time, stamp = path.stat().st_mtime_ns, _stamp(source)
    # file systems keep times in steps of 1 ns, 100 ns (NTFS), 1 us, 1 ms, 10 ms (exFAT), 1 or 2 s
    steps = (1, 100, 10**3, 10**6, 10**7, 10**9, 2 * 10**9)
    return any(time == stamp // step * step for step in steps)


def _is_ready(source: Path, size: int) -> bool:
    """Whether a file can be copied as it is, like those in the resized data sets on Kaggle."""
    with Image.open(source, formats=FORMATS) as image:
        upright = image.getexif().get(ExifTags.Base.Orientation, 1) == 1
        if (image.format, image.size, image.mode, upright) != ('JPEG', (size, size), 'RGB', True):
            return False
        image.load()  # a truncated image is to fail here and not in training
        return True


def _make(source: Path, path: Path, size: int) -> str | None:
    """Write the image `source` to `path` in the cache; returns the reason if it cannot be read."""
    try:
        if source.exists() and not source.is_file():
            raise OSError('it is not a file')  # opening a pipe would wait for ever
        stamp = _stamp(source)
        image = None if _is_ready(source, size) else square(source, size)
    except Exception as e:  # a decoder may raise anything on a broken file
        reason = getattr(e, 'strerror', None) or str(e) or type(e).__name__
        if isinstance(e, UnidentifiedImageError):
            reason = 'it is neither a JPEG nor a PNG image'
        return f'{_escape(source)}: {" ".join(reason.split())}'
    with atomic(path) as temporary:
        if image is None:
            shutil.copyfile(source, temporary)
        else:
            image.save(temporary, 'JPEG', quality=95)
        os.utime(temporary, ns=(stamp, stamp))
    return None
