"""The cache of square, resized JPEGs, and how one image is read into it."""

import io
import math
import os
import re
import shutil
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pandas as pd
from PIL import ExifTags, Image, ImageOps, PngImagePlugin
from tqdm.contrib.concurrent import thread_map

from lib import locks
from lib.cli import Stop
from lib.files import atomic
from lib.layouts import SUFFIXES

# No other format is opened, whatever the suffix says: for an EPS Pillow would start a program
FORMATS = ('JPEG', 'PNG', 'BMP', 'TIFF', 'WEBP')
PngImagePlugin.MAX_TEXT_CHUNK = 2**26  # bytes of metadata; editors write more than Pillow's 1 MB


def cache(table: pd.DataFrame, home: Path, size: int, may_fail: bool = False) -> list[Path | None]:
    """Paths of the images of `table` (image_name, path, source) as `size` x `size` pixel JPEGs.

    The files are HOME/cache/SIZE/SOURCE/NAME.jpg. Those that are missing, or whose source has
    changed, are made on all cores; a second process waits. If they `may_fail`, the path of an image
    that cannot be read is None, and lines name it. Raises: Stop that lists all such images, also
    where they `may_fail` and all of them do.
    """
    folder = home / 'cache' / str(size)
    rows = table[['source', 'image_name', 'path']].itertuples(index=False, name=None)
    jobs = [(Path(path), folder / source / f'{name}.jpg') for source, name, path in rows]
    paths = [path for _, path in jobs]
    if all(_is_fresh(*job) for job in jobs):
        return paths
    with locks.held(folder / '.lock'):
        stale = [job for job in jobs if not _is_fresh(*job)]
        if stale:
            print(f'{len(stale)} images to resize to {size} x {size} pixels, once', flush=True)
        # threads do: Pillow releases Python's lock while it decodes, resizes and encodes
        options = {'max_workers': n_cores(), 'unit': ' images', 'disable': None}
        results = thread_map(lambda job: _make(*job, size), stale, **options)
    errors = {path: error for (_, path), error in zip(stale, results, strict=True) if error}
    listing = f'{len(errors)} images cannot be read:\n  ' + '\n  '.join(errors.values())
    if errors and (not may_fail or len(errors) == len(table)):
        advice = (
            ', or put their names into DATA/exclude.txt, a name a line, and make folds.csv anew'
        )
        raise Stop(f'{listing}\nReplace them{"" if may_fail else advice}')
    if errors:
        print(listing)
    return [None if path in errors else path for path in paths]


def list_images(folder: Path) -> pd.DataFrame:
    """A table of the images in and below `folder`, or of this one image: image_name, path, source.

    A name is the path relative to `folder`, with its suffix. Hidden files and folders are left out.
    Raises: Stop where there is no image, or where `folder` is the root of the file system.
    """
    if folder.resolve() == folder.resolve().parent:
        raise Stop(f'{folder} is all of the file system; name a folder of images')
    base, names = folder.parent, [Path(folder.name)]
    if folder.is_dir():
        base, names = folder, sorted(path.relative_to(folder) for path in folder.rglob('*'))
        names = [n for n in names if not any(part.startswith('.') for part in n.parts)]
    names = [n for n in names if n.suffix.lower() in SUFFIXES and (base / n).is_file()]
    if not names:
        raise Stop(f'there is no image in {folder}')
    paths = [str(base / name) for name in names]
    names = [name.as_posix() for name in names]
    if wrong := [name for name in names if re.search('[\ud800-\udfff]', name)]:
        raise Stop(f'{folder}: {wrong[0]!r} is not a name in UTF-8; rename it')
    return pd.DataFrame({'image_name': names, 'path': paths, 'source': 'images'})


def square(path: Path, size: int) -> Image.Image:
    """The largest centred square of an image as a viewer shows it, at `size` x `size` pixels, RGB.

    The image is cropped and not letter-boxed, since bars would show the model the camera's aspect
    ratio.
    """
    try:
        image = _decode(path, size)
    except OSError as e:
        data = path.read_bytes() if 'truncated' in str(e) else b''
        if not data.startswith(b'\xff\xd8'):
            raise
        # Where a JPEG lacks its end marker alone, its pixels do not depend on what would follow
        ends = (b'\xff\xd9', b'\x55' * 4096 + b'\xff\xd9')
        image, other = (_decode(io.BytesIO(data + end), size) for end in ends)
        if (np.asarray(image) != np.asarray(other)).any():
            raise
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    cropped = image.crop((left, top, left + side, top + side))
    return cropped.resize((size, size), Image.Resampling.LANCZOS)


def _decode(file: Path | BinaryIO, size: int) -> Image.Image:
    """The whole image, RGB and upright, of at least 1.9 times `size` pixels where it is larger."""
    with Image.open(file, formats=FORMATS) as image:
        # A JPEG is decoded at 1/2, 1/4 or 1/8 of its size, but to at least 1.9 times what is asked
        # for: that scaling is coarse, and hairs and rulers would alias if it came closer to `size`
        scale = min(1, 1.9 * size / min(image.size))
        image.draft(None, (math.ceil(image.width * scale), math.ceil(image.height * scale)))
        image.load()
        if not _is_upright(image):
            image = ImageOps.exif_transpose(image)
    if image.mode.startswith('I'):  # 16 bits of grey; Pillow would make all but the darkest white
        image = Image.fromarray((np.asarray(image) // 257).clip(0, 255).astype(np.uint8))
    return image.convert('RGB')


def _is_upright(image: Image.Image) -> bool:
    with suppress(Exception):  # a camera or an editor may write broken metadata beside good pixels
        return image.getexif().get(ExifTags.Base.Orientation, 1) == 1
    return True


def n_cores() -> int:
    """The number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()


def _stamp(source: Path) -> int:
    """The modification time, in s, that a cached file gets: it tells its source's time and size.

    It is even, as some file systems keep times. A copy of the cache must keep times (cp -p,
    rsync -t), or the cache is made again.
    """
    stat = source.stat()
    return (int(stat.st_mtime) + stat.st_size) // 2 * 2


def _is_fresh(source: Path, path: Path) -> bool:
    """Whether `path` is the cached image of `source`, which may no longer be on this machine."""
    if not path.exists() or not source.exists():
        return path.exists()
    return int(path.stat().st_mtime) == _stamp(source)


def _is_ready(source: Path, size: int) -> bool:
    """Whether a file can be copied as it is, like those in the resized data sets on Kaggle."""
    with Image.open(source, formats=FORMATS) as image:
        if (image.format, image.size, image.mode) != ('JPEG', (size, size), 'RGB'):
            return False
        with suppress(OSError):  # of a truncated image, which square() refuses or mends
            image.load()
            return _is_upright(image)
        return False


def _make(source: Path, path: Path, size: int) -> str | None:
    """Write the image `source` to `path` in the cache; returns the reason if it cannot be read."""
    try:
        if source.exists() and not source.is_file():
            raise OSError('it is not a file')  # opening a pipe would wait for ever
        stamp = _stamp(source)
        image = None if _is_ready(source, size) else square(source, size)
    except Exception as e:  # a decoder may raise anything on a broken file
        reason = getattr(e, 'strerror', None) or str(e) or type(e).__name__
        return f'{source}: {" ".join(reason.split())}'
    with atomic(path) as temporary:
        if image is None:
            shutil.copyfile(source, temporary)
        else:
            image.save(temporary, 'JPEG', quality=95)
        os.utime(temporary, (stamp, stamp))
    return None
