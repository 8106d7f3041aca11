"""The layouts of several archives give one table in which an ISIC id counts once."""

import os
import re
import shutil
import unicodedata
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from lib import archives
from lib.cli import Stop


def image(path: Path, size=(40, 30)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new('RGB', size, (200, 150, 120)).save(path)


def csv(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


@pytest.fixture
def data(tmp_path) -> Path:
    """A competition of two patients and three sets beside it that contain each other."""
    head = 'image_name,patient_id,sex,age_approx,anatom_site_general_challenge'
    csv(
        tmp_path / 'train.csv',
        f'{head},diagnosis,benign_malignant,target\n'
        'ISIC_2,IP_1,male,45.0,torso,unknown,benign,0\n'
        'ISIC_1,IP_1,male,45.0,torso,melanoma,malignant,1\n'
        'ISIC_3,IP_2,,,,nevus,benign,0\n',
    )
    csv(tmp_path / 'test.csv', f'{head}\nISIC_8,IP_8,female,30.0,torso\nISIC_9,,,,\n')
    csv(tmp_path / 'sample_submission.csv', 'image_name,target\nISIC_9,0\nISIC_8,0\n')
    for split, names in (('train', '123'), ('test', '89')):
        for name in names:
            image(tmp_path / 'jpeg' / split / f'ISIC_{name}.jpg')
    folder = tmp_path / 'external' / 'isic2019'
    csv(
        folder / 'ISIC_2019_Training_GroundTruth.csv',
        'image,MEL,NV,BCC,AK,BKL,DF,VASC,SCC,UNK\nISIC_3,1,0,0,0,0,0,0,0,0\n'
        'ISIC_4_downsampled,1,0,0,0,0,0,0,0,0\nISIC_5,0,0,0,0,0,0,0,1,0\n',
    )
    csv(
        folder / 'ISIC_2019_Training_Metadata.csv',
        'image,age_approx,anatom_site_general,lesion_id,sex\nISIC_3,5,,,male\n'
        'ISIC_4_downsampled,50,anterior torso,,female\nISIC_5,60,head/neck,HAM_1,male\n',
    )
    for name in ('ISIC_3', 'ISIC_4_downsampled', 'ISIC_5'):
        image(folder / 'ISIC_2019_Training_Input' / f'{name}.jpg')
    folder = tmp_path / 'external' / 'isic2017'
    csv(
        folder / 'ISIC-2017_Training_Part3_GroundTruth.csv',
        'image_id,melanoma,seborrheic_keratosis\nISIC_4,1.0,0.0\nISIC_6,0.0,1.0\n',
    )
    images = folder / 'ISIC-2017_Training_Data'
    csv(
        images / 'ISIC-2017_Training_Data_metadata.csv',
        'image_id,age_approximate,sex\nISIC_4,unknown,female\nISIC_6,40,unknown\n',
    )
    for name in ('ISIC_4', 'ISIC_6', 'ISIC_6_superpixels'):
        image(images / f'{name}.jpg')
    folder = tmp_path / 'external' / 'ham10000'
    csv(
        folder / 'HAM10000_metadata.csv',
        'lesion_id,image_id,dx,dx_type,age,sex,localization\nHAM_1,ISIC_5,bcc,h,60,male,face\n'
        'HAM_4,ISIC_4,mel,h,50,female,trunk\nHAM_1,ISIC_7,bcc,h,60,male,face\n',
    )
    image(folder / 'HAM10000_images_part_1' / 'ISIC_5.jpg')
    image(folder / 'HAM10000_images_part_2' / 'ISIC_4.jpg')
    image(folder / 'HAM10000_images_part_2' / 'ISIC_7.jpg')
    return tmp_path


def test_an_image_of_overlapping_sets_counts_once_for_the_first(data):
    table, dropped = archives.read_all(data, ['isic2019', 'isic2017', 'ham10000'])
    rows = table[table.split == 'train']
    names = ['ISIC_1', 'ISIC_2', 'ISIC_3', 'ISIC_4_downsampled', 'ISIC_5', 'ISIC_6', 'ISIC_7']
    sources = ['competition'] * 3 + ['isic2019'] * 2 + ['isic2017', 'ham10000']
    assert (rows.image_name.tolist(), rows.source.tolist()) == (names, sources)
    assert dropped == {'isic2019': 1, 'isic2017': 1, 'ham10000': 2}
    assert rows.target.tolist() == [1, 0, 0, 1, 0, 0, 0]  # the competition's own of ISIC_3
    rows = archives.read_all(data, ['ham10000', 'isic2019'])[0].set_index('image_name')
    assert rows.source['ISIC_4'] == 'ham10000' and 'ISIC_4_downsampled' not in rows.index
    assert rows.target[['ISIC_4', 'ISIC_5']].tolist() == [1, 0]


def test_a_lesion_known_only_to_a_dropped_copy_is_kept(data):
    table, _ = archives.read_all(data, ['isic2019', 'ham10000'])
    assert table.set_index('image_name').lesion_id['ISIC_4_downsampled'] == 'HAM_4'


def test_values_of_all_layouts_speak_one_language(data):
    def rows() -> pd.DataFrame:
        table, _ = archives.read_all(data, ['isic2019', 'isic2017', 'ham10000'])
        return table.set_index('image_name')

    table = rows()
    assert table.diagnosis[['ISIC_4_downsampled', 'ISIC_5', 'ISIC_6', 'ISIC_7']].tolist() == [
        'melanoma',
        'squamous cell carcinoma',
        'seborrheic keratosis',
        'basal cell carcinoma',
    ]
    sites = table.anatom_site[['ISIC_4_downsampled', 'ISIC_5', 'ISIC_7']]
    assert sites.tolist() == ['torso', 'head/neck', 'head/neck']
    assert table.sex[['ISIC_6', 'ISIC_3']].isna().all() and table.sex['ISIC_7'] == 'male'
    assert table.age_approx[['ISIC_6', 'ISIC_7']].tolist() == [40, 60]
    assert (table.width == 40).all() and (table.height == 30).all()
    path = data / 'external' / 'isic2017' / 'ISIC-2017_Training_Part3_GroundTruth.csv'
    path.write_text(path.read_text().replace('ISIC_6,0.0,1.0', 'ISIC_6,0.0,0.0'))
    images = path.with_name('ISIC-2017_Training_Data')  # the archive has a table in it
    shutil.move(images / 'ISIC-2017_Training_Data_metadata.csv', path.parent)
    table = rows()
    assert (table.diagnosis['ISIC_6'], table.age_approx['ISIC_6']) == ('nevus', 40)


def test_a_competition_without_test_images_is_read(data, ok):
    for name in ('test.csv', 'sample_submission.csv'):
        header = (data / name).read_text().splitlines()[0]
        (data / name).write_text(header + '\n')
    shutil.rmtree(data / 'jpeg' / 'test')
    out = ok('folds.py', '--data', data, '--home', data / 'home', '--n_folds', 2)
    assert '7 labelled images, 0 to predict' in out
    folds = pd.read_csv(data / 'home' / 'folds.csv')
    assert folds.split.tolist() == ['train'] * 7 and folds.fold.isin([0, 1]).all()


def test_the_resized_copies_layout_is_read_too(data):
    (data / 'jpeg' / 'train').rename(data / 'train')
    (data / 'jpeg' / 'test').rename(data / 'test')
    (data / 'jpeg').rmdir()
    train = pd.read_csv(data / 'train.csv').assign(width=6000, height=4000)
    train.to_csv(data / 'train.csv', index=False)
    table, _ = archives.read_all(data, [])
    assert all(Path(p).is_file() for p in table.path)
    assert table.width.tolist() == [6000, 6000, 6000, 40, 40]  # native size, where a table says


def test_a_broken_external_table_names_its_set(data):
    path = data / 'external' / 'isic2019' / 'ISIC_2019_Training_GroundTruth.csv'
    path.write_text(path.read_text().replace('ISIC_5,0', 'ISIC_5,x'))
    with pytest.raises(Stop, match='a table of isic2019'):
        archives.read_all(data, ['isic2019'])
    images = data / 'external' / 'isic2017' / 'ISIC-2017_Training_Data'
    metadata = images / 'ISIC-2017_Training_Data_metadata.csv'
    metadata.write_text(metadata.read_text() + 'ISIC_6,50,male\n')
    with pytest.raises(Stop, match='ISIC_6 stands twice in isic2017'):
        archives.read_all(data, ['isic2017'])


def test_ham10000_as_a_tab_file_is_named_with_what_to_do(data):
    path = data / 'external' / 'ham10000' / 'HAM10000_metadata.csv'
    table = pd.read_csv(path, dtype=str)
    path.unlink()
    with pytest.raises(Stop, match=r'HAM10000_metadata\.csv is missing'):
        archives.read_all(data, ['ham10000'])
    table.to_csv(path.with_suffix('.tab'), sep='\t', index=False)
    with pytest.raises(Stop, match=r'\.tab is separated by tabs; save it as CSV'):
        archives.read_all(data, ['ham10000'])
    table.to_csv(path.with_suffix(''), index=False)
    part = path.with_name('HAM10000_images_part_2')
    part.rename(part.with_name('ISIC2018_Task3_Training_Input'))
    assert (archives.read_all(data, ['ham10000'])[0].source == 'ham10000').sum() == 3


def test_what_exclude_txt_names_is_left_out_before_its_image_is_looked_at(data, capsys):
    (data / 'jpeg' / 'train' / 'ISIC_2.jpg').unlink()
    (data / 'exclude.txt').write_text('ISIC_2.JPG\n\n ISIC_4_downsampled \n')
    table, dropped = archives.read_all(data, ['isic2019', 'isic2017'])
    names = ['ISIC_1', 'ISIC_3', 'ISIC_5', 'ISIC_6', 'ISIC_9', 'ISIC_8']
    assert table.image_name.tolist() == names  # ISIC_4 by neither of its names
    assert dropped == {'isic2019': 1} and table.path.notna().all()
    assert capsys.readouterr().out == f'{data}/exclude.txt: 2 of 2 names are left out\n'
    (data / 'exclude.txt').write_text('ISIC_2\nISIC_7.png\nIMG.5\n')
    archives.read_all(data, ['isic2019'])
    assert '1 of 3 names are left out; 2 match no labelled image' in capsys.readouterr().out
    (data / 'exclude.txt').write_text('ISIC_2\nISIC_8\n')
    with pytest.raises(Stop, match=r'exclude\.txt: the test image ISIC_8 must stay'):
        archives.read_all(data, [])


def test_an_image_that_is_not_there_is_named_with_its_set(data):
    (data / 'external' / 'isic2019' / 'ISIC_2019_Training_Input' / 'ISIC_5.jpg').unlink()
    says = '1 of 2 train images of isic2019 are not in .*ISIC_2019_Training_Input: ISIC_5$'
    with pytest.raises(Stop, match=says):
        archives.read_all(data, ['isic2019'])


def test_the_external_sets_are_chosen_by_flag_and_what_is_dropped_is_printed(data, ok, script):
    command = ['folds.py', '--data', data, '--home', data / 'home', '--n_folds', 2]
    out = ok(*command)  # all that are there
    assert 'isic2019: 1 images dropped' in out and 'ham10000: 2 images dropped' in out
    assert 'isic2019' not in script(*command, '--external', 'none').stdout
    for external, says in (('isic2016', 'knows isic2019'), ('isic2017,isic2018', 'as ham10000')):
        done = script(*command, '--external', external)
        assert done.returncode == 1 and says in done.stderr
    (data / 'external' / 'ham10000').rename(data / 'external' / 'other')
    done = script(*command, '--external', 'ham10000')
    assert done.returncode == 1 and 'there is no' in done.stderr


@pytest.mark.parametrize('make', [Path.touch, os.mkfifo])  # to open a pipe would wait for ever
def test_an_image_without_a_header_leaves_its_size_empty_and_a_pipe_does_not_hang(data, make):
    path = data / 'jpeg' / 'train' / 'ISIC_1.jpg'
    path.unlink()
    make(path)
    table, _ = archives.read_all(data, [])
    assert np.isnan(table.width[0]) and table.width[1] == 40


def test_names_with_a_suffix_or_decomposed_letters_are_the_same_names(data):
    """As in a table from Excel, and as a Mac writes file names."""
    plain = archives.read_all(data, ['isic2019', 'ham10000'])[0].drop(columns='path')
    for path in data.rglob('*.csv'):
        text = path.read_text()
        path.write_text(re.sub(r'(ISIC_\d(_downsampled)?)', r'\1.JPG', text).replace('IC', 'ÏC'))
    for path in data.rglob('*.jpg'):
        name = path.name.replace('IC', 'ÏC')
        path.rename(path.with_name(unicodedata.normalize('NFD', name)))
    table, _ = archives.read_all(data, ['isic2019', 'ham10000'])
    assert all(Path(path).is_file() for path in table.path)
    table['image_name'] = table.image_name.str.replace('ÏC', 'IC')
    pd.testing.assert_frame_equal(table.drop(columns='path'), plain)


def test_two_files_of_one_name_are_refused_by_both_paths(data):
    """As a mask beside its image; which of them comes first in the folder must not decide."""
    image(data / 'jpeg' / 'train' / 'other.png')
    archives.read_all(data, [])
    for other in (data / 'jpeg' / 'train' / 'ISIC_2.png', data / 'train' / 'ISIC_2.jpg'):
        image(other)
        with pytest.raises(Stop, match='1 images of competition are several files') as e:
            archives.read_all(data, [])
        assert str(other) in str(e.value) and 'jpeg/train/ISIC_2.jpg' in str(e.value)
        other.unlink()


def test_a_folder_under_external_that_is_not_read_is_named(data, capsys):
    (data / 'external' / 'isic-2019').mkdir()
    (data / 'external' / '.cache').mkdir()
    found = archives.choose_external(None, data / 'external')
    assert found == ['isic2019', 'isic2017', 'ham10000']
    assert 'external: not read: isic-2019; known are isic2019, ' in capsys.readouterr().out


def test_a_pair_of_duplicates_without_a_name_is_counted_and_left_out(data, capsys):
    head = 'image_name_1,image_name_2'
    csv(data / 'ISIC_2020_Training_Duplicates.csv', f'{head}\nISIC_1.jpg,ISIC_2\nISIC_3,\n')
    assert archives.read_duplicates(data).values.tolist() == [['ISIC_1', 'ISIC_2']]
    assert '1 known pairs of duplicates lack a name' in capsys.readouterr().out
