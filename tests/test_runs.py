"""A run knows its flags and refuses others; it says what is missing, and what makes it."""

import json
import shlex
from importlib.metadata import version

import pandas as pd
import pytest
import torch
from conftest import CONFIG

import train
from lib import cli, config, files, runs, tables
from lib.cli import Stop
from lib.runs import Run

DEFAULTS = {'arch': 'efficientnet_b5', 'pretrained': True, 'size': 512, 'cutout': False}
FLAGS = train.main.__kwdefaults__


def begin(folder, **changes) -> Run:
    """A run that has begun."""
    run = Run(folder, CONFIG | changes)
    run.begin()
    return run


@pytest.fixture
def run(tmp_path) -> Run:
    """A run that has begun, as infer.py sees it."""
    begin(tmp_path / 'runs' / 'r', command='python train.py --size 384')
    return Run(tmp_path / 'runs' / 'r')


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


def test_config_json_holds_what_decides_the_result_and_the_command_that_goes_on(demo, ok, tmp_path):
    ok('folds.py', '--data', demo, '--home', tmp_path, '--n_folds', 2)
    weights = tmp_path / 'deep' / 'w.safetensors'
    files.write_text(weights, 'weights')
    flags = FLAGS | {'home': str(tmp_path), 'size': 384, 'weights': str(weights)}
    flags |= {'workers': 2, 'fold': 1}
    run, table, wanted = config.open_run(flags, FLAGS)
    assert run.name.startswith('weights-') and run.name.endswith('w.safetensors_size-384')
    assert wanted == [1] and len(table) == 60 and not run.has_begun
    made = run.config
    of_timm = {
        'tag': 'sw_in12k_ft_in1k',
        'mean': [0.485, 0.456, 0.406],
        'std': [0.229, 0.224, 0.225],
    }
    assert of_timm.items() <= made.items() and made['size'] == 384 and made['wd'] == 0.1
    assert made['folds_sha256'] == tables.fingerprint(table)
    assert not set(config.NOT_IN_CONFIG) & set(made)
    assert set(FLAGS) - set(config.NOT_IN_CONFIG) < set(made)
    assert (made['weights'], made['weights_sha256']) == ('w.safetensors', files.sha256(weights))
    words = shlex.split(made['command'])
    assert words[:2] == ['python', 'train.py']
    assert cli.parse(train.main, words[2:]) == {'weights': str(weights), 'size': 384}

    run.begin()
    assert Run(run.folder).config == made
    for where in ({}, {'workers': 0, 'fold': None}):  # the same run goes on
        config.open_run(flags | where, FLAGS)
    weights.write_text('others')
    with pytest.raises(Stop, match='weights_sha256'):
        config.open_run(flags, FLAGS)


def test_the_same_flags_go_on_and_others_are_refused(run):
    begin(run.folder, command='another')
    assert run.config['command'] == 'python train.py --size 384'
    for changes, says in (
        ({'cutout': True}, r'cutout False \(now True\)'),
        ({'new': 9}, 'new None'),
    ):
        with pytest.raises(Stop, match=f'made with other flags: {says}.* give this run another'):
            begin(run.folder, **changes)
    with pytest.raises(Stop, match=r'was trained on another .*folds\.csv'):
        begin(run.folder, folds_sha256='y')


@pytest.mark.parametrize(
    'name', ['oof.csv', 'test.csv', 'fold0/state.pt', 'fold1/model.safetensors']
)
def test_a_folder_of_others_predictions_or_of_an_unknown_run_is_not_trained_into(name, tmp_path):
    files.write_text(tmp_path / name, 'a table')
    with pytest.raises(Stop, match=r'no config\.json that says what it was made with'):
        begin(tmp_path)
    assert not (tmp_path / 'config.json').exists()


def test_runs_are_found_by_their_config_and_a_wrong_name_lists_those_there(tmp_path):
    with pytest.raises(Stop, match=r'python train\.py'):
        runs.find_runs(tmp_path)
    for name in ('b', 'a'):
        begin(tmp_path / 'runs' / name)
    (tmp_path / 'runs' / 'no_run').mkdir()
    assert [run.name for run in runs.find_runs(tmp_path)] == ['a', 'b']
    assert [run.name for run in runs.find_runs(tmp_path, 'b, a,b')] == ['b', 'a']
    with pytest.raises(Stop, match=r"no run named 'c' .*; there: a, b"):
        runs.find_runs(tmp_path, 'c')


def test_a_blend_takes_runs_and_others_predictions(tmp_path):
    made = ['a/config.json', 'a/oof.csv', 'theirs/test.csv']
    made += ['theirs/oof.csv']
    for path in [*made, '.hidden/oof.csv', 'nothing/notes.txt']:
        files.write_text(tmp_path / 'runs' / path, '{}')
    assert [run.name for run in runs.find_runs(tmp_path, predicted=True)] == ['a', 'theirs']
    assert [run.name for run in runs.find_runs(tmp_path)] == ['a']
    with pytest.raises(Stop, match=r'theirs has predictions and no models.* blend\.py alone'):
        runs.find_runs(tmp_path, 'a,theirs')
    theirs = Run(tmp_path / 'runs' / 'theirs')
    assert not theirs.has_begun and theirs.home == tmp_path


def finish(run: Run, k: int) -> None:
    rows = pd.DataFrame({'image_name': [f'00{k}', f'1{k}'], 'patient_id': 'p', 'group': 'p'})
    rows = rows.assign(source='s', fold=k, target=[0, 1], path='no such column')
    files.write_text(run.weights(k), f'weights of fold {k}')
    run.finish(k, rows.assign(pred_plain=[1 / 3, k]), {'precision': 'fp32'})


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
    (run.folder / 'scores.json').write_text('of earlier weights')
    finish(run, 1)
    assert not (run.folder / 'scores.json').exists()
    assert written == ['run.json', 'oof.csv'] and not (run.fold(1) / 'state.pt').exists()
    assert run.unfinished([0, 1, 2]) == [0, 2]
    finish(run, 0)
    oof = run.read_oof([0, 1])
    columns = ['image_name', 'patient_id', 'group', 'source', 'fold', 'target', 'pred_plain']
    assert oof.columns.tolist() == columns
    assert oof.image_name.tolist() == ['000', '10', '001', '11']  # names, not numbers
    assert oof.pred_plain.tolist() == [1 / 3, 0, 1 / 3, 1]


def test_weights_that_are_exchanged_under_a_finished_fold_are_noticed(run, capsys):
    for k in (0, 1):
        finish(run, k)
    run.read_oof([0, 1])
    assert capsys.readouterr().out == ''
    run.weights(1).write_text('of another training')
    run.read_oof([0, 1])
    said = capsys.readouterr().out
    assert said.startswith(f'warning: {run.weights(1)} holds other') and said.count('\n') == 1


@pytest.mark.parametrize(
    ('old', 'new', 'is_other'),
    [
        ('degrees=180', 'degrees=90', True),
        ('p=0.5)', 'p=0.5,)  # a comment\n', False),
        ('not medical', 'not  medical', False),
        ('x + y', 'y + x', True),
        ('z[: x]', 'z[x:]', True),
        ('        pass\n    else:', '    else:\n        pass', True),
        ('return x', '"""What comes back."""\n    return x', False),
    ],
)
def test_a_recipe_that_changes_under_a_run_is_told_and_its_words_may_change(
    old, new, is_other, tmp_path, monkeypatch, capsys
):
    text = '"""This is not medical."""\ndegrees=180\nflip(p=0.5)\nz[: x]\n'
    text += 'def f(x, y):\n    return x + y\n'
    text += 'for i in x:\n    if i:\n        a()\n        pass\n    else:\n        b()\n'
    monkeypatch.setattr(runs, 'ROOT', tmp_path)
    for name in runs.CODE:
        files.write_text(tmp_path / name, text)
    run = begin(tmp_path / 'runs' / 'r', code_sha256=runs.hash_code())
    run.warn_of_code()
    assert capsys.readouterr().out == ''
    files.write_text(tmp_path / runs.CODE[1], text.replace(old, new))
    run.warn_of_code()
    said = capsys.readouterr().out
    assert (said.startswith('warning: one of train.py, lib/augment.py, ')) == is_other
    run.asked['code_sha256'] = runs.hash_code()
    run.check()  # it may go on all the same


def test_what_is_unfinished_is_claimed_and_a_state_left_by_a_kill_at_the_very_end_goes(run, capsys):
    finish(run, 1)
    (run.fold(1) / 'state.pt').write_text('of the last epoch')
    assert list(run.claim([0, 1, 2])) == [0, 2]
    assert f'{run}: fold 1 is finished\n' == capsys.readouterr().out
    assert not (run.fold(1) / 'state.pt').exists()


def test_the_note_names_the_unfinished_folds_and_the_command(run):
    finish(run, 0)
    assert run.describe_unfinished([0, 1, 2]) == (
        f'{run}: not trained yet: fold 1, 2. If no other process trains it, type: '
        f'python train.py --size 384 --home {run.home} --name r'
    )


def test_a_run_of_another_folds_csv_is_not_predicted_with(run, capsys, monkeypatch):
    table = pd.DataFrame({'split': ['train'] * 2 + ['test'], 'fold': [0, 0, None]})
    monkeypatch.setattr(runs, 'fingerprint', lambda labelled: 'x' if len(labelled) == 2 else 'y')
    with pytest.raises(Stop, match=r'was trained on another .*folds\.csv'):
        runs.choose_finished([run], table[:1])
    with pytest.raises(Stop, match='no run is trained in all folds'):
        runs.choose_finished([run], table)
    assert 'passed over' in capsys.readouterr().out
    finish(run, 0)
    assert runs.choose_finished([run], table) == [run]
    theirs = Run(run.home / 'runs' / 'theirs')
    assert runs.choose_finished([run, theirs], table) == [run, theirs]
    assert run.trained_folds == [0]
    for k in (10, 2):
        finish(run, k)
    assert run.trained_folds == [0, 2, 10]


def test_images_are_not_predicted_by_a_run_without_a_trained_fold(run, refusal, tmp_path):
    words = ['--home', run.home, '--images', 'x', '--out', 'y.csv']
    assert 'no run has a trained fold' in refusal('infer.py', *words, cwd=tmp_path)


BAD = [
    ('arch', 3), ('size', 10**9), ('size', 'large'), ('size', True), ('mean', [0.5] * 2),
    ('mean', 'abc'), ('std', [0.5, 0.5, 0]), ('std', [0.5, 0.5, float('nan')]), ('std', None),
    ('cutout', 'yes'), ('folds_sha256', None), ('command', ['rm']), ('command', 'rm -rf /'),
    ('command', 'python train.py\x1b[2J'),
]  # fmt: skip


@pytest.mark.parametrize(('key', 'value'), BAD)
def test_a_strangers_config_is_checked(key, value, run):
    _ = run.config  # it is good
    path = run.folder / 'config.json'
    path.write_text(json.dumps(CONFIG | {key: value}))
    with pytest.raises(Stop, match=f'{key} is missing or holds what'):
        _ = run.config


def test_what_a_result_may_depend_on_is_recorded(monkeypatch):
    cpu = torch.device('cpu')
    about = config.describe_environment(cpu, 'fp32', 'bf16')
    assert (about['device'], about['processes']) == ('cpu', 1)
    assert (about['precision'], about['scoring_precision']) == ('fp32', 'bf16')
    assert about['torch'] == version('torch') and {'python', 'timm', 'fastai', 'kornia'} <= set(
        about
    )
    assert about['commit'] is None or len(about['commit'].removesuffix('-dirty')) == 40
    monkeypatch.setenv('PATH', '/nowhere')
    assert config.describe_environment(cpu, 'fp32', 'fp32')['commit'] is None  # without git
