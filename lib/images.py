"""The cache of square, resized JPEGs, and how one image is read into it."""

import math
import os
import shutil
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import pandas as pd
from PIL import ExifTags, Image, ImageOps
from tqdm import tqdm

from lib.cli import Stop
from lib.files import atomic


def cache(table: pd.DataFrame, home: Path, size: int) -> list[Path]:
    """Paths of the images of `table` (image_name, path, source) as `size` x `size` pixel JPEGs.

    They lie in HOME/cache/SIZE/SOURCE/NAME.jpg. Those that are missing, or whose source has
    changed since, are made by all cores.

    Raises: Stop that lists every image that cannot be read.
    """
    folder = home / 'cache' / str(size)
    made = [folder / s / f'{n}.jpg' for s, n in zip(table.source, table.image_name, strict=True)]
    jobs = [job for job in zip(map(Path, table.path), made, strict=True) if not _is_fresh(*job)]
    if not jobs:
        return made
    print(f'{len(jobs)} images to resize to {size} x {size} pixels, once', flush=True)
    make = partial(_make, size=size)
    if len(jobs) < 100:  # starting processes takes longer
        errors = list(map(make, jobs))
    else:
        # spawn: a fork of a process in which torch has threads can hang
        with ProcessPoolExecutor(n_cores(), mp_context=get_context('spawn')) as pool:
            results = pool.map(make, jobs, chunksize=16)
            errors = list(tqdm(results, total=len(jobs), unit=' images', disable=None))
    if errors := [error for error in errors if error]:
        raise Stop(f'{len(errors)} images cannot be read:\n  ' + '\n  '.join(errors))
    return made


def table_of(folder: Path) -> pd.DataFrame:
    """The images in `folder` and below it, or this one image: image_name, path, source.

    A name is the path from `folder` on, with its suffix. Raises: Stop where there is none.
    """
    if not folder.exists():
        raise Stop(f'there is no {folder}')
    known = Image.registered_extensions()
    paths = [folder]
    if folder.is_dir():
        paths = sorted(p for p in folder.rglob('*') if p.suffix.lower() in known and p.is_file())
    if not paths:
        raise Stop(f'there is no image in {folder}')
    base = folder if folder.is_dir() else folder.parent
    names = [p.relative_to(base).as_posix() for p in paths]
    return pd.DataFrame({'image_name': names, 'path': list(map(str, paths)), 'source': 'images'})


def square(path: Path, size: int) -> Image.Image:
    """The largest centred square of an image as a viewer shows it, at `size` x `size` pixels, RGB.

    Cropped, not letter-boxed: bars would tell the model the camera's aspect ratio.
    """
    with Image.open(path) as image:
        # JPEG only: decode at 1/2, 1/4 or 1/8, but to nearly twice what is asked for. That scaling
        # is little more than the mean of a block: closer to `size`, hairs and rulers alias
        scale = min(1, 1.9 * size / min(image.size))
        image.draft(None, (math.ceil(image.width * scale), math.ceil(image.height * scale)))
        image = ImageOps.exif_transpose(image).convert('RGB')
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    square = image.crop((left, top, left + side, top + side))
    return square.resize((size, size), Image.Resampling.LANCZOS)


def n_cores() -> int:
    """How many cores this process may use, which a container or a scheduler may limit."""
    return len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()


def _stamp(source: Path) -> int:
    """What a cached file's time is set to, in ns: it changes with its source's time and size.

    A copy of the cache must keep times (cp -p, rsync -t), or all is made again.
    """
    stat = source.stat()
    return stat.st_mtime_ns + stat.st_size


def _is_fresh(source: Path, made: Path) -> bool:
    """Whether `made` is there and of this `source`, or of one that this machine does not have."""
    if not (made.exists() and source.exists()):
        return made.exists()
    return made.stat().st_mtime_ns == _stamp(source)


def _is_ready(source: Path, size: int) -> bool:
    """Whether a file is just what the cache would hold, as in the resized copies on Kaggle."""
    with Image.open(source) as image:
        upright = image.getexif().get(ExifTags.Base.Orientation, 1) == 1
        if (image.format, image.size, image.mode, upright) != ('JPEG', (size, size), 'RGB', True):
            return False
        image.load()  # to the end: a truncated one is an error here, not in training
        return True


def _make(job: tuple[Path, Path], size: int) -> str | None:
    """Cache one image; the sentence that says why not, if it cannot be read."""
    source, made = job
    try:
        stamp = _stamp(source)
        image = None if _is_ready(source, size) else square(source, size)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as e:
        return f'{source}: {getattr(e, "strerror", None) or e}'
    with atomic(made) as temporary:
        if image is None:
            shutil.copyfile(source, temporary)
        else:
            image.save(temporary, quality=95)
        os.utime(temporary, ns=(stamp, stamp))
    return None
