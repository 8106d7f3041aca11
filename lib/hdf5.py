"""ISIC 2024's images, which lie in HDF5 files, as JPEGs in a folder."""

from collections.abc import Sequence
from pathlib import Path

from tqdm.contrib.concurrent import thread_map

from lib.cli import Stop
from lib.files import atomic
from lib.locks import held


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
