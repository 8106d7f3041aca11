"""ISIC 2024 goes the same way through the four scripts, from its own layout to its submission."""

import shutil
import sys
import threading
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from conftest import QUICK
from PIL import Image
from test_locks import held_by_another

from lib import archives, calibration, predictions, splits, tables
from lib.cli import Stop
from lib.demo import draw
from lib.hdf5 import unpack

LEAKS = ['iddx_full', 'iddx_1', 'mel_thick_mm', 'tbp_lv_dnn_lesion_confidence', 'diagnosis']


@pytest.fixture(scope='session')
def drawn(tmp_path_factory) -> Path:
    """40 training images in a folder, 15 of them malignant, and 5 test images in an HDF5 file."""
    h5py = pytest.importorskip('h5py')
    data, rng = tmp_path_factory.mktemp('isic2024'), np.random.default_rng(0)
    rows = pd.DataFrame({'isic_id': [f'ISIC_{i:07d}' for i in range(45)]})
    rows['target'] = [int(i % 8 in (1, 2, 6)) for i in range(45)]
    rows['patient_id'] = [f'IP_{i // 3}' for i in range(45)]
    rows = rows.assign(age_approx=45.0, sex='male', anatom_site_general='posterior torso')
    rows = rows.assign(tbp_lv_A=0.5, **dict.fromkeys(LEAKS, 'LEAK'))
    images = data / 'train-image' / 'image'
    images.mkdir(parents=True)
    for name, target in zip(rows.isic_id, rows.target, strict=True):
        Image.fromarray(draw(rng, target)).save(images / f'{name}.jpg')
    rows[:40].to_csv(data / 'train-metadata.csv', index=False)
    test = rows[40:].drop(columns=['target', *LEAKS])
    test.to_csv(data / 'test-metadata.csv', index=False)
    sample = test[['isic_id']].iloc[[3, 0, 4, 2, 1]].assign(target=0.3)
    sample.to_csv(data / 'sample_submission.csv', index=False)
    with h5py.File(data / 'test-image.hdf5', 'w') as file:
        for path in sorted(images.iterdir())[40:]:
            file[path.stem] = np.bytes_(path.read_bytes())
            path.unlink()
    return data


@pytest.fixture
def data(drawn, tmp_path) -> Path:
    """`drawn` again, to be changed."""
    return shutil.copytree(drawn, tmp_path / 'data')


def pack(data: Path, names: list[str], **others: object) -> list[str]:
    """Move training images into an HDF5 file of `data`, with `others` over them: the names."""
    import h5py

    with h5py.File(data / 'some.hdf5', 'w') as file:
        for name in names:
            file[name] = np.void((data / 'train-image' / 'image' / f'{name}.jpg').read_bytes())
        for name, value in others.items():
            del file[name]
            if value is not None:
                file[name] = value
    return names


def test_the_four_scripts_end_in_a_submission_of_its_own_columns_in_the_samples_order(
    drawn, ok, tmp_path
):
    home = tmp_path / 'home'
    out = ok('folds.py', '--data', drawn, '--home', home, '--n_folds', 2)
    assert 'malignant' in out and '40 labelled images, 5 to predict' in out
    out += ok('train.py', '--home', home, *QUICK, '--epochs', 1)
    out += ok('infer.py', '--home', home, '--n_tta', 1)
    out += ok('blend.py', '--home', home)
    assert 'melanoma' not in out and 'all 40 images, 15 malignant' in out
    assert out.index('pAUC above 80 %') < out.index('AUC, pooled')
    assert 'out of fold: pAUC above 80 %' in out

    submission = pd.read_csv(home / 'submission.csv')
    sample = pd.read_csv(drawn / 'sample_submission.csv')
    assert list(submission) == ['isic_id', 'target']
    assert submission.isic_id.tolist() == sample.isic_id.tolist()
    preds = pd.read_csv(home / 'report' / 'test.csv').set_index('image_name').pred
    assert submission.target.tolist() == preds[sample.isic_id].tolist()

    page = (home / 'report' / 'index.html').read_text()
    assert '15 malignant' in page and 'melanomas' not in page
    assert page.index('pAUC above 80 %') < page.index('out-of-fold AUC')
    # and anybody's submission in these columns is a run, as ours are
    (home / 'runs' / 'theirs').mkdir()
    shutil.copy(home / 'submission.csv', home / 'runs' / 'theirs' / 'test.csv')
    ok('blend.py', '--home', home, '--only', 'theirs')
    assert pd.read_csv(home / 'submission.csv').equals(submission)


def test_no_column_that_tells_the_answer_reaches_folds_csv(drawn, ok, tmp_path):
    ok('folds.py', '--data', drawn, '--home', tmp_path, '--n_folds', 2)
    folds = pd.read_csv(tmp_path / 'folds.csv')
    assert list(folds) == tables.COLUMNS and folds.diagnosis.isna().all()
    assert 'LEAK' not in (tmp_path / 'folds.csv').read_text()
    assert set(folds.anatom_site) == {'torso'} and set(folds.sex) == {'male'}
    assert set(folds.source) == {'isic2024'} and folds.age_approx.eq(45).all()


def test_training_images_may_be_packed_too_and_a_broken_one_left_out(data, tmp_path):
    (data / 'exclude.txt').write_text('ISIC_0000000\n')
    before, _ = archives.read_all(data, [], tmp_path)
    images = data / 'train-image' / 'image'
    expected = {path.stem: path.read_bytes() for path in images.iterdir()}
    pack(data, list(expected), ISIC_0000000=b'GIF89a')
    del expected['ISIC_0000000']
    (data / 'some.hdf5').rename(data / 'train-image.hdf5')
    shutil.rmtree(images)
    table, _ = archives.read_all(data, [], tmp_path)
    rows = table[table.split == 'train']
    paths = dict(zip(rows.image_name, rows.path, strict=True))
    assert {name: Path(path).read_bytes() for name, path in paths.items()} == expected
    assert table.drop(columns='path').equals(before.drop(columns='path'))


def test_unpacking_goes_on_where_it_was_killed_and_is_not_done_twice(data, monkeypatch, capsys):
    names = pack(data, ['ISIC_0000000', 'ISIC_0000001', 'ISIC_0000002'])
    folder, images = data / 'out', data / 'train-image' / 'image'
    folder.mkdir()
    shutil.copy(images / f'{names[1]}.jpg', folder)
    kept = (folder / f'{names[1]}.jpg').stat().st_mtime_ns
    (folder / f'.{names[2]}.part.jpg').write_bytes(b'\xff\xd8\xffhalf')
    unpack(data / 'some.hdf5', names, folder)
    assert '2 images to unpack' in capsys.readouterr().out
    there = {p.name: p.read_bytes() for p in folder.glob('*.jpg')}
    assert there == {f'{name}.jpg': (images / f'{name}.jpg').read_bytes() for name in names}
    assert (folder / f'{names[1]}.jpg').stat().st_mtime_ns == kept

    monkeypatch.setitem(sys.modules, 'h5py', None)  # as where it is not installed
    unpack(data / 'some.hdf5', names, folder)
    assert not capsys.readouterr().out
    (folder / f'{names[0]}.jpg').unlink()
    with pytest.raises(Stop, match='pip install h5py'):
        unpack(data / 'some.hdf5', names, folder)


def test_a_second_process_waits_for_the_first_and_finds_all_there(data):
    names, folder = ['ISIC_0000000', 'ISIC_0000001'], data / 'out'
    with held_by_another(folder / '.lock') as first:

        def finish() -> None:
            for name in names:
                shutil.copy(data / 'train-image' / 'image' / f'{name}.jpg', folder)
            first.kill()

        threading.Timer(0.5, finish).start()
        unpack(data / 'train-metadata.csv', names, folder)  # it would end here, opened as HDF5


@pytest.mark.parametrize(
    ('value', 'says'),
    [(b'GIF89a', 'ISIC_0000001 in .* is no JPEG'), (None, 'ISIC_0000001 cannot be read')],
)
def test_an_image_that_is_missing_or_no_jpeg_is_named(data, value, says):
    names = pack(data, ['ISIC_0000000', 'ISIC_0000001'], ISIC_0000001=value)
    with pytest.raises(Stop, match=says):
        unpack(data / 'some.hdf5', names, data / 'out')
    assert not (data / 'out' / 'ISIC_0000001.jpg').exists()


def test_a_truncated_file_is_refused_with_a_sentence(data, refusal):
    path = data / 'test-image.hdf5'
    path.write_bytes(path.read_bytes()[:-1000])
    command = ['folds.py', '--data', data, '--home', data / 'home', '--n_folds', 2]
    assert 'test-image.hdf5 cannot be read as HDF5' in refusal(*command)


def test_a_name_cannot_lead_out_of_the_folder(data, refusal):
    import h5py

    for name in ('test-metadata.csv', 'sample_submission.csv'):
        text = (data / name).read_text()
        (data / name).write_text(text.replace('ISIC_0000042', '../ISIC_0000042'))
    with h5py.File(data / 'test-image.hdf5', 'r+') as file:
        file['../ISIC_0000042'] = file['ISIC_0000042'][()]
    command = ['folds.py', '--data', data, '--home', data / 'home', '--n_folds', 2]
    assert "'../ISIC_0000042' is no image_name" in refusal(*command)
    assert not list(data.rglob('*0000042.jpg'))


def test_two_competitions_in_one_folder_are_refused(data, refusal):
    (data / 'train.csv').write_text('image_name,target\nISIC_1,0\n')
    said = refusal('folds.py', '--data', data, '--home', data / 'home')
    assert 'holds several sets' in said and 'train-metadata.csv' in said and '/train.csv' in said


def test_older_sets_beside_it_count_the_cancers_that_it_counts(data, ok):
    older = data / 'external' / 'isic2020'
    rows = pd.DataFrame({'image_name': ['ISIC_2', 'ISIC_3', 'ISIC_4'], 'target': [1, 0, 0]})
    rows = rows.assign(patient_id='IP_A', sex='male', age_approx=30, benign_malignant='')
    rows['diagnosis'] = ['melanoma', 'nevus', 'basal cell carcinoma']
    rows['anatom_site_general_challenge'] = 'torso'
    (older / 'jpeg').mkdir(parents=True)
    rows.to_csv(older / 'train.csv', index=False)
    images = data / 'train-image' / 'image'
    for k, name in enumerate(rows.image_name):
        path = older / 'jpeg' / 'train' / f'{name}.jpg'
        path.parent.mkdir(exist_ok=True)
        shutil.copy(images / f'ISIC_{k:07d}.jpg', path)
    pairs = 'image_name_1,image_name_2\nISIC_2,ISIC_5\n'
    (older / 'ISIC_2020_Training_Duplicates.csv').write_text(pairs)

    out = ok('folds.py', '--data', data, '--home', data / 'home', '--n_folds', 2)
    assert '1 known pairs of duplicates' in out
    table = tables.read_labelled(data / 'home' / 'folds.csv').set_index('image_name')
    assert table.target[rows.image_name].tolist() == [1, 0, 1]
    assert table.source.value_counts().to_dict() == {'isic2024': 40, 'isic2020': 3}
    # only its own images say how rare a malignant one is
    own, _ = calibration.evaluation_rows(pd.concat([table] * 3))
    assert own.sum() == 120


def test_folds_and_submissions_of_others_may_say_isic_id(tmp_path, capsys):
    path = tmp_path / 'theirs.csv'
    path.write_text('isic_id,patient_id,fold\nA,P,0\nB,P,0\nC,Q,1\nD,P,-1\n')  # D has no fold
    splits.report_leaks(path, tables.read_csv(path, ['fold']), 'fold', None)
    assert '0 of 2 groups (by patient_id)' in capsys.readouterr().out
    path.write_text('isic_id,target\nB,.5\nA,.25\n')
    assert predictions.read_test(path).to_dict() == {'B': 0.5, 'A': 0.25}


def test_the_sample_of_the_real_test_layout_is_read(data, shared, ok):
    pytest.importorskip('h5py')
    real = shared / 'data' / 'isic2024_sample'
    if not real.is_dir():
        pytest.skip(f'no {real}')
    for path in real.iterdir():
        shutil.copyfile(path, data / path.name)
    names = pd.read_csv(real / 'test-metadata.csv').isic_id[::-1]
    names.to_frame().assign(target=0.3).to_csv(data / 'sample_submission.csv', index=False)
    out = ok('folds.py', '--data', data, '--home', data / 'home', '--n_folds', 2)
    assert '3 images to unpack' in out and '3 to predict' in out
    folds = tables.read_folds(data / 'home' / 'folds.csv')
    test = folds[folds.split == 'test']
    assert test.image_name.tolist() == names.tolist()
    assert test.width.gt(50).all() and test[['age_approx', 'patient_id']].notna().all(axis=None)
