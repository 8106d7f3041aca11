"""What a stranger hands to the scripts is refused by one sentence, or read right; nothing changes.

A table each of tables, of flags, of files and of images; what one function alone refuses is tested
beside that function.
"""

import csv
import io
import json
import os
import pickle
import resource
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import QUICK, contents
from PIL import ExifTags, Image

from lib import callbacks, images, model, tables
from lib.cli import Stop

TRAIN = [*QUICK, '--epochs', 1]
TWIN = [*TRAIN, '--seed', 1, '--cutout', '--name', 'twin']  # a run of the fixture `home`


# Changes of a file, each a function of its path


def put(content: bytes) -> Callable:
    """Other content."""
    return lambda path: path.write_bytes(content)


def edit(old: str, new: str) -> Callable:
    """Replace `old`, which must be there, once."""

    def change(path: Path) -> None:
        assert old in path.read_text(), f'{path} does not hold {old}'
        path.write_text(path.read_text().replace(old, new, 1))

    return change


def recode(change: Callable[[str], bytes]) -> Callable:
    """The same text in other bytes."""
    return lambda path: path.write_bytes(change(path.read_text()))


def rows(change: Callable[[list], list]) -> Callable:
    """Change the rows below the header."""

    def write(path: Path) -> None:
        head, *body = csv.reader(io.StringIO(path.read_text()))
        buffer = io.StringIO()
        csv.writer(buffer, lineterminator='\n').writerows([head, *change(body)])
        path.write_text(buffer.getvalue())

    return write


def cell(column: int, value: str) -> Callable:
    """Set a cell of the first row below the header."""
    return rows(lambda r: [[*r[0][:column], value, *r[0][column + 1 :]], *r[1:]])


def values(**new: object) -> Callable:
    """Set values of a JSON object."""
    return lambda path: path.write_text(json.dumps({**json.loads(path.read_text()), **new}))


def gone(path: Path) -> None:
    path.unlink()


def folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


# Tables of a competition: what, file, change, the sentence. None: read as the table itself; '':
# refused or read, but all of its rows

NAME, AGE, DIAGNOSIS, TARGET = 0, 3, 5, 7  # columns of train.csv
TABLES = [
    ('no file', 'train.csv', gone, 'there is no train.csv'),
    ('a folder', 'test.csv', folder, 'is missing'),
    ('no bytes', 'train.csv', put(b''), 'cannot be read as CSV'),
    ('a header alone', 'train.csv', rows(lambda r: []), 'no rows'),
    ('a column less', 'train.csv', edit('patient_id', 'patient'), 'lacks the column'),
    ('a column more', 'train.csv', recode(lambda t: t.replace('\n', ',9\n').encode()), None),
    ('a column twice', 'train.csv', edit('diagnosis', 'sex'), 'has the column sex twice'),
    ('a name twice', 'train.csv', rows(lambda r: [r[0], *r]), 'stands twice'),
    ('a label of 2', 'train.csv', cell(TARGET, '2'), 'expected 0 or 1'),
    ('a label missing', 'train.csv', cell(TARGET, ''), 'expected 0 or 1'),
    ('a label in words', 'train.csv', cell(TARGET, 'malignant'), 'expected 0 or 1'),
    ('Latin-1', 'train.csv', recode(lambda t: t.replace('nevus', 'né').encode('latin-1')), 'UTF-8'),
    ('UTF-16', 'train.csv', recode(lambda t: t.encode('utf-16')), 'UTF-8'),
    ('a byte-order mark', 'train.csv', recode(lambda t: t.encode('utf-8-sig')), None),
    ('Windows line ends', 'train.csv', recode(lambda t: t.replace('\n', '\r\n').encode()), None),
    ('old Mac line ends', 'train.csv', recode(lambda t: t.replace('\n', '\r').encode()), None),
    ('a quoted comma', 'train.csv', cell(DIAGNOSIS, 'nevus, of a kind'), ''),
    ('a quote without end', 'train.csv', recode(lambda t: t.replace('nevus', '"', 1).encode()), ''),
    ('a row too long', 'train.csv', rows(lambda r: [[*r[0], 'x'], *r[1:]]), 'cannot be read'),
    ('a row cut off', 'train.csv', rows(lambda r: [*r[:-1], r[-1][:3]]), 'expected 0 or 1'),
    ('ages in words', 'train.csv', cell(AGE, 'sixty'), ''),
    ('an endless age', 'train.csv', cell(AGE, 'inf'), ''),
    ('no patient ids', 'train.csv', rows(lambda r: [[x[0], '', *x[2:]] for x in r]), ''),
    ('../ in a name', 'train.csv', cell(NAME, '../train/DEMO_1'), 'not in'),
    ('an absolute name', 'train.csv', cell(NAME, '/etc/passwd'), 'not in'),
    ('a drive letter', 'train.csv', cell(NAME, 'C:\\x'), 'not in'),
    ('NUL in a name', 'train.csv', cell(NAME, 'DEMO_1\0'), 'not in'),
    ('a name of nothing', 'train.csv', cell(NAME, ''), 'not in'),
    ('an image not there', 'train.csv', cell(NAME, 'ISIC_0'), 'not in'),
    ('other test names', 'test.csv', cell(NAME, 'ISIC_0'), 'different images'),
    ('a test name twice', 'sample_submission.csv', rows(lambda r: [r[0], *r]), 'different'),
]


@pytest.fixture(scope='module')
def reference(demo, ok, tmp_path_factory) -> Path:
    """The folds.csv of the tables as they are; homes beside its home have the same paths in it."""
    home = tmp_path_factory.mktemp('tables') / 'reference'
    ok('folds.py', '--data', demo, '--home', home, '--n_folds', 2)
    return home / 'folds.csv'


@pytest.mark.parametrize(('what', 'file', 'change', 'says'), TABLES, ids=[t[0] for t in TABLES])
def test_a_bad_table_is_refused_or_read_right(
    what, file, change, says, reference, demo, script, tmp_path
):
    data, home = tmp_path / 'data', reference.parent.with_name(what.replace('/', ''))
    data.mkdir()
    (data / 'jpeg').symlink_to(demo / 'jpeg')
    for path in demo.glob('*.csv'):
        shutil.copy(path, data)
    change(data / file)
    done = script('folds.py', '--data', data, '--home', home, '--n_folds', 2)
    made = (home / 'folds.csv').read_bytes() if home.exists() else b''
    assert 'Traceback' not in done.stderr
    assert (done.returncode, bool(made)) in ((0, True), (1, False)), done.stderr
    if says is None:
        assert made == reference.read_bytes()
    elif says:
        assert done.stderr.startswith('error: ') and says in done.stderr and not made
    else:
        assert made.count(b'\n') in (0, 73)


# Flags: the sentence, and the command; HOME is the fixture `home`

QUICKLY = ['train.py', '--home', 'HOME', *QUICK[:3]]
FLAGS = [
    ('--demo', 'folds.py', '--data', 'nowhere'),
    ('--demo has a place', 'folds.py', '--demo', '--home', 'x'),
    ('from 0 to 4294967295', 'folds.py', '--seed', 4294967296),
    ('2 or more', 'folds.py', '--n_folds', 1),
    ('groups of target 1', 'folds.py', '--data', 'DEMO', '--home', 'x', '--n_folds', 50),
    ('python folds.py', 'train.py', '--home', 'nowhere'),
    ('did you mean --size', *QUICKLY, '--sise', 64),
    ('from 64 to 4096', *QUICKLY, '--size', 0),
    ('from 64 to 4096', *QUICKLY, '--size', 99999),
    ('1 or more', *QUICKLY, '--epochs', 0),
    ('2 or more', *QUICKLY, '--batch_size', 0),
    ('1 or more', *QUICKLY, '--accumulate', 0),
    ('0 or more', *QUICKLY, '--lr_max', -1),
    ('--lr_min <= --lr_max', *QUICKLY, '--lr_min', 1, '--lr_max', 0.1),
    ('--lr_min <= --lr_max', *QUICKLY, '--lr_min', 0),
    ('0 or more', *QUICKLY, '--wd', -1),
    ('0 or more', *QUICKLY, '--neg_ratio', -1),
    ('0 or more', *QUICKLY, '--neg_ratio', '1e999'),
    ('a number', *QUICKLY, '--neg_ratio', 'nan'),
    ('0 or more', *QUICKLY, '--seed', -1),
    ('0 to 256', *QUICKLY, '--workers', -1),
    ('0 to 256', *QUICKLY, '--workers', 257),
    ('0 to 1', *QUICKLY, '--fold', 9),
    ('must be letters', *QUICKLY, '--name', '../x'),
    ('may be auto, fp32', *QUICKLY, '--precision', 'fp16'),  # on the CPU
    ('contradict each other', *QUICKLY, '--weights', 'w'),
    ('near it: efficientnet_b5', *QUICKLY[:3], '--arch', 'eficientnet_b5'),
    ('no architecture', *QUICKLY[:3], '--arch', '../x'),
    ('No such file', *QUICKLY[:3], '--arch', 'resnet18', '--weights', 'nowhere'),
    ('cannot be fetched', *QUICKLY[:3], '--arch', 'resnet18'),  # conftest keeps the hub away
    ('python train.py', 'infer.py', '--home', 'nowhere'),
    ('no run named x', 'infer.py', '--home', 'HOME', '--only', 'twin,x'),
    ('0 or more', 'infer.py', '--home', 'HOME', '--n_tta', -1),
    ('1 or more', 'infer.py', '--home', 'HOME', '--batch_size', 0),
    ('0.0001 to 0.9999', 'infer.py', '--home', 'HOME', '--prior', 0),
    ('0 to 256', 'infer.py', '--home', 'HOME', '--workers', 999),
    ('may be auto, fp32', 'infer.py', '--home', 'HOME', '--precision', 'half'),
    ('go together', 'infer.py', '--home', 'HOME', '--images', 'x'),
    ('there is no x', 'infer.py', '--home', 'HOME', '--images', 'x', '--out', 'y.csv'),
    ('no flag --sensitivity', 'infer.py', '--home', 'HOME', '--sensitivity', 0.9),
    ('python train.py', 'blend.py', '--home', 'nowhere'),
]


@pytest.fixture(scope='module')
def before(home) -> dict[str, str]:
    return contents(home)


@pytest.mark.parametrize('command', FLAGS, ids=lambda c: ' '.join(map(str, c[1:])))
def test_a_bad_flag_is_one_sentence_before_any_work(command, home, demo, before, refusal, tmp_path):
    says, *words = command
    words = [{'HOME': home, 'DEMO': demo}.get(word, word) for word in words]
    text = refusal(*words, cwd=tmp_path)
    assert says in text and text.count('\n') == 1
    assert not list(tmp_path.iterdir()) and contents(home) == before


# Files of a home with the runs `twin` and another: what, file, change, the sentence, the command

RUN, ANY = 'runs/twin/', ['infer.py', '--only', 'twin', '--n_tta', 0]
CONFIG, WEIGHTS = f'{RUN}config.json', f'{RUN}fold0/model.safetensors'
column = tables.COLUMNS.index


class Malicious:
    """What makes a folder when it is unpickled."""

    def __reduce__(self):
        return os.mkdir, ('code ran',)


PICKLE = pickle.dumps(Malicious())


def unfinish(path: Path) -> None:
    """Make a fold unfinished by a state, which is pickled code."""
    path.with_name('oof.csv').unlink()
    path.write_bytes(PICKLE)


def spoil(path: Path) -> None:
    """Weights that predict NaN."""
    state = model.read_weights(path)
    net = model.create('test_resnet', 64)
    net.load_state_dict({**state, 'fc.bias': torch.tensor([float('nan')])})
    model.save(net, path)


def leak(r: list[list[str]]) -> list[list[str]]:
    """Put the first labelled row into another fold than its group."""
    groups = [row[column('group')] for row in r]
    i = next(i for i, group in enumerate(groups) if groups.count(group) > 1)
    r[i][column('fold')] = str(1 - int(r[i][column('fold')]))
    return r


def relabel(r: list[list[str]]) -> list[list[str]]:
    """Exchange the first melanoma's and the first benign image's labels."""
    labels = [row[column('target')] for row in r]
    for label, other in (('0', '1'), ('1', '0')):
        r[labels.index(label)][column('target')] = other
    return r


FILES = [
    ('a source that is a path', 'folds.csv', cell(column('source'), '../../x'), 'is no source', []),
    ('NUL in a path', 'folds.csv', cell(column('path'), 'a\0b'), 'is no path', []),
    ('a fold of -1', 'folds.csv', cell(column('fold'), '-1'), 'no fold from 0 up', []),
    ('a fold of 1e300', 'folds.csv', cell(column('fold'), '1e300'), 'no fold from 0 up', []),
    ('a group in two folds', 'folds.csv', rows(leak), 'more than one fold', []),
    ('other labels', 'folds.csv', rows(relabel), 'folds.csv has changed', []),
    ('other labels, infer.py', 'folds.csv', rows(relabel), 'was trained on another', ANY),
    ('no folds.csv', 'folds.csv', gone, 'python folds.py', []),
    ('no folds.csv, infer.py', 'folds.csv', gone, 'python folds.py', ANY),
    ('config: no JSON', CONFIG, put(b'{'), 'cannot be read as JSON', ANY),
    ('config: too deep', CONFIG, put(b'[' * 10**5), 'cannot be read as JSON', ANY),
    ('config: a list', CONFIG, put(b'[1]'), 'no JSON object', ANY),
    ('config: a size', CONFIG, values(size=10**9), 'size is missing or holds', ANY),
    ('config: arch', CONFIG, values(arch='../../x'), 'no architecture', ANY),
    ('config: another', CONFIG, values(arch='test_vit'), 'not hold the weights', ANY),
    ('config: std', CONFIG, values(std=[0] * 3), 'std is missing or holds', ANY),
    ('config: skipped', CONFIG, values(skipped=[1]), 'skipped is missing', ANY),
    ('config: gone', CONFIG, gone, 'no config.json', []),
    ('config: other flags', CONFIG, values(seed=9), 'seed 9 (now 1)', []),
    ('config: a flag to come', CONFIG, values(new=9), 'new 9 (now None)', []),
    ('state: pickled code', f'{RUN}fold0/state.pt', unfinish, 'is not a state', []),
    ('weights: pickled code', WEIGHTS, put(PICKLE), 'not a safetensors', ANY),
    ('weights: text', WEIGHTS, put(b'{}'), 'not a safetensors', ANY),
    ('weights: NaN', WEIGHTS, spoil, '--precision fp32', ANY),
    ('record: no JSON', f'{RUN}fold0/tta_oof.json', put(b'{'), 'delete it and make it anew', ANY),
]


@pytest.mark.parametrize(
    ('what', 'file', 'change', 'says', 'command'), FILES, ids=[f[0] for f in FILES]
)
def test_a_bad_file_is_refused_and_changes_no_other(
    what, file, change, says, command, copy, refusal, tmp_path
):
    change(copy / file)
    before = contents(copy)
    assert says in refusal(*(command or ['train.py', *TWIN]), '--home', copy, cwd=tmp_path)
    assert not list(tmp_path.iterdir())  # no code ran
    after = contents(copy)
    if command == ANY:  # what is pooled of other settings goes before the first part is made
        for name in ('oof.csv', 'test.csv'):
            after.setdefault(RUN + name, before[RUN + name])
    assert after == before


@pytest.mark.parametrize(
    ('content', 'says'),
    [
        ('another architecture', 'another architecture'),
        (PICKLE, 'not a safetensors'),
        (b'\x10\0\0\0\0\0\0\0{"a":', 'not a safetensors'),
        (b'{}', 'not a safetensors'),
    ],
    ids=['another architecture', 'pickled code', 'cut off', 'text'],
)
def test_bad_weights_to_start_from_are_refused(content, says, home, before, refusal, tmp_path):
    weights = home / 'runs' / 'twin' / 'fold0' / 'model.safetensors'
    if isinstance(content, bytes):
        weights = tmp_path / 'w.safetensors'
        weights.write_bytes(content)
    start = ['--arch', 'resnet18', '--size', 64, '--weights', weights]
    assert says in refusal('train.py', '--home', home, *start, cwd=tmp_path)
    assert not (tmp_path / 'code ran').exists() and contents(home) == before


# Predictions: what, file, change; all of them for blend.py

PREDICTIONS = [
    (f'{file}: {what}', f'runs/twin/{file}', change)
    for file, pred in (('oof.csv', 6), ('test.csv', 1))
    for what, change in (
        ('1.5', cell(pred, '1.5')),
        ('-0.1', cell(pred, '-0.1')),
        ('NaN', cell(pred, '')),
        ('infinity', cell(pred, 'inf')),
        ('in words', cell(pred, 'high')),
        ('a row less', rows(lambda r: r[1:])),
        ('a row twice', rows(lambda r: [r[0], *r])),
    )
]


@pytest.mark.parametrize(('what', 'file', 'change'), PREDICTIONS, ids=[p[0] for p in PREDICTIONS])
def test_bad_predictions_are_refused(what, file, change, copy, refusal):
    change(copy / file)
    before = contents(copy)
    assert 'twin' in refusal('blend.py', '--home', copy)
    assert contents(copy) == before


def test_predictions_in_another_order_are_blended_the_same(copy, ok):
    ok('blend.py', '--home', copy)
    before = (copy / 'submission.csv').read_bytes()
    for name in ('oof.csv', 'test.csv'):
        rows(lambda r: r[::-1])(copy / 'runs' / 'twin' / name)
    ok('blend.py', '--home', copy)
    assert (copy / 'submission.csv').read_bytes() == before


# The machine: a full disk, a folder that cannot be written to, a cache that goes


def test_a_full_disk_is_one_sentence_and_nothing_is_lost(home, refusal, ok, tmp_path, copy):
    this = ['train.py', '--home', copy, *TRAIN, '--name', 'full']
    ok(*this, '--fold', 1)
    before = contents(copy)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        text = refusal(*this)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert 'make room, then run this again' in text and '.part' not in text
    after = contents(copy)
    assert before.items() <= after.items() and not [name for name in after if '.part' in name]
    assert 'out of fold' in ok(*this)


def test_a_folder_that_cannot_be_written_to_is_one_sentence(copy, refusal):
    (copy / 'runs' / 'denied').symlink_to('/proc/1/denied')
    text = refusal('train.py', '--home', copy, *TRAIN, '--name', 'denied')
    assert '/denied' in text and text.count('\n') == 1


def test_a_cache_that_goes_during_the_training_is_told_and_the_same_command_goes_on(
    copy, refusal, ok, monkeypatch
):
    this = ['train.py', '--home', copy, *QUICK, '--epochs', 2, '--name', 'short', '--fold', 0]
    seed = callbacks.SeedEpoch.before_epoch

    def lose(self):
        if self.epoch == 1:
            shutil.rmtree(copy / 'cache')
        seed(self)

    with monkeypatch.context() as patch:
        patch.setattr(callbacks.SeedEpoch, 'before_epoch', lose)
        text = refusal(*this)
    assert 'the cached image' in text and 'run this again' in text and text.count('\n') == 1
    assert 'goes on after epoch 1 of 2' in ok(*this)


def test_weights_that_explode_stop_with_the_flag_to_change(copy, refusal):
    rates = ['--lr_min', 9, '--lr_max', 9, '--wd', 1e38]
    text = refusal('train.py', '--home', copy, *QUICK, '--epochs', 3, '--name', 'nan', *rates)
    assert 'the loss is nan in fold 0, epoch' in text and 'try a smaller --lr_max' in text


# Images: how each is made, and whether it can be read


def picture() -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (90, 120, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def truncated(path: Path) -> None:
    picture().save(path, quality=95)
    path.write_bytes(path.read_bytes()[:3000])


def rotated(path: Path) -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    picture().save(path, exif=exif)


def sixteen_bits(path: Path) -> None:
    grey = np.random.default_rng(0).integers(0, 2**16, (90, 120), dtype=np.uint16)
    Image.fromarray(grey).save(path, 'PNG')


IMAGES = {
    'missing': (lambda path: None, False),
    'empty': (put(b''), False),
    'truncated': (truncated, False),
    'text': (put(b'no picture'), False),
    'eps': (lambda path: picture().save(path, 'EPS'), False),
    'bomb': (lambda path: Image.new('1', (14_000, 14_000)).save(path, 'PNG'), False),
    'folder': (lambda path: path.mkdir(), False),
    'pipe': (os.mkfifo, False),
    'png': (lambda path: picture().save(path, 'PNG'), True),
    'cmyk': (lambda path: picture().convert('CMYK').save(path), True),
    'grey': (lambda path: picture().convert('L').save(path), True),
    '16-bit': (sixteen_bits, True),
    'palette': (lambda path: picture().convert('P').save(path, 'PNG'), True),
    'rotated': (rotated, True),
    '1x1': (lambda path: picture().resize((1, 1)).save(path), True),
    '30000x1': (lambda path: picture().resize((30000, 1)).save(path), True),
}
BAD = [kind for kind, (_, readable) in IMAGES.items() if not readable]


@pytest.mark.parametrize('kind', IMAGES)
def test_an_image_is_read_or_named(kind, tmp_path):
    write, readable = IMAGES[kind]
    path = tmp_path / f'{kind}.jpg'
    write(path)
    table = pd.DataFrame({'image_name': [kind], 'path': [str(path)], 'source': 's'})
    if readable:
        with Image.open(images.cache(table, tmp_path, 64)[0]) as image:
            image.load()
            assert (image.size, image.mode, image.format) == ((64, 64), 'RGB', 'JPEG')
    else:
        with pytest.raises(Stop, match=rf'1 images cannot be read:\n  .*{kind}\.jpg: \w'):
            images.cache(table, tmp_path, 64)
        assert not list(tmp_path.rglob('cache/**/*.*jpg'))


def test_a_first_run_that_meets_bad_images_locks_nothing_and_can_go_without_them(
    demo, ok, refusal, tmp_path
):
    """Every kind among the labelled images: all are listed; then one among the test images."""
    data, home = shutil.copytree(demo, tmp_path / 'data'), tmp_path / 'home'
    ok('folds.py', '--data', data, '--home', home, '--n_folds', 2)
    folds = pd.read_csv(home / 'folds.csv')
    paths = [home / path for path in folds.path]
    for kind, i in zip(BAD, folds.index[folds.target == 0], strict=False):
        paths[i].unlink()
        IMAGES[kind][0](paths[i])
    train = ['train.py', '--home', home, *TRAIN, '--name', 'a']
    text = refusal(*train)
    assert f'{len(BAD)} images cannot be read' in text and '--skip_bad' in text
    bad = folds.image_name[folds.target == 0][: len(BAD)]
    assert all(f'{name}.jpg: ' in text for name in bad)
    assert not (home / 'runs').exists()

    other = [*train, '--seed', 1]  # so that the name can be had by other flags
    ok(*other, '--skip_bad')
    config = json.loads((home / 'runs' / 'a' / 'config.json').read_text())
    assert config['seed'] == 1 and config['skipped'] == bad.tolist()
    assert 'fold 0 is finished' in ok(*other)  # --skip_bad is no flag of the result
    test = paths[folds.index[folds.split == 'test'][0]]
    kept = test.read_bytes()
    test.write_bytes(b'no picture')
    before = contents(home / 'runs')
    text = refusal('infer.py', '--home', home, '--n_tta', 0)
    assert '1 images cannot be read' in text and test.name in text
    assert contents(home / 'runs') == before
    test.write_bytes(kept)
    ok('infer.py', '--home', home, '--n_tta', 0)
    oof = pd.read_csv(home / 'runs' / 'a' / 'oof.csv')
    assert set(oof.image_name) == set(folds.image_name[folds.split == 'train']) - set(bad)
