"""What a stranger hands to the scripts is refused by one sentence, or read right; nothing changes.

A table each of tables, of flags, of files and of images; what one function alone refuses is tested
beside that function.
"""

import csv
import io
import json
import os
import pickle
import re
import resource
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import QUICK, Malicious, contents
from PIL import Image

from lib import callbacks, model, tables

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


# Tables of a competition: what, file, change, the sentence. None: read as the table itself; 72:
# read, with that many rows

NAME, DIAGNOSIS, TARGET = 0, 5, 7  # columns of train.csv
TABLES = [
    ('no file', 'train.csv', gone, 'there is no train.csv'),
    ('a folder', 'train.csv', folder, 'there is no train.csv'),
    ('no bytes', 'train.csv', put(b''), 'cannot be read as CSV'),
    ('a header alone', 'train.csv', rows(lambda r: []), 'no rows'),
    ('a column by another name', 'train.csv', edit('patient_id', 'Patient'), None),
    ('a column less', 'train.csv', edit('image_name', 'x'), 'lacks the column image_name'),
    ('a column more', 'train.csv', recode(lambda t: t.replace('\n', ',9\n').encode()), None),
    ('a column twice', 'train.csv', edit('diagnosis', 'sex'), 'has the column sex twice'),
    ('a name twice', 'train.csv', rows(lambda r: [r[0], *r]), 'stands twice'),
    ('a label of 2', 'train.csv', cell(TARGET, '2'), 'expected 0 or 1'),
    ('a label missing', 'train.csv', cell(TARGET, ''), 71),
    ('a label in words', 'train.csv', cell(TARGET, 'malignant'), 'expected 0 or 1'),
    ('Latin-1', 'train.csv', recode(lambda t: t.replace('nevus', 'né').encode('latin-1')), 'UTF-8'),
    ('UTF-16', 'train.csv', recode(lambda t: t.encode('utf-16')), 'UTF-8'),
    ('a byte-order mark', 'train.csv', recode(lambda t: t.encode('utf-8-sig')), None),
    ('Windows line ends', 'train.csv', recode(lambda t: t.replace('\n', '\r\n').encode()), None),
    ('old Mac line ends', 'train.csv', recode(lambda t: t.replace('\n', '\r').encode()), None),
    ('a quoted comma', 'train.csv', cell(DIAGNOSIS, 'nevus, of a kind'), 72),
    (
        'a quote without end',
        'train.csv',
        recode(lambda t: t.replace('nevus', '"', 1).encode()),
        'CSV',
    ),
    ('a row too long', 'train.csv', rows(lambda r: [[*r[0], 'x'], *r[1:]]), 'cannot be read'),
    ('a row cut off', 'train.csv', rows(lambda r: [*r[:-1], r[-1][:3]]), 71),
    ('no patient ids', 'train.csv', rows(lambda r: [[x[0], '', *x[2:]] for x in r]), 72),
    ('../ in a name', 'train.csv', cell(NAME, '../train/DEMO_1'), 'no image_name'),
    ('a name of nothing', 'train.csv', cell(NAME, ''), 'no image_name'),
    ('an image not there', 'train.csv', cell(NAME, 'ISIC_0'), 'not below'),
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
    elif isinstance(says, int):  # rows
        assert made.count(b'\n') == 1 + says
    else:
        assert done.stderr.startswith('error: ') and says in done.stderr and not made


# Flags: the sentence, and the command; HOME is the fixture `home`

QUICKLY = ['train.py', '--home', 'HOME', *QUICK[:3]]
FLAGS = [
    ('--demo', 'folds.py', '--data', 'nowhere'),
    ('--demo has a place', 'folds.py', '--demo', '--home', 'x'),
    ('from 0 to 4294967295', 'folds.py', '--seed', 4294967296),
    ('groups of target 1', 'folds.py', '--data', 'DEMO', '--home', 'x', '--n_folds', 50),
    ('python folds.py', 'train.py', '--home', 'nowhere'),
    ('from 64 to 4096', *QUICKLY, '--size', 99999),
    ('2 or more', *QUICKLY, '--batch_size', 0),
    ('1 or more', *QUICKLY, '--accumulate', 0),
    ('--lr_min <= --lr_max', *QUICKLY, '--lr_min', 1, '--lr_max', 0.1),
    ('0 or more', *QUICKLY, '--wd', -1),
    ('0 or more', *QUICKLY, '--neg_ratio', '1e999'),
    ('0 to 1', *QUICKLY, '--fold', 9),
    ('must be letters', *QUICKLY, '--name', '../x'),
    ('may be auto, fp32', *QUICKLY, '--precision', 'fp16'),  # on the CPU
    ('contradict each other', *QUICKLY, '--weights', 'w'),
    ('near it: efficientnet_b5', *QUICKLY[:3], '--arch', 'eficientnet_b5'),
    ('nope', *QUICKLY[:3], '--arch', 'efficientnet_b5.nope'),
    ('No such file', *QUICKLY[:3], '--arch', 'resnet18', '--weights', 'nowhere'),
    ('--weights FILE', *QUICKLY[:3], '--arch', 'resnet18'),  # conftest keeps the hub away
    ('python train.py', 'infer.py', '--home', 'nowhere'),
    ("no run named 'x'", 'infer.py', '--home', 'HOME', '--only', 'twin,x'),
    ('1 or more', 'infer.py', '--home', 'HOME', '--batch_size', 0),
    ('may be auto, fp32', 'infer.py', '--home', 'HOME', '--precision', 'half'),
    ('--images needs --out', 'infer.py', '--home', 'HOME', '--images', 'x'),
    ('there is no image in', 'infer.py', '--home', 'HOME', '--images', 'x', '--out', 'y.csv'),
    ('need --labels', 'infer.py', '--home', 'HOME', '--positive', 'mel'),
    ('--labels needs --images', 'infer.py', '--home', 'HOME', '--labels', 'x.csv'),
    ('all of the file system', 'infer.py', '--home', 'HOME', '--images', '/', '--out', 'y.csv'),
    ('is a file; name a folder', 'infer.py', '--home', 'HOME', '--export', __file__),
    ('with weights from 0 up', 'blend.py', '--home', 'HOME', '--mix', 'twin = 1e308, b=1e308'),
    ('a new file', 'infer.py', '--home', 'HOME', '--images', 'x', '--out', 'y.jpg'),
    ('mean, rank, greedy, stack', 'blend.py', '--how', 'best'),
    ('platt', 'blend.py', '--calibrate', 'isotonic'),
    ('0.0001 to 0.9999', 'blend.py', '--prior', 1.5),
    ('leave --only and --how out', 'blend.py', '--mix', 'a=1', '--how', 'rank'),
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


PICKLE = pickle.dumps(Malicious('code ran'))


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
    ('a group in two folds', 'folds.csv', rows(leak), 'more than one fold', []),
    ('other labels', 'folds.csv', rows(relabel), 'was trained on another', []),
    ('other labels, infer.py', 'folds.csv', rows(relabel), 'was trained on another', ANY),
    ('no folds.csv, infer.py', 'folds.csv', gone, 'python folds.py', ANY),
    ('config: no JSON', CONFIG, put(b'{'), 'is missing or no JSON', ANY),
    ('config: a size', CONFIG, values(size=10**9), 'size is missing or', ANY),
    ('config: arch', CONFIG, values(arch='../../x'), 'no architecture', ANY),
    ('config: another', CONFIG, values(arch='test_vit'), 'not hold the weights', ANY),
    ('config: gone', CONFIG, gone, 'no config.json', []),
    ('config: other flags', CONFIG, values(seed=9), 'seed 9 (now 1); give this', []),
    ('config: a flag to come', CONFIG, values(new=9), 'new 9 (now None)', []),
    ('weights: pickled code', WEIGHTS, put(PICKLE), 'not a safetensors', ANY),
    ('weights: NaN', WEIGHTS, spoil, '--precision fp32', ANY),
    (
        'record: no JSON',
        f'{RUN}fold0/tta_oof.json',
        put(b'{'),
        'bring it back, or make it anew',
        ANY,
    ),
    (
        'predictions: 1.5',
        f'{RUN}oof.csv',
        cell(6, '1.5'),
        'not between 0 and 1: twin/oof.csv: 1 of',
        ['blend.py'],
    ),
    ('predictions: NaN', f'{RUN}test.csv', cell(1, ''), 'is not a number', ['blend.py']),
    ('predictions: less', f'{RUN}oof.csv', rows(lambda r: r[1:]), 'for other images', ['blend.py']),
    ('predictions: twice', f'{RUN}test.csv', rows(lambda r: [r[0], *r]), 'more than', ['blend.py']),
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
    assert contents(copy) == before


def test_bad_weights_to_start_from_are_refused(home, before, refusal, tmp_path):
    pickled = tmp_path / 'w.safetensors'
    pickled.write_bytes(PICKLE)
    for weights, says in ((home / WEIGHTS, 'another architecture'), (pickled, 'not a safetensors')):
        start = ['--arch', 'resnet18', '--size', 64, '--weights', weights]
        assert says in refusal('train.py', '--home', home, *start, cwd=tmp_path)
    assert list(tmp_path.iterdir()) == [pickled] and contents(home) == before


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
    assert 'File too large' in text and 'make room' in text and '.part' not in text
    assert str(copy) in text  # the file is named
    after = contents(copy)
    assert before.items() <= after.items() and not [name for name in after if '.part' in name]
    assert 'out of fold' in ok(*this)


def test_a_folder_that_cannot_be_written_to_is_one_sentence(copy, refusal):
    (copy / 'runs' / 'denied').symlink_to('/proc/1/denied')
    text = refusal('train.py', '--home', copy, *TRAIN, '--name', 'denied')
    assert '/denied' in text and text.count('\n') == 1


def test_a_cache_that_goes_during_a_training_costs_an_epoch(copy, refusal, ok, monkeypatch):
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


# Images that cannot be read, and how each is made


def picture() -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (90, 120, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def truncated(path: Path) -> None:
    picture().save(path, quality=95)
    path.write_bytes(path.read_bytes()[:3000])


BAD = {
    'missing': lambda path: None,
    'empty': put(b''),
    'truncated': truncated,
    'text': put(b'no picture'),
    'eps': lambda path: picture().save(path, 'EPS'),
    'bomb': lambda path: Image.new('1', (14_000, 14_000)).save(path, 'PNG'),
    'folder': lambda path: path.mkdir(),
    'pipe': os.mkfifo,  # to open it would wait for ever
}


def test_bad_images_are_listed_before_any_work_and_left_out(demo, ok, refusal, tmp_path):
    """Every kind among the labelled images, which an exclude.txt then names."""
    data, home = shutil.copytree(demo, tmp_path / 'data'), tmp_path / 'home'
    ok('folds.py', '--data', data, '--home', home, '--n_folds', 2)
    folds = pd.read_csv(home / 'folds.csv')
    paths = [home / path for path in folds.path]
    for write, i in zip(BAD.values(), folds.index[folds.target == 0], strict=False):
        paths[i].unlink()
        write(paths[i])
    train = ['train.py', '--home', home, *TRAIN, '--name', 'a']
    text = refusal(*train)
    assert f'{len(BAD)} images cannot be read' in text and 'DATA/exclude.txt' in text
    bad = folds.image_name[folds.target == 0][: len(BAD)]
    assert all(re.search(rf'{name}\.jpg: \w', text) for name in bad)
    made = {path.name for path in (home / 'cache').rglob('*.jpg')}  # the others, whole
    labelled = folds.image_name[folds.split == 'train']
    assert made == {f'{name}.jpg' for name in set(labelled) - set(bad)}
    assert not (home / 'runs').exists()

    (data / 'exclude.txt').write_text('\n'.join(bad))
    ok('folds.py', '--data', data, '--home', home, '--n_folds', 2)
    ok(*train)
    assert set(pd.concat(map(pd.read_csv, home.glob('runs/a/fold*/oof.csv'))).image_name) == (
        set(labelled) - set(bad)
    )


def test_a_test_image_that_cannot_be_read_gets_the_median_and_its_row(copy, demo, ok):
    shutil.copytree(demo / 'jpeg' / 'test', copy / 'jpeg')
    folds = pd.read_csv(copy / 'folds.csv')
    test = folds.split == 'test'
    folds.loc[test, 'path'] = [f'jpeg/{name}.jpg' for name in folds.image_name[test]]
    folds.to_csv(copy / 'folds.csv', index=False)
    bad = folds.image_name[test].iloc[3]
    (copy / 'jpeg' / f'{bad}.jpg').write_bytes(b'no picture')
    shutil.rmtree(copy / 'cache')
    text = ok('infer.py', '--home', copy, '--n_tta', 0, '--only', 'twin')
    assert f'{bad}.jpg: cannot identify' in text
    assert f'cannot be read get the median prediction, such as {bad}. Once' in text
    preds = pd.read_csv(copy / 'runs' / 'twin' / 'test.csv').set_index('image_name').pred
    assert preds[bad] == preds.drop(bad).median() and preds.nunique() > 10
    ok('blend.py', '--home', copy, '--only', 'twin')
    submission = pd.read_csv(copy / 'submission.csv')
    assert len(submission) == 12 and submission.notna().all(axis=None)
