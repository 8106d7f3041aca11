"""folds.csv and any other table: read as it is meant, or refused with a sentence."""

import numpy as np
import pandas as pd
import pytest

from lib import tables
from lib.cli import Stop


def by_hand(**columns) -> pd.DataFrame:
    """A table of four labelled images in two folds, a melanoma in each, and a test image."""
    names = ['I1', 'I2', 'I3', 'I4', 'I9']
    table = pd.DataFrame({'image_name': names, 'path': [f'{name}.jpg' for name in names]})
    table['split'] = ['train'] * 4 + ['test']
    table = table.assign(source='s', group=['p', 'q', 'r', 's', 'p'], target=[0, 1, 0, 1, ''])
    table = table.assign(fold=[0, 0, 1, 1, 7], width=40, age_approx=50)  # a test row has no fold
    return table.reindex(columns=tables.COLUMNS).assign(**columns).astype(object)


def test_a_column_with_a_control_character_is_named_in_escapes(tmp_path):
    (tmp_path / 'a.csv').write_text('é,b\x1b[31m\n1,2\n')
    with pytest.raises(Stop, match=r"lacks the column c; it has é, 'b\\x1b\[31m'$"):
        tables.read_csv(tmp_path / 'a.csv', ['c'])


@pytest.mark.parametrize(
    ('text', 'says'),
    [
        ('a,b\n1,2,3\n4,5,6\n', 'Length of header'),  # pandas would make the first an index
        ('a,b\n1,2\n4,5,6\n', 'Expected 2 fields'),
        ('a,b\n"1,2\n', 'inside string'),
        ('"a";"b"\n1;2,3\n', 'separated by semicolons'),
    ],
)
def test_a_table_whose_cells_would_shift_is_refused(text, says, tmp_path):
    (tmp_path / 'a.csv').write_text(text)
    with pytest.raises(Stop, match=says):
        tables.read_csv(tmp_path / 'a.csv')
    (tmp_path / 'a.csv').write_text('a,b\n1,2,\n')  # as some programs end their lines
    assert tables.read_csv(tmp_path / 'a.csv').values.tolist() == [['1', '2']]


@pytest.mark.parametrize('name', ['', '.', '..', 'a/b', 'a\\b', 'C:x', 'a\x00b', 'x.'])
def test_a_name_that_could_lead_elsewhere_is_no_image_name(name):
    table = by_hand()
    table.loc[0, 'image_name'] = name
    with pytest.raises(Stop, match='is no image_name'):
        tables.parse_columns(table)


@pytest.mark.parametrize(
    ('column', 'value', 'says'),
    [
        ('source', '../../x', 'is no source'),
        ('source', '', 'is no source'),
        ('image_name', 'I2', 'stands twice'),
        ('fold', '-1', 'so its fold must be a whole number'),
        ('fold', '1e300', 'so its fold must be a whole number'),
        ('path', 'a\x01b', 'is no path'),
        ('fold', '', 'so its fold must be a whole number'),
        ('group', '', 'a group'),
        ('path', '', 'a path'),
        ('target', '2', 'expected 0 or 1'),
        ('split', 'x', 'only .train. and .test.'),
    ],
)
def test_a_folds_csv_made_by_hand_is_checked(column, value, says, tmp_path):
    table = by_hand()
    table.to_csv(tmp_path / 'folds.csv', index=False)
    read = tables.read_folds(tmp_path / 'folds.csv')
    assert read.fold.isna().tolist() == read.target.isna().tolist() == [False] * 4 + [True]
    assert read.path[0] == str(tmp_path / 'I1.jpg')
    table.loc[0, column] = value
    table.to_csv(tmp_path / 'folds.csv', index=False)
    with pytest.raises(Stop, match=says):
        tables.read_folds(tmp_path / 'folds.csv')


@pytest.mark.parametrize('value', ['inf', '-3', '4.5', '1e999', 'wide'])
def test_a_size_or_an_age_that_cannot_be_is_none(value):
    table = by_hand()
    table.loc[0, ['width', 'age_approx']] = value
    read = tables.parse_columns(table)
    assert np.isnan(read.width[0]) and read.width[1] == 40
    assert (read.age_approx[0] == 4.5) if value == '4.5' else np.isnan(read.age_approx[0])


def test_the_labelled_rows_are_read_and_folds_that_leak_or_lack_a_class_are_refused(tmp_path):
    path = tmp_path / 'folds.csv'
    by_hand().iloc[::-1].to_csv(path, index=False)
    table = tables.read_labelled(path)
    assert table.image_name.tolist() == ['I4', 'I3', 'I2', 'I1']
    assert table.index.tolist() == [0, 1, 2, 3]
    assert table.fold.tolist() == [1, 1, 0, 0] and table.target.tolist() == [1, 0, 1, 0]
    assert {table.fold.dtype.kind, table.target.dtype.kind} == {'i'}
    by_hand(group=['p', 'q', 'p', 's', 'p']).to_csv(path, index=False)
    with pytest.raises(Stop, match='p is in folds 0, 1'):
        tables.read_labelled(path)
    by_hand(target=[1, 1, 0, 1, '']).to_csv(path, index=False)
    with pytest.raises(Stop, match='outside of fold 1'):
        tables.read_labelled(path)


@pytest.mark.parametrize(
    ('column', 'value', 'same'),
    [
        ('path', 'elsewhere/I1.png', True),
        ('width', 6000, True),
        ('height', '', True),
        ('age_approx', 30, True),
        ('group', 'z', False),
        ('target', 1, False),
        ('fold', 1, False),
        ('source', 'z', False),
        ('image_name', 'z', False),
    ],
)
def test_the_hash_of_the_rows_changes_with_what_decides_a_result(column, value, same, tmp_path):
    def hashed(table: pd.DataFrame) -> str:
        table.to_csv(tmp_path / 'folds.csv', index=False)
        return tables.fingerprint(
            tables.read_folds(tmp_path / 'folds.csv').query("split == 'train'")
        )

    table = by_hand()
    before = hashed(table)
    assert hashed(table.iloc[::-1]) == before == hashed(table[:-1])  # without the test image
    table.loc[0, column] = value
    assert (hashed(table) == before) == same


def test_only_an_empty_cell_or_a_word_of_several_rows_is_no_patient(tmp_path, capsys):
    path = tmp_path / 'a.csv'
    ids = {'p': ' p', 'q': 'p ', 'r': 'NA', 's': '-1', 't': '-1', 'u': '', 'v': '0', 'w': 'None'}
    path.write_text('image_name,patient_id\n' + '\n'.join(map(','.join, ids.items())) + '\nx,none')
    patients = tables.read_csv(path).patient_id
    assert patients.fillna('?').tolist() == ['p', 'p', 'NA', '?', '?', '?', '0', 'None', 'none']
    assert f"{path}: patient_id '-1' is taken as not known, in 2 rows" in capsys.readouterr().out
    path.write_text(path.read_text().replace(',None', ',none'))
    assert tables.read_csv(path).patient_id[-2:].isna().all()
    words = capsys.readouterr().out
    assert "patient_id '-1', 'none' is taken as not known, in 4 rows" in words
    path.write_text('image_name,patient_id,sex,group\na,p,NA,0\nb,q,nan,0\n')
    table = tables.read_csv(path)
    assert table.sex.isna().all() and table.group.tolist() == ['0', '0']  # a group has a number
    assert capsys.readouterr().out == ''


def test_what_others_write_for_sex_and_age_is_understood_or_counted(capsys):
    words = ['M', 'Female', 'woman', 'x', None]
    ages = ['85+', '50', '7', 'old', None]
    table = tables.parse_columns(by_hand(sex=words, age_approx=ages, width=[40, 40, 40.5, 40, 40]))
    assert table.sex.fillna('?').tolist() == ['male', 'female', 'female', '?', '?']
    assert table.age_approx.fillna(-1).tolist() == [85, 50, 7, -1, -1]
    said = capsys.readouterr().out.splitlines()
    assert [line.split(',')[0] for line in said] == [
        f'{column}: 1 cells are not understood' for column in ('sex', 'age_approx', 'width')
    ]
    assert said[0].endswith("such as 'x'")


def test_two_columns_of_one_meaning_complete_each_other_or_are_refused(tmp_path):
    path = tmp_path / 'a.csv'
    path.write_text('Isic_ID ,image_name,Age\nI1.jpg,I1,40\n,I2,\nI3,,50\n')
    table = tables.read_csv(path, ['image_name', 'age'])
    assert table.image_name.tolist() == ['I1', 'I2', 'I3'] and table.age_approx[0] == '40'
    path.write_text('isic_id,image_name\nI1,I2\n')
    with pytest.raises(Stop, match='two columns that mean image_name and differ'):
        tables.read_csv(path)
