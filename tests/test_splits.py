"""Folds that do not leak, by patient, lesion and known duplicate."""

import os
import shutil

import numpy as np
import pandas as pd
import pytest
import sklearn
from packaging.version import Version
from sklearn.model_selection import StratifiedGroupKFold

from lib import files, splits, tables
from lib.cli import Stop


def random_table(seed=0, n=2000) -> pd.DataFrame:
    """Two sources, patients of 1 to 60 images, 5 % melanomas, a third without a patient."""
    rng = np.random.default_rng(seed)
    patient = np.array([f'P{p}' for p in (rng.pareto(1.5, n) * 30).astype(int)], dtype=object)
    table = pd.DataFrame(
        {
            'image_name': [f'I{i}' for i in range(n)],
            'patient_id': np.where(rng.random(n) < 0.33, np.nan, patient),
            'source': rng.choice(['a', 'b'], n, p=[0.8, 0.2]),
            'target': (rng.random(n) < 0.05).astype(float),
        }
    )
    return table.assign(group=splits.join_groups(table))


def test_a_group_is_the_patient_else_the_lesion_else_the_image_and_a_lesion_is_never_in_two():
    table = pd.DataFrame({'image_name': ['a', 'b', 'c'], 'patient_id': ['p', None, None]})
    assert splits.join_groups(table.assign(lesion_id=['k', 'l', None])).tolist() == ['p', 'l', 'c']
    group = splits.join_groups(table.assign(lesion_id=['l', 'l', 'm']))
    assert group[0] == group[1] != group[2]


def test_a_patient_is_no_lesion_and_no_image_of_the_same_name():
    table = pd.DataFrame({'image_name': list('5678'), 'patient_id': ['1', '2', '3', None]})
    lesions = ['2', '3', '4', '1']  # as a clinic numbers both
    group = splits.join_groups(table.assign(lesion_id=lesions))
    assert group.tolist() == ['1', '2', '3', 'lesion_id 1']
    group = splits.join_groups(table.assign(patient_id=['6', None, None, None]))
    assert group.tolist() == ['6', 'image_name 6', '7', '8']


def test_duplicates_join_their_groups_over_chains_and_over_images_that_are_not_there():
    table = pd.DataFrame(
        {'image_name': list('abcdef'), 'patient_id': ['p', 'q', 'r', 's', 't', 'p']}
    )
    pairs = pd.DataFrame({'one': ['a', 'b', 'x', 'x'], 'two': ['b', 'c', 'd', 'e']})
    assert splits.join_groups(table, pairs).tolist() == ['p', 'p', 'p', 's', 's', 'p']


def test_no_group_is_in_two_folds_and_melanomas_are_spread_within_each_source():
    table = random_table()
    fold = pd.Series(splits.assign_folds(table, 5, seed=0))
    assert splits.find_leaks(table.group, fold) == []
    assert set(fold) == set(range(5))
    counts = table.groupby(['source', 'target', fold]).size().unstack()
    assert (counts.max(axis=1) - counts.min(axis=1) <= 2).all(), counts


@pytest.mark.skipif(
    Version(sklearn.__version__) < Version('1.7'), reason='its own shuffle is wrong before 1.7'
)
@pytest.mark.parametrize('seed', [0, 3])
def test_folds_are_those_of_scikit_learns_own_shuffle(seed):
    table = random_table(seed)
    strata = table.source + table.target.astype(int).astype(str)
    witness = StratifiedGroupKFold(5, shuffle=True, random_state=seed)
    fold = splits.assign_folds(table, 5, seed)
    for k, (_, rows) in enumerate(witness.split(table, strata, table.group)):
        assert np.flatnonzero(fold == k).tolist() == rows.tolist()


def test_a_leak_is_counted_and_named_and_rows_without_a_fold_do_not_count():
    group = pd.Series(['a', 'a', 'b', 'b', 'c', 'c'])
    fold = pd.Series([0, 1, 2, 2, 0, np.nan])
    assert splits.find_leaks(group, fold) == ['a']
    with pytest.raises(Stop, match='a is in folds 0, 1'):
        splits.check_groups(group, fold)
    splits.check_groups(group[2:], fold[2:])


def test_the_leak_check_on_real_folds_of_others(shared, script):
    folder = shared / 'data' / 'tables'
    leaky = script(
        'folds.py', '--check', folder / 'train_folds_leaky.csv', '--fold_column', 'kfold'
    )
    assert leaky.returncode == 1 and '2007 of 2008 groups' in leaky.stdout
    good = script('folds.py', '--check', folder / 'train_cdeotte.csv', '--fold_column', 'tfrecord')
    assert good.returncode == 0 and '0 of 2008 groups' in good.stdout
    assert '31375 of 31809 rows' in good.stdout  # -1 marks a dropped duplicate


def test_folds_csv_is_the_same_byte_for_byte_whatever_the_order_of_rows(demo, ok, tmp_path):
    copy, home = shutil.copytree(demo, tmp_path / 'data'), tmp_path / 'home'
    command = ['folds.py', '--data', copy, '--home', home, '--n_folds', 3]
    ok(*command)
    first = (home / 'folds.csv').read_bytes()
    rows = pd.read_csv(copy / 'train.csv', dtype=str)
    rows.sample(frac=1, random_state=1).to_csv(copy / 'train.csv', index=False)
    ok(*command)
    assert (home / 'folds.csv').read_bytes() == first
    ok(*command, '--seed', 1)
    assert (home / 'folds.csv').read_bytes() != first
    assert (home / pd.read_csv(home / 'folds.csv').path[0]).is_file()


def test_the_folds_columns_of_others_may_stand_in_the_input_and_are_checked_alone(
    demo, ok, script, tmp_path
):
    copy = shutil.copytree(demo, tmp_path / 'data')
    rows = pd.read_csv(copy / 'train.csv', dtype=str)
    rows.assign(kfold=range(len(rows))).to_csv(copy / 'train.csv', index=False)
    ok('folds.py', '--data', copy, '--home', tmp_path, '--n_folds', 3)
    (one, two), table = rows.image_name[:2], tmp_path / 'folds.csv'
    out = ok('folds.py', '--check', table, '--data', tmp_path / 'nowhere')
    assert '0 of ' in out and '60 of 72 rows' in out
    assert set(pd.read_csv(table).fold.dropna()) == {0, 1, 2}

    leaky = script('folds.py', '--check', copy / 'train.csv', '--fold_column', 'kfold')
    assert leaky.returncode == 1 and 'leaks' in leaky.stderr
    pd.DataFrame([(one, two)], columns=['image_name_1', 'image_name_2']).to_csv(
        copy / 'ISIC_2020_Training_Duplicates.csv', index=False
    )
    out = ok('folds.py', '--data', copy, '--home', tmp_path / 'b', '--n_folds', 3)
    assert '1 known pairs' in out
    joined = pd.read_csv(tmp_path / 'b' / 'folds.csv').set_index('image_name')
    assert joined.group[one] == joined.group[two] and joined.fold[one] == joined.fold[two]


def test_where_no_labelled_image_changes_folds_csv_changes_and_else_not(
    demo, ok, refusal, tmp_path
):
    data, home = shutil.copytree(demo, tmp_path / 'data'), tmp_path / 'home'
    command = ['folds.py', '--home', home, '--n_folds', 3, '--data']
    ok(*command, data)
    files.write_json(home / 'runs' / 'a' / 'config.json', {})

    data = data.rename(tmp_path / 'elsewhere')
    train = pd.read_csv(data / 'train.csv').assign(width=6000, height=4000)
    train.to_csv(data / 'train.csv', index=False)
    for name in ('test.csv', 'sample_submission.csv'):  # a competition's hidden images, or others
        rows = pd.read_csv(data / name)
        rows[rows.image_name != rows.image_name.min()].to_csv(data / name, index=False)
    ok(*command, data)
    path = home / 'folds.csv'
    table = tables.read_folds(path)
    assert table.width.max() == 6000 and all(pd.Series(table.path).map(os.path.isfile))

    new = path.read_bytes()
    assert 'would change' in refusal(*command, data, '--seed', 1)
    assert path.read_bytes() == new


@pytest.mark.parametrize(
    ('folds', 'patients', 'status', 'says'),
    [
        ('aabb', 'ppqq', 0, '4 of 4 rows have a fold in fold: 2 in a, 2 in b'),
        ('0011', 'pp q', 0, '1 of 4 images have no patient or lesion'),
        ('0011', '    ', 1, 'so no leak can be seen'),
        ('0000', 'ppqq', 1, 'fold has 1 folds'),
        ('    ', 'ppqq', 1, 'fold has 0 folds'),
        ('a11b', 'ppqq', 1, "'a' in fold is no fold; others are numbers"),
        (['0', '0.5', '1', '1'], 'ppqq', 1, "'0.5' in fold is no fold"),
    ],
)
def test_the_leak_check_reassures_only_where_it_can_see(
    folds, patients, status, says, script, tmp_path
):
    path = tmp_path / 'a.csv'
    rows = zip('abcd', folds, patients, strict=True)
    path.write_text('image_name,fold,patient_id\n' + '\n'.join(map(','.join, rows)))
    done = script('folds.py', '--check', path, '--data', tmp_path)
    assert done.returncode == status and says in done.stdout + done.stderr


def test_patients_that_differ_by_case_or_point_zero_and_large_groups_are_named(capsys):
    ids = ['P1', 'p1', '7', '7.0', *'abcdefghijklmnopq'[:16]]
    table = pd.DataFrame({'patient_id': ids})
    splits.warn_of_groups(table, table.patient_id)
    said = capsys.readouterr().out
    assert said.count('\n') == 1 and '2 patients differ from another by case or by .0' in said
    assert '7 and 7.0' in said
    splits.warn_of_groups(table[4:], pd.Series([*'aab', *'cdefghijklmno', *'zzzz']))
    assert capsys.readouterr().out == (
        'warning: 1 groups have over a tenth of all images: '
        'z has 4 of 20 images; is it one patient?\n'
    )
