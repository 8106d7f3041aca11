"""A run knows its flags and refuses others; it says what is missing, and what makes it."""

import json
import shlex

import numpy as np
import pandas as pd
import pytest
from test_locks import held_by_another

import train
from lib import cli, config, files, runs, tables
from lib.cli import Stop
from lib.runs import Run

DEFAULTS = {'arch': 'efficientnet_b5', 'pretrained': True, 'size': 512, 'cutout': False}
CONFIG = {**DEFAULTS, 'size': 384, 'folds_sha256': 'x', 'mean': [0.5] * 3, 'std': [0.5] * 3}
CONFIG |= {'command': 'python train.py --size 384', 'skipped': [], 'recipe': runs.RECIPE}
FLAGS = train.main.__kwdefaults__
ABOUT = {'tag': 'a', 'mean': [0.5] * 3, 'std': [0.5] * 3}


@pytest.fixture
def run(tmp_path) -> Run:
    """A run that has begun."""
    run = Run(tmp_path / 'runs' / 'r')
    run.begin(CONFIG, DEFAULTS)
    return run


@pytest.mark.parametrize(
    ('flags', 'name'),
    [
        ({}, 'efficientnet_b5'),
        ({'size': 384, 'cutout': True}, 'size-384_cutout'),
        ({'arch': 'resnet18', 'pretrained': False}, 'resnet18_nopretrained'),
        ({'arch': '../x y', 'size': 64}, 'xy_size-64'),
    ],
)
def test_a_runs_name_is_the_flags_that_differ_from_their_defaults(flags, name):
    assert config.make_name(DEFAULTS | flags, DEFAULTS) == name


@pytest.mark.parametrize('name', ['', '.', '..', '../x', 'a/b', '/x', '.hidden', 'a\x00'])
def test_a_runs_folder_is_never_outside_of_runs(name, tmp_path):
    with pytest.raises(Stop, match='must be letters'):
        runs.run_folder(tmp_path, name)
    assert runs.run_folder(tmp_path, 'size-384_b5.v1') == tmp_path / 'runs' / 'size-384_b5.v1'


def test_config_json_holds_what_decides_the_result_and_the_command_that_goes_on(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(tables, 'fingerprint', lambda path: {'folds_sha256': 'x'})
    weights = tmp_path / 'deep' / 'w.safetensors'
    files.write_text(weights, 'weights')
    flags = FLAGS | {'home': str(tmp_path), 'size': 384, 'weights': str(weights), 'skip_bad': True}
    flags |= {'workers': 2, 'fold': 1, 'precision': 'bf16'}
    run, made = config.make_run(tmp_path, flags, FLAGS, ABOUT, [0])
    assert run.folder == tmp_path / 'runs' / 'weights-w.safetensors_size-384'
    assert made['recipe'] == runs.RECIPE
    assert {k: made[k] for k in ABOUT} == ABOUT and made['size'] == 384 and made['wd'] == 0.1
    assert not set(config.NOT_IN_CONFIG) & set(made)
    assert (made['weights'], made['weights_sha256']) == ('w.safetensors', files.sha256(weights))
    words = shlex.split(made['command'])
    typed = {'home': str(tmp_path), 'name': run.name, 'weights': str(weights), 'skip_bad': True}
    assert words[:2] == ['python', 'train.py']
    assert cli.parse(train.main, words[2:]) == typed | {'size': 384}

    run.begin(made | {'skipped': ['a']}, FLAGS)
    for where in ({}, {'workers': 0, 'fold': None, 'skip_bad': False}):  # the same run goes on
        config.make_run(tmp_path, flags | where, FLAGS, ABOUT, [0])
    weights.write_text('others')
    with pytest.raises(Stop, match='weights_sha256'):
        config.make_run(tmp_path, flags, FLAGS, ABOUT, [0])


def test_the_same_flags_go_on_and_an_absent_flag_means_its_default(run):
    path = run.folder / 'config.json'
    saved = json.loads(path.read_text())
    del saved['cutout'], saved['skipped']
    path.write_text(json.dumps(saved))
    run.begin({**CONFIG, 'command': 'another'}, DEFAULTS)
    assert run.config['cutout'] is False and run.skipped == []
    with pytest.raises(Stop, match='cutout False'):
        run.begin({**CONFIG, 'cutout': True}, DEFAULTS)


@pytest.mark.parametrize('name', ['blend.json', 'oof.csv', 'test.csv'])
def test_a_folder_of_a_blend_or_of_others_predictions_is_not_trained_into(name, tmp_path):
    (tmp_path / name).write_text('{}')
    with pytest.raises(Stop, match='holds a blend or the predictions of others'):
        Run(tmp_path).begin(CONFIG, DEFAULTS)


def test_runs_are_found_by_their_config_and_a_wrong_name_lists_those_there(tmp_path):
    with pytest.raises(Stop, match=r'python train\.py'):
        runs.find_runs(tmp_path)
    for name in ('b', 'a'):
        Run(tmp_path / 'runs' / name).begin(CONFIG, DEFAULTS)
    (tmp_path / 'runs' / 'no_run').mkdir()
    assert [run.name for run in runs.find_runs(tmp_path)] == ['a', 'b']
    assert [run.name for run in runs.find_runs(tmp_path, 'b, a,b')] == ['b', 'a']
    with pytest.raises(Stop, match=r'no run named c .*; there: a, b'):
        runs.find_runs(tmp_path, 'c')


def test_a_blend_takes_runs_and_others_predictions_and_a_kept_blend_where_it_is_named(tmp_path):
    made = ['a/config.json', 'a/oof.csv', 'kept/blend.json', 'kept/oof.csv', 'theirs/test.csv']
    for path in [*made, '.hidden/oof.csv', 'nothing/notes.txt']:
        files.write_text(tmp_path / 'runs' / path, '{}')
    assert [run.name for run in runs.find_runs(tmp_path, predicted=True)] == ['a', 'theirs']
    assert [run.name for run in runs.find_runs(tmp_path, 'kept,a', predicted=True)] == ['kept', 'a']
    files.write_text(tmp_path / 'runs' / 'a,theirs' / 'oof.csv', '')
    named = runs.find_runs(tmp_path, 'a,theirs', predicted=True)
    assert [run.name for run in named] == ['a,theirs']  # its name
    with pytest.raises(Stop, match='empty name'):
        runs.find_runs(tmp_path, 'a,', predicted=True)
    assert [run.name for run in runs.find_runs(tmp_path)] == ['a']
    theirs = Run(tmp_path / 'runs' / 'theirs')
    assert theirs.skipped == [] and not theirs.has_begun and theirs.home == tmp_path


def finish(run: Run, k: int) -> None:
    rows = pd.DataFrame({'image_name': [f'00{k}', f'1{k}'], 'patient_id': 'p', 'group': 'p'})
    rows = rows.assign(source='s', fold=k, target=[0, 1], path='no such column')
    run.finish(k, rows, np.array([1 / 3, k]), {'precision': 'fp32'})


def test_a_fold_is_finished_by_its_oof_csv_which_comes_last(run, monkeypatch):
    written = []
    for name in ('write_json', 'write_csv'):
        write = getattr(files, name)

        def note(path, data, write=write):
            written.append(path.name)
            write(path, data)

        monkeypatch.setattr(files, name, note)
    (run.fold(1)).mkdir()
    (run.fold(1) / 'state.pt').write_text('of the last epoch')
    finish(run, 1)
    assert written == ['run.json', 'oof.csv'] and not (run.fold(1) / 'state.pt').exists()
    assert run.unfinished([0, 1, 2]) == [0, 2]
    finish(run, 0)
    oof = run.read_oof([0, 1])
    columns = ['image_name', 'patient_id', 'group', 'source', 'fold', 'target', 'pred_plain']
    assert oof.columns.tolist() == columns
    assert oof.image_name.tolist() == ['000', '10', '001', '11']  # names, not numbers
    assert oof.pred_plain.tolist() == [1 / 3, 0, 1 / 3, 1]


def test_what_is_unfinished_is_claimed_and_a_state_left_by_a_kill_at_the_very_end_goes(run, capsys):
    finish(run, 1)
    (run.fold(1) / 'state.pt').write_text('of the last epoch')
    assert list(run.claim([0, 1, 2])) == [0, 2]
    assert f'{run}: fold 1 is finished\n' == capsys.readouterr().out
    assert not (run.fold(1) / 'state.pt').exists()


def test_the_note_names_the_unfinished_folds_and_who_is_at_them(run):
    finish(run, 0)
    assert run.describe_unfinished([0, 1, 2]) == (
        f'{run}: fold 1, 2 still to be trained: python train.py --size 384 '
        f'--home {run.home} --name r'
    )
    with held_by_another(run.fold(1) / '.lock') as process:
        note = run.describe_unfinished([1, 2])
    assert f'fold 1 (process {process.pid} on' in note and 'works on it), 2 still' in note


def test_a_run_of_another_folds_csv_is_not_predicted_with(run, capsys):
    table = {'folds_sha256': 'of the file', 'table_sha256': 'of its rows'}
    with pytest.raises(Stop, match=r'was trained on another .*folds\.csv'):
        runs.choose_finished([run], [0], table)
    path = run.folder / 'config.json'
    table['labelled_sha256'] = 'of the labelled rows'
    other = dict.fromkeys(table, 'another')
    for known in [other | {key: value} for key, value in table.items()]:
        files.write_json(path, CONFIG | known)
        with pytest.raises(Stop, match='no run is trained in all folds'):
            runs.choose_finished([run], [0], table)
        assert 'passed over' in capsys.readouterr().out
    files.write_json(path, CONFIG | known)
    finish(run, 0)
    assert runs.choose_finished([run], [0], table) == [run]
    assert run.trained_folds == [0]
    for k in (10, 2):
        finish(run, k)
    assert run.trained_folds == [0, 2, 10]


def test_images_are_not_predicted_by_a_run_without_a_trained_fold(run, refusal, tmp_path):
    words = ['--home', run.home, '--images', 'x', '--out', 'y.csv']
    assert 'no run has a trained fold' in refusal('infer.py', *words, cwd=tmp_path)


@pytest.mark.parametrize(
    ('key', 'value'),
    [
        ('arch', 3),
        ('size', True),
        ('size', 10**9),
        ('mean', [0.5, 0.5]),
        ('mean', 'abc'),
        ('std', [0.5, 0.5, 0]),
        ('std', [0.5, 0.5, float('nan')]),
        ('cutout', 'yes'),
        ('folds_sha256', None),
        ('command', ['rm']),
        ('skipped', [1]),
        ('skipped', 'a'),
    ],
)
def test_a_strangers_config_is_checked(key, value, run):
    assert run.config == CONFIG
    path = run.folder / 'config.json'
    path.write_text(json.dumps(CONFIG | {key: value}))
    with pytest.raises(Stop, match=f'{key} is missing or holds'):
        _ = run.config


@pytest.mark.parametrize('command', ['rm -rf /', 'python train.py\x1b[2J'])
def test_a_strangers_command_is_not_recommended(command, run):
    files.write_json(run.folder / 'config.json', CONFIG | {'command': command})
    assert run.describe_unfinished([0]).endswith('trained: python train.py with its flags')


def test_what_a_result_may_depend_on_is_recorded(monkeypatch):
    about = config.describe_environment('cpu')
    assert about['device'] == 'cpu' and about['processes'] == 1
    assert {'python', 'torch', 'timm', 'fastai', 'kornia'} <= set(about)
    assert about['commit'] is None or len(about['commit'].removesuffix('-dirty')) == 40
    monkeypatch.setenv('PATH', '/nowhere')
    assert config.describe_environment('cpu')['commit'] is None  # a machine without git
