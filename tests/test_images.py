"""The cache: square, as a viewer shows it, made once, made again when the source changes."""

import os
import threading

import numpy as np
import pandas as pd
import pytest
from PIL import ExifTags, Image
from test_locks import held_by_another

from lib import files, images
from lib.cli import Stop


def list_images(*paths) -> pd.DataFrame:
    return pd.DataFrame(
        {'path': list(map(str, paths)), 'image_name': [p.stem for p in paths], 'source': 's'}
    )


def test_the_square_is_cut_from_the_centre_and_nothing_is_squeezed(tmp_path):
    picture = np.zeros((100, 300, 3), np.uint8)
    picture[:, 100:200] = 255  # the centred square
    Image.fromarray(picture).save(tmp_path / 'a.png')
    assert np.asarray(images.square(tmp_path / 'a.png', 50)).min() == 255


def test_a_large_jpeg_decoded_at_reduced_scale_looks_like_a_full_decode(tmp_path):
    rng = np.random.default_rng(0)
    smooth = Image.fromarray(rng.integers(0, 256, (30, 40, 3), dtype=np.uint8))
    smooth.resize((1600, 1200), Image.Resampling.BICUBIC).save(tmp_path / 'a.jpg', quality=95)
    with Image.open(tmp_path / 'a.jpg') as image:
        full = image.convert('RGB').resize(
            (128, 128), Image.Resampling.LANCZOS, box=(200, 0, 1400, 1200)
        )
    difference = np.asarray(images.square(tmp_path / 'a.jpg', 128), float) - np.asarray(full, float)
    assert np.abs(difference).mean() < 1


@pytest.mark.parametrize('period', [2, 3, 5, 9, 13])
def test_lines_finer_than_the_result_can_show_leave_no_pattern(tmp_path, period):
    """1600 to 128 pixels shows no line finer than 25; a full decode and Lanczos leaves grey."""
    row = np.where(np.arange(2400) % period < period / 2, 255, 0).astype(np.uint8)
    lines = np.broadcast_to(row[None, :, None], (1600, 2400, 3))
    Image.fromarray(lines).save(tmp_path / 'a.jpg', quality=95)
    pattern = np.asarray(images.square(tmp_path / 'a.jpg', 128), float).std()
    assert pattern < 0.05 * row.std()


def test_a_rotated_photograph_is_shown_upright_and_other_modes_become_rgb(tmp_path):
    upright = Image.new('RGB', (64, 64), 'white')
    upright.paste('black', (0, 0, 64, 32))
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 3  # turned by 180 degrees
    upright.rotate(180).save(tmp_path / 'a.jpg', exif=exif, quality=95)
    upright.convert('L').save(tmp_path / 'grey.jpg')
    upright.convert('CMYK').save(tmp_path / 'cmyk.jpg')
    upright.convert('P').save(tmp_path / 'palette.png')
    grey = np.asarray(upright.convert('L'), np.uint16) * 257
    Image.fromarray(grey).save(tmp_path / '16bit.png')
    clear = Image.new('RGBA', (64, 64), (0, 0, 0, 0))  # black that a viewer does not show
    clear.paste((0, 0, 0, 255), (0, 0, 64, 32))
    clear.save(tmp_path / 'transparent.png')
    for path in sorted(tmp_path.iterdir()):
        pixels = np.asarray(images.square(path, 64), int)
        assert pixels.shape == (64, 64, 3)
        assert pixels[:28].mean() < 20 and pixels[36:].mean() > 235, path


def test_what_is_there_is_not_made_again_until_its_source_changes(tmp_path):
    source = tmp_path / 'a.png'
    Image.new('RGB', (80, 80), 'white').save(source)
    table = list_images(source)
    (made,) = images.cache(table, tmp_path, 64)
    inode = made.stat().st_ino
    assert images.cache(table, tmp_path, 64) == [made] and made.stat().st_ino == inode

    before = source.stat()
    Image.new('RGB', (90, 90), 'black').save(source)
    assert source.stat().st_size != before.st_size
    os.utime(source, ns=(before.st_mtime_ns, before.st_mtime_ns))  # another size, the same time
    images.cache(table, tmp_path, 64)
    assert np.asarray(Image.open(made)).max() == 0

    made.unlink()
    images.cache(table, tmp_path, 64)
    assert made.exists()


@pytest.mark.parametrize('step', [100, 10**3, 10**6, 10**7, 10**9, 2 * 10**9])
def test_the_cache_stays_good_where_the_file_system_keeps_coarser_times(step, tmp_path, capsys):
    source = tmp_path / 'a.png'
    Image.new('RGB', (80, 80)).save(source)
    for n_made in (1, 0):
        (made,) = images.cache(list_images(source), tmp_path, 64)
        assert ('1 images to resize' in capsys.readouterr().out) == n_made
        time = made.stat().st_mtime_ns // step * step
        os.utime(made, ns=(time, time))
    os.utime(source, ns=(time + 3 * 10**9,) * 2)  # another time
    images.cache(list_images(source), tmp_path, 64)
    assert '1 images to resize' in capsys.readouterr().out


def test_a_jpeg_of_the_right_size_is_taken_as_it_is(tmp_path):
    Image.new('RGB', (64, 64), 'red').save(tmp_path / 'a.jpg', quality=30)
    (made,) = images.cache(list_images(tmp_path / 'a.jpg'), tmp_path, 64)
    assert made.read_bytes() == (tmp_path / 'a.jpg').read_bytes()


def test_a_run_goes_without_the_images_that_were_left_out_and_a_fold_is_never_left_empty(
    tmp_path, capsys
):
    paths = [tmp_path / f'{name}.png' for name in 'abcde']
    for path in paths:
        Image.new('RGB', (64, 64)).save(path)
    table = list_images(*paths).assign(fold=[0, 0, 0, 1, 1])
    rows, names = images.prepare(table, tmp_path, 64, skipped=['b'], skip_bad=False)
    assert rows.image_name.tolist() == ['a', 'c', 'd', 'e'] and names == ['b']
    assert rows.index.tolist() == [0, 1, 2, 3] and all(path.is_file() for path in rows.cached)
    assert not (tmp_path / 'cache' / '64' / 's' / 'b.jpg').exists()

    paths[3].write_bytes(b'no picture')
    with pytest.raises(Stop, match=r'(?s)1 images cannot be read.*--skip_bad'):
        images.prepare(table, tmp_path, 64, skipped=['b'], skip_bad=False)
    rows, names = images.prepare(table, tmp_path, 64, skipped=['b'], skip_bad=True)
    assert rows.image_name.tolist() == ['a', 'c', 'e'] and names == ['b', 'd']
    assert 'd.png' in capsys.readouterr().out
    with pytest.raises(Stop, match='a fold is left without'):
        images.prepare(table, tmp_path, 64, skipped=['e'], skip_bad=True)


def test_16_bits_are_scaled_and_not_clipped(tmp_path):
    ramp = np.tile(np.linspace(0, 65535, 64).astype(np.uint16), (64, 1))
    Image.fromarray(ramp).save(tmp_path / 'a.png')
    pixels = np.asarray(images.square(tmp_path / 'a.png', 64))[0, :, 0].astype(int)
    assert np.abs(pixels - ramp[0] / 257).max() <= 1


@pytest.mark.parametrize('size', [(1, 1), (30_000, 1)])
def test_an_image_a_pixel_high_is_read_as_it_is(size, tmp_path):
    Image.new('RGB', size, (200, 100, 50)).save(tmp_path / 'a.png')
    pixels = np.asarray(images.square(tmp_path / 'a.png', 64))
    assert pixels.shape == (64, 64, 3) and (pixels == (200, 100, 50)).all()


def test_a_second_process_waits_for_the_cache_and_what_a_killed_one_left_is_gone(tmp_path, capsys):
    Image.new('RGB', (80, 80)).save(tmp_path / 'a.png')
    with files.atomic(tmp_path / 'cache' / '64' / 's' / 'a.jpg') as half:
        half.touch()
    half.with_name('a.jpg').unlink()
    half.write_text('half')  # as after a `kill -9`
    with held_by_another(tmp_path / 'cache' / '64' / '.lock') as process:
        threading.Timer(0.5, process.kill).start()
        (made,) = images.cache(list_images(tmp_path / 'a.png'), tmp_path, 64)
    assert np.asarray(Image.open(made)).shape == (64, 64, 3) and not half.exists()
    assert f'process {process.pid} on' in capsys.readouterr().out


def test_hidden_files_are_passed_over_and_other_formats_are_counted(tmp_path, capsys):
    names = ['b.JPG', 'a/c.png', '._b.jpg', '.hidden/d.jpg', 'e.tif', 'a/f.TIF', 'g.webp', 'notes']
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    table = images.list_images(tmp_path)
    assert table.image_name.tolist() == ['a/c.png', 'b.JPG']
    assert table.path.tolist() == [str(tmp_path / name) for name in table.image_name]
    printed = capsys.readouterr().out
    assert '2 .tif, 1 .webp, 1 without a suffix\n' in printed and 'jpg' not in printed.lower()
    assert images.list_images(tmp_path / 'a' / 'c.png').image_name.tolist() == ['c.png']
    assert capsys.readouterr().out == ''
    (tmp_path / 'a' / 'c.png').unlink()
    with pytest.raises(Stop, match='no JPEG or PNG image'):
        images.list_images(tmp_path / 'a')


def test_an_image_of_another_format_is_told_which_are_read(tmp_path):
    Image.new('RGB', (64, 64)).save(tmp_path / 'a.tif')
    with pytest.raises(Stop, match=r'a\.tif: it is neither a JPEG nor a PNG image'):
        images.cache(images.list_images(tmp_path / 'a.tif'), tmp_path, 64)


def test_a_file_name_with_control_characters_is_printed_in_escapes(tmp_path, capsys):
    path = tmp_path / 'a\x1b[31m\n.jpg'
    path.write_text('no picture')
    with pytest.raises(Stop, match=r'\\x1b\[31m\\n\.jpg'):
        images.cache(list_images(path), tmp_path, 64)
    (tmp_path / 'b.\x1b').touch()
    images.list_images(tmp_path)
    assert r"1 '.\x1b'" in capsys.readouterr().out
