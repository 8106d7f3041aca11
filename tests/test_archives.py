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

from lib import archives, splits, tables
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
    assert 'ham10000' not in archives.choose_external(None, data / 'external')
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
    says = '1 of 2 train images of isic2019 are not below .*isic2019: ISIC_5$'
    with pytest.raises(Stop, match=says):
        archives.read_all(data, ['isic2019'])


def test_the_external_sets_are_chosen_by_flag_and_what_is_dropped_is_printed(data, ok, script):
    command = ['folds.py', '--data', data, '--home', data / 'home', '--n_folds', 2]
    out = ok(*command)  # all that are there
    assert 'isic2019: 1 images dropped' in out and 'ham10000: 2 images dropped' in out
    assert 'isic2019' not in script(*command, '--external', 'none').stdout
    (data / 'external' / 'ham10000').rename(data / 'external' / 'other')
    for external in ('isic2016', 'isic2017,ham10000'):
        done = script(*command, '--external', external)
        assert done.returncode == 1
        assert 'external, which holds isic2017, isic2019, other' in done.stderr
    assert ok(*command, '--external', 'other,isic2019').count('   ham10000 ') == 2


@pytest.mark.parametrize('make', [Path.touch, os.mkfifo])  # to open a pipe would wait for ever
def test_an_image_without_a_header_leaves_its_size_empty_and_a_pipe_does_not_hang(data, make):
    path = data / 'jpeg' / 'train' / 'ISIC_1.jpg'
    path.unlink()
    make(path)
    table, _ = archives.read_all(data, [])
    assert np.isnan(table.width[0]) and table.width[1] == 40


def test_names_with_a_suffix_or_decomposed_letters_are_the_same_names(data, monkeypatch):
    """As in a table from Excel, and as a Mac writes file names."""
    monkeypatch.setattr(archives, 'ISIC_ID', r'IS.C_\d+')
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
    for name in ('other.png', 'other.jpg'):  # of no row
        image(data / 'jpeg' / 'train' / name)
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
    assert (
        'external: not read: isic-2019; no table there is of a known layout'
        in capsys.readouterr().out
    )


def test_a_pair_of_duplicates_without_a_name_is_counted_and_left_out(data, capsys):
    head = 'image_name_1,image_name_2'
    csv(data / 'ISIC_2020_Training_Duplicates.csv', f'{head}\nISIC_1.jpg,ISIC_2\nISIC_3,\n')
    assert archives.read_duplicates(data).values.tolist() == [['ISIC_1', 'ISIC_2']]
    assert '1 known pairs of duplicates lack a name' in capsys.readouterr().out


# One's own table, and the archives as they come


@pytest.fixture
def own(tmp_path) -> Path:
    """Six images of three colours of one's own in two folders, and a table of two columns."""
    for i in range(6):
        image(tmp_path / 'photos' / f'{i // 3}' / f'L{i}.png')
    csv(
        tmp_path / 'train.csv', 'image_name,target\n' + ''.join(f'L{i},{i % 2}\n' for i in range(6))
    )
    return tmp_path


def test_a_name_and_a_label_are_enough(own, ok):
    said = ok('folds.py', '--data', own, '--home', own, '--n_folds', 2)
    assert '6 of 6 images have no patient or lesion: those of one patient are not' in said
    assert 'no test images' in said and '6 labelled images, 0 to predict' in said
    table = tables.read_labelled(own / 'folds.csv')
    assert table.source.unique().tolist() == ['own'] and table.target.tolist() == [0, 1] * 3
    assert all(Path(path).is_file() for path in table.path)
    for made in ('cache/64/own/L1.jpg', 'runs/a/fold0/L2.png', 'report/L3.png'):
        image(own / made)  # HOME in DATA: what was made is no image of the data
    ok('folds.py', '--data', own, '--home', own, '--n_folds', 2)


def test_a_clinics_table_is_read_by_the_words_of_the_field(own, capsys):
    (own / 'photos' / '0' / 'L0.png').rename(own / 'photos' / 'L0.PNG')
    rows = ['Image,Dx,Gender,Age,Location,Fitzpatrick,Patient']
    words = ['melanoma', 'Nevus', 'nevus', 'Melanoma in situ', '', 'BCC']
    rows += [f'photos/L{i}.jpg,{w},F,85+,back,3.0,P{i}' for i, w in enumerate(words)]
    csv(own / 'train.csv', '\n'.join(rows).replace('photos/L', 'L').replace('L0', 'photos/L0'))
    labels = tables.Labels('Dx', ['melanoma', 'melanoma in situ'])
    with pytest.raises(Stop, match='--negative needs --positive'):
        archives.read_all(own, [], labels=tables.Labels('Dx', (), ['bcc']))
    with pytest.raises(Stop, match='is the target of bcc 0'):
        archives.read_all(own, [], labels=labels)
    labels = labels._replace(negative=['nevus', 'bcc', 'mole'])
    capsys.readouterr()
    table, _ = archives.read_all(own, [], labels=labels)
    said = capsys.readouterr().out
    for line in ('2 images of target 0: nevus', '1 images of target 1: melanoma in situ'):
        assert line in said
    assert '1 images have no target and are left out' in said and 'no diagnosis is mole' in said
    assert table.image_name.tolist() == ['L0', 'L1', 'L2', 'L3', 'L5']
    assert table.target.tolist() == [1, 0, 0, 1, 0]
    assert table.path[0] == (own / 'photos' / 'L0.PNG').as_posix()
    one = table.iloc[0]
    assert (one.sex, one.age_approx, one.anatom_site, one.skin_tone) == ('female', 85, 'torso', '3')
    assert one.patient_id == 'P0' and one.diagnosis == 'melanoma'
    left_out = archives.read_all(own, [], labels=labels._replace(negative=['nevus']))[0]
    assert left_out.image_name.tolist() == ['L0', 'L1', 'L2', 'L3']


def test_names_that_are_paths_may_end_alike_and_exclude_txt_may_have_them(own):
    for name in ('1/L0', '1/L1', '0/L3', 'of_test/L0'):
        image(own / 'photos' / f'{name}.png')
    csv(own / 'train.csv', 'image_name,target\nphotos/1/L0.png,1\nphotos/1/L1,0\nphotos/0/L3,1\n')
    csv(own / 'test.csv', 'image_name\nphotos/of_test/L0\n')
    (own / 'exclude.txt').write_text('photos/1/L1.png\n')
    table, _ = archives.read_all(own, [])
    assert table.image_name.tolist() == ['L0', 'L3', 'photos_of_test_L0']
    assert [path.split('photos/')[1] for path in table.path] == [
        '1/L0.png', '0/L3.png', 'of_test/L0.png',
    ]  # fmt: skip


@pytest.mark.parametrize(
    ('text', 'says'),
    [
        ('image_name,kind\nL0,1\n', 'lacks the column target; --target names the column'),
        ('image_name,target\nL0,yes\n', "the target of L0 is 'yes'; expected 0 or 1, or --pos"),
        (
            'image_name,target,age,age_approx\nL0,1,50,51\n',
            'two columns that mean age_approx and differ',
        ),
        ('target\n1\n', 'lacks the column image_name'),
        ('image_name,target\nL1,0\n1/L0,1\n', 'not below .*: 1/L0'),
        ('image_name,target,fold\nL0,1,0\nL1,0,\n', 'the fold of L1 is nan; expected 0, 1'),
    ],
)
def test_an_own_table_that_is_not_clear_is_refused(text, says, own, refusal):
    csv(own / 'train.csv', text)
    said = refusal('folds.py', '--data', own, '--home', own, '--n_folds', 2)
    assert re.search(says, said), said


def test_a_column_fold_is_used_as_it_is_after_the_leak_check(own, ok, refusal):
    rows = pd.read_csv(own / 'train.csv').assign(fold=[2, 2, 0, 0, 1, 1], patient_id=[*'aabbcc'])
    rows.to_csv(own / 'train.csv', index=False)
    ok('folds.py', '--data', own, '--home', own)
    assert pd.read_csv(own / 'folds.csv').fold.tolist() == [2, 2, 0, 0, 1, 1]
    said = refusal('folds.py', '--data', own, '--home', own, '--n_folds', 3)
    assert 'has a column fold; drop it, or leave --n_folds' in said
    rows.assign(patient_id='a').to_csv(own / 'train.csv', index=False)
    assert 'a is in folds 0, 1, 2' in refusal('folds.py', '--data', own, '--home', own)


def test_the_isic_archive_is_read_by_its_own_rule_of_melanoma(own, capsys, ok):
    folder = own / 'external' / 'hospital'
    melanoma = 'Malignant melanocytic proliferations (Melanoma)'
    lines = [
        'isic_id,attribution,copyright_license,diagnosis_1,diagnosis_2,diagnosis_3,image_type,'
        'anatom_site_1,patient_id',
        f'ISIC_1,A,CC-0,Malignant,{melanoma},Melanoma Invasive,dermoscopic,Head and neck,IP_1',
        'ISIC_2,A,CC-BY,Malignant,Collision - At least one malignant proliferation,,dermoscopic,,',
        'ISIC_3,A,CC-BY,Malignant,Malignant epidermal proliferations,,dermoscopic,,',
        'ISIC_4,A,CC-BY,Benign,,Nevus,dermoscopic,,',
        'ISIC_5,A,CC-BY,Indeterminate,,,dermoscopic,,',
        f'ISIC_6,A,CC-BY,Malignant,{melanoma},,clinical: close-up,,',
        'ISIC_7,A,CC-BY,Malignant,,,dermoscopic,,',  # of which cancer it does not tell
    ]
    csv(folder / 'metadata.csv', '\n'.join(lines))
    for i in range(1, 8):
        image(folder / 'images' / f'ISIC_{i}.jpg')
    assert archives.choose_external(None, own / 'external') == ['hospital']
    table = archives.read_all(own, ['hospital'])[0].query("source == 'hospital'")
    assert table.image_name.tolist() == ['ISIC_1', 'ISIC_2', 'ISIC_3', 'ISIC_4']
    assert table.target.tolist() == [1, 1, 0, 0]
    assert table.diagnosis.iloc[[0, 3]].tolist() == ['melanoma invasive', 'nevus']
    assert table.anatom_site.iloc[0] == 'head/neck' and table.patient_id.iloc[0] == 'IP_1'
    said = capsys.readouterr().out
    assert '1 rows whose diagnosis_1 is not Benign or Malignant are left out' in said
    assert '1 rows whose image_type is not dermoscopic are left out' in said
    assert '1 images have no target and are left out' in said
    ok('folds.py', '--data', own, '--home', own, '--n_folds', 2)
    credits = pd.read_csv(own / 'attribution.csv').sort_values('licence')
    columns = ['source', 'licence', 'attribution', 'images']
    assert credits[columns].values.tolist() == [
        ['hospital', 'CC-0', 'A', 1], ['hospital', 'CC-BY', 'A', 3],
    ]  # fmt: skip
    # in other words for diagnosis_1 no row would be left, so none is left out by it
    csv(folder / 'metadata.csv', '\n'.join(lines).replace('Benign', 'benign').replace(
        ',Malignant,', ',malignant,'))  # fmt: skip
    table = archives.read_all(own, ['hospital'])[0].query("source == 'hospital'")
    assert table.image_name.tolist() == ['ISIC_1', 'ISIC_2', 'ISIC_3', 'ISIC_4']
    assert 'no diagnosis_1 is Benign or Malignant, so all rows are taken' in capsys.readouterr().out


def test_the_challenge_pages_and_kaggles_copies_are_told_by_their_tables(data, tmp_path):
    """ISIC 2018 by its own tables, HAM10000 a folder deeper, a resized copy with a train.csv."""
    plain = archives.read_all(data, ['ham10000'])[0]
    folder = data / 'external' / 'ham10000'
    deeper = folder / 'HAM10000_images_part_1' / 'HAM10000_images_part_1'
    deeper.mkdir()
    (folder / 'HAM10000_images_part_1' / 'ISIC_5.jpg').rename(deeper / 'ISIC_5.jpg')
    moved = folder.rename(data / 'external' / 'dataverse')
    again = archives.read_all(data, ['dataverse'])[0]
    pd.testing.assert_frame_equal(again.drop(columns='path'), plain.drop(columns='path'))
    (moved / 'HAM10000_metadata.csv').unlink()
    csv(moved / 'ISIC2018_Task3_Training_GroundTruth.csv',
        'image,MEL,NV,BCC,AKIEC,BKL,DF,VASC\nISIC_5,0,0,1,0,0,0,0\nISIC_4,1,0,0,0,0,0,0\n'
        'ISIC_7,0,0,1,0,0,0,0\n')  # fmt: skip
    lesions = 'image,lesion_id\nISIC_5,HAM_1\nISIC_4,HAM_4\nISIC_7,HAM_1\n'
    csv(moved / 'ISIC2018_Task3_Training_LesionGroupings.csv', lesions)
    columns = ['image_name', 'source', 'target', 'diagnosis', 'lesion_id']
    again = archives.read_all(data, ['dataverse'])[0]
    pd.testing.assert_frame_equal(again[columns], plain[columns])
    train = pd.read_csv(data / 'train.csv').assign(image_name=['ISIC_12', 'ISIC_11', 'ISIC_13'])
    copy = data / 'external' / 'jpeg-isic2019-512x512'
    for name in train.image_name:
        image(copy / 'train' / f'{name}.jpg')
    train.assign(patient_id=-1, tfrecord=0).to_csv(copy / 'train.csv', index=False)
    rows = archives.read_all(data, [copy.name])[0].query(f"source == '{copy.name}'")
    assert len(rows) == 3 and rows.patient_id.isna().all()
    csv(copy / 'ISIC_2019_Training_GroundTruth.csv', 'image,MEL,NV\nISIC_12,1,0\n')
    with pytest.raises(Stop, match='holds several sets'):
        archives.read_all(data, [copy.name])


def test_where_runs_exist_the_folds_are_kept_whatever_scikit_learn_would_do(
    own, ok, refusal, monkeypatch
):
    this = ['folds.py', '--data', own, '--home', own]
    ok(*this, '--n_folds', 2)
    before = (own / 'folds.csv').read_bytes()
    csv(own / 'runs' / 'a' / 'config.json', '{}')
    monkeypatch.setattr(splits, 'assign_folds', lambda rows, n, seed: [0, 0, 0, 1, 1, 1])
    assert 'are kept, since runs were trained on them' in ok(*this)
    assert (own / 'folds.csv').read_bytes() == before
    said = refusal(*this, '--n_folds', 2)
    assert 'another --home' in said and 'if --n_folds and --seed are left out' in said
    csv(own / 'train.csv', (own / 'train.csv').read_text().replace('L5,1\n', ''))
    assert 'would change' in refusal(*this)
    assert (own / 'folds.csv').read_bytes() == before


def test_nothing_of_another_set_below_data_is_taken_for_its_own(own, ok, refusal):
    """The demo, which lies in data/demo; another set's test.csv; a second table of labels."""
    csv(own / 'demo' / 'SYNTHETIC.txt', 'no data')
    csv(own / 'demo' / 'train.csv', 'image_name,target\nL0,1\n')
    csv(own / 'demo' / 'test.csv', 'image_name\nT0\n')
    image(own / 'demo' / 'L0.png')
    this = ['folds.py', '--data', own, '--home', own, '--n_folds', 2]
    assert 'no test images' in ok(*this)
    for clinic in ('a', 'b'):
        csv(own / clinic / 'train.csv', 'image_name,target\nL0,1\n')
        csv(own / clinic / 'test.csv', 'image_name\nL1\n')
    assert 'no test images' in ok(*this)  # the table nearest the top is meant
    (own / 'train.csv').unlink()
    said = refusal(*this)
    assert 'holds several sets' in said and 'a/train.csv and ' in said and 'b/train.csv' in said


def test_images_of_two_sets_are_one_by_an_isic_id_alone(own, refusal, ok):
    other = own / 'external' / 'clinic'
    csv(other / 'train.csv', 'image_name,target\nL0,1\nL9,0\n')
    for name in ('L0', 'L9'):
        image(other / f'{name}.png')
    this = ['folds.py', '--data', own, '--home', own, '--n_folds', 2]
    assert 'two sets have an image named L0' in refusal(*this)
    csv(other / 'train.csv', 'image_name,target\np/1,1\nq/1,0\n')
    for name in ('p', 'q'):
        image(other / name / '1.png')
    ok(*this)
    table = pd.read_csv(own / 'folds.csv').set_index('image_name')
    assert table.path['p_1'].endswith('clinic/p/1.png') and table.path['q_1'].endswith('q/1.png')


def test_a_set_beside_it_changes_no_target_of_ones_own(own, data, ok):
    """As ISIC 2024 would, which counts other cancers, and a folder named as a competition."""
    rows = 'image_name,target,diagnosis\n' + ''.join(
        f'L{i},{i % 2},basal cell carcinoma\n' for i in range(6)
    )
    csv(own / 'train.csv', rows)
    beside = own / 'external' / 'competition'
    head = 'isic_id,patient_id,sex,age_approx,anatom_site_general,target'
    csv(beside / 'train-metadata.csv', f'{head}\nISIC_90,IP_1,male,50,torso,1\n')
    image(beside / 'ISIC_90.jpg')
    table, _ = archives.read_all(own, ['competition'])
    assert table.target.tolist()[:6] == [0, 1] * 3
    assert set(table.source) == {'own', 'isic2024_beside'}
    assert tables.competition_of(table).source == 'own'


def test_a_word_for_nothing_may_be_a_label(own):
    csv(own / 'train.csv', 'image_name,finding\nL0,None\nL1,melanoma\nL2,None\nL3,\n')
    labels = tables.Labels('finding', ['melanoma'], ['none'])
    assert archives.read_all(own, [], labels=labels)[0].target.tolist() == [0, 1, 0]
