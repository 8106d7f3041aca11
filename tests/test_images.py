"""The cache: square, as a viewer shows it, made once, made again when the source changes."""

import os
import struct
import threading
import zlib

import numpy as np
import pandas as pd
import pytest
from PIL import ExifTags, Image, PngImagePlugin
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
    sixteen_bits = np.asarray(upright.convert('L'), np.uint16) * 257
    Image.fromarray(sixteen_bits).save(tmp_path / '16bit.png')
    for path in sorted(tmp_path.iterdir()):
        pixels = np.asarray(images.square(path, 64), int)
        assert pixels.shape == (64, 64, 3)
        assert pixels[:28].mean() < 20 and pixels[36:].mean() > 235, path


def test_16_bits_are_scaled_and_not_clipped(tmp_path):
    ramp = np.tile(np.linspace(0, 65535, 64).astype(np.uint16), (64, 1))
    Image.fromarray(ramp).save(tmp_path / 'a.png')
    pixels = np.asarray(images.square(tmp_path / 'a.png', 64))[0, :, 0].astype(int)
    assert np.abs(pixels - ramp[0] / 257).max() <= 1


def test_what_is_there_is_not_made_again_until_its_source_changes(tmp_path):
    source = tmp_path / 'a.png'

    def write(colour, size, time):
        Image.new('RGB', (80, 80), colour).save(source)
        source.write_bytes(source.read_bytes().ljust(size, b'\0'))  # behind the image's end
        os.utime(source, (time, time))

    def cached() -> tuple:
        (made,) = images.cache(list_images(source), tmp_path, 64)
        with Image.open(made) as image:
            return made, made.stat().st_ino, image.getpixel((9, 9))

    write('#600000', 1000, 10**9)
    made, inode, _ = cached()
    assert cached()[:2] == (made, inode)
    write('#006000', 1000, 10**9 + 2)
    assert cached()[2][1] > 80
    write('#000060', 1000, 10**9 - 10**6)  # an older image in its place
    assert cached()[2][2] > 80
    write('#600000', 1002, 10**9 - 10**6)  # another one of the same time
    assert cached()[2][0] > 80

    made.unlink()
    assert cached()[0].exists()
    source.unlink()  # the images may be on another machine
    assert cached()[0] == made


@pytest.mark.parametrize('step', [1, 10**9, 2 * 10**9])  # nanoseconds
def test_the_cache_stays_good_where_the_file_system_keeps_coarser_times(step, tmp_path, capsys):
    source = tmp_path / 'a.png'
    Image.new('RGB', (80, 80)).save(source)
    for n_made in (1, 0):
        (made,) = images.cache(list_images(source), tmp_path, 64)
        assert ('1 images to resize' in capsys.readouterr().out) == n_made
        time = made.stat().st_mtime_ns // step * step
        os.utime(made, ns=(time, time))


def test_a_jpeg_of_the_right_size_is_taken_as_it_is_and_another_made_in_high_quality(tmp_path):
    Image.new('RGB', (64, 64), 'red').save(tmp_path / 'a.jpg', quality=30)
    Image.new('RGB', (80, 80), 'red').save(tmp_path / 'b.jpg', quality=30)
    Image.new('RGB', (80, 80), 'red').save(tmp_path / 'witness.jpg', quality=95)
    paths = images.cache(list_images(tmp_path / 'a.jpg', tmp_path / 'b.jpg'), tmp_path, 64)
    assert paths[0].read_bytes() == (tmp_path / 'a.jpg').read_bytes()
    with Image.open(paths[1]) as made, Image.open(tmp_path / 'witness.jpg') as witness:
        assert made.quantization == witness.quantization


def test_a_jpeg_of_the_right_size_that_lies_on_its_head_is_turned(tmp_path):
    upright, exif = Image.new('RGB', (64, 64), 'white'), Image.Exif()
    upright.paste('black', (0, 0, 64, 32))
    exif[ExifTags.Base.Orientation] = 3
    upright.rotate(180).save(tmp_path / 'a.jpg', exif=exif, quality=95)
    (made,) = images.cache(list_images(tmp_path / 'a.jpg'), tmp_path, 64)
    with Image.open(made) as image:  # as training reads it, which heeds no such flag
        pixels = np.asarray(image, int)
    assert pixels[:28].mean() < 20 and pixels[36:].mean() > 235


def test_a_jpeg_of_the_right_size_that_is_cut_off_is_refused(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / 'a.jpg', quality=95)
    whole = (tmp_path / 'a.jpg').read_bytes()
    (tmp_path / 'a.jpg').write_bytes(whole[: len(whole) // 2])
    with pytest.raises(Stop, match=r'1 images cannot be read:\n.*a\.jpg: .*truncated'):
        images.cache(list_images(tmp_path / 'a.jpg'), tmp_path, 64)
    assert not list(tmp_path.rglob('cache/**/*.jpg'))


def test_images_of_two_sizes_lie_side_by_side(tmp_path):
    Image.new('RGB', (90, 80)).save(tmp_path / 'a.png')
    paths = [images.cache(list_images(tmp_path / 'a.png'), tmp_path, size)[0] for size in (64, 72)]
    sizes = [Image.open(path).size for path in paths]
    assert sizes == [(64, 64), (72, 72)]


def test_an_image_that_cannot_be_read_is_none_where_it_may_fail_unless_all_do(tmp_path, capsys):
    Image.new('RGB', (80, 80)).save(tmp_path / 'a.png')
    (tmp_path / 'b.png').write_bytes(b'no picture')
    table = list_images(tmp_path / 'a.png', tmp_path / 'b.png')
    (made, none) = images.cache(table, tmp_path, 64, may_fail=True)
    assert made.exists() and none is None and 'b.png: cannot' in capsys.readouterr().out
    with pytest.raises(Stop, match=r'(?s)1 images cannot be read.*b\.png.*exclude\.txt'):
        images.cache(table, tmp_path, 64)
    with pytest.raises(Stop, match='1 images cannot be read'):
        images.cache(table[1:], tmp_path, 64, may_fail=True)


@pytest.mark.parametrize('size', [(1, 1), (30_000, 1)])
def test_an_image_a_pixel_high_is_read_as_it_is(size, tmp_path):
    Image.new('RGB', size, (200, 100, 50)).save(tmp_path / 'a.png')
    pixels = np.asarray(images.square(tmp_path / 'a.png', 64))
    assert pixels.shape == (64, 64, 3) and (pixels == (200, 100, 50)).all()


def test_a_second_process_waits_for_the_cache_and_what_a_killed_one_left_is_gone(tmp_path):
    Image.new('RGB', (80, 80)).save(tmp_path / 'a.png')
    with files.atomic(tmp_path / 'cache' / '64' / 's' / 'a.jpg') as half:
        half.touch()
    half.with_name('a.jpg').unlink()
    half.write_text('half')  # as after a `kill -9`
    with held_by_another(tmp_path / 'cache' / '64' / '.lock') as process:
        threading.Timer(0.5, process.kill).start()
        (made,) = images.cache(list_images(tmp_path / 'a.png'), tmp_path, 64)
    assert np.asarray(Image.open(made)).shape == (64, 64, 3) and not half.exists()


def test_hidden_files_and_other_formats_are_passed_over(tmp_path):
    names = ['b.JPG', 'a/c.png', '._b.jpg', '.hidden/d.jpg', 'e.dcm', 'a/f.GIF', 'notes']
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    table = images.list_images(tmp_path)
    assert table.image_name.tolist() == ['a/c.png', 'b.JPG']
    assert table.path.tolist() == [str(tmp_path / name) for name in table.image_name]
    assert images.list_images(tmp_path / 'a' / 'c.png').image_name.tolist() == ['c.png']
    (tmp_path / 'a' / 'c.png').unlink()
    with pytest.raises(Stop, match='there is no image in'):
        images.list_images(tmp_path / 'a')


def test_good_pixels_beside_broken_or_large_metadata_are_read(tmp_path):
    image = Image.effect_noise((90, 80), 60).convert('RGB')
    expected = np.asarray(image.crop((5, 0, 85, 80)).resize((64, 64), Image.Resampling.LANCZOS))
    image.save(tmp_path / 'icc.png', icc_profile=b'\0' * 2_000_000)
    info = PngImagePlugin.PngInfo()
    info.add_itxt('XML:com.adobe.xmp', 'x' * 3_000_000, zip=True)
    image.save(tmp_path / 'xmp.png', pnginfo=info)
    image.save(tmp_path / 'exif.png')
    data, chunk = (tmp_path / 'exif.png').read_bytes(), b'eXIf\0\x08\0\x02\x01\x12\0\x03'
    at, crc = data.index(b'IDAT') - 4, struct.pack('>I', zlib.crc32(chunk))
    chunk = struct.pack('>I', len(chunk) - 4) + chunk + crc
    (tmp_path / 'exif.png').write_bytes(data[:at] + chunk + data[at:])
    for path in tmp_path.glob('*.png'):
        assert (np.asarray(images.square(path, 64)) == expected).all(), path


@pytest.mark.parametrize('progressive', [False, True])
@pytest.mark.parametrize('size', [64, 90])  # 64 is that of the cache
def test_a_jpeg_that_lacks_its_end_marker_alone_is_read_and_any_other_cut_is_not(
    progressive, size, tmp_path
):
    path, pixels = tmp_path / 'a.jpg', np.random.default_rng(0).integers(0, 256, (size, size, 3))
    Image.fromarray(pixels.astype(np.uint8)).save(path, quality=90, progressive=progressive)
    whole, expected = path.read_bytes(), np.asarray(images.square(path, 64))
    path.write_bytes(whole[:-2])
    assert (np.asarray(images.square(path, 64)) == expected).all()
    (made,) = images.cache(list_images(path), tmp_path, 64)
    with Image.open(made) as image:  # the cache has a whole one
        assert np.abs(np.asarray(image, int) - expected).mean() < 20
    for cut in (8, 40, len(whole) // 3, len(whole) - 700):
        path.write_bytes(whole[:-cut])
        with pytest.raises(OSError, match='truncated'):
            images.square(path, 64)


@pytest.mark.parametrize('form', ['BMP', 'TIFF', 'WEBP', 'PNG'])
def test_what_a_clinic_may_have_is_read_whatever_its_suffix_says(form, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    options = {'lossless': True} if form == 'WEBP' else {}
    Image.fromarray(pixels).save(tmp_path / 'a.jpg', form, **options)
    assert (np.asarray(images.square(tmp_path / 'a.jpg', 64)) == pixels).all()
    (tmp_path / 'a.jpg').rename(tmp_path / f'a.{form.lower()}')
    assert images.list_images(tmp_path).image_name.tolist() == [f'a.{form.lower()}']
