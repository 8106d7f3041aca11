"""A file is whole or not there; a run knows its flags and refuses others."""

import json

import pytest

from lib import files
from lib.cli import Stop

DEFAULTS = {'arch': 'efficientnet_b5', 'pretrained': True, 'size': 512, 'cutout': False}
CONFIG = {**DEFAULTS, 'size': 384, 'folds_sha256': 'x'}


def test_a_write_that_fails_leaves_the_old_file_and_nothing_beside_it(tmp_path):
    path = tmp_path / 'a.csv'
    files.write_text(path, 'old')
    with pytest.raises(ZeroDivisionError), files.atomic(path) as temporary:
        temporary.write_text('half')
        1 / 0  # noqa: B018
    assert path.read_text() == 'old' and [p.name for p in tmp_path.iterdir()] == ['a.csv']


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
    assert files.run_name(DEFAULTS | flags, DEFAULTS) == name


@pytest.mark.parametrize('name', ['', '.', '..', '../x', 'a/b', '/x', '.hidden', 'a\x00'])
def test_a_runs_folder_is_never_outside_of_runs(name, tmp_path):
    with pytest.raises(Stop, match='no folder name'):
        files.run_folder(tmp_path, name)
    assert files.run_folder(tmp_path, 'size-384_b5.v1') == tmp_path / 'runs' / 'size-384_b5.v1'


def test_the_same_flags_go_on_and_an_absent_flag_means_its_default(tmp_path):
    files.claim_run(tmp_path / 'r', {**CONFIG, 'command': 'one'}, DEFAULTS)
    path = tmp_path / 'r' / 'config.json'
    saved = json.loads(path.read_text())
    del saved['cutout']
    path.write_text(json.dumps(saved))
    files.claim_run(tmp_path / 'r', {**CONFIG, 'command': 'another'}, DEFAULTS)


@pytest.mark.parametrize(
    ('change', 'says'),
    [
        ({'cutout': True}, 'cutout False .now True.; give this run another --name'),
        ({'folds_sha256': 'y'}, 'folds.csv has changed'),
    ],
)
def test_other_flags_under_the_same_name_are_refused(change, says, tmp_path):
    files.claim_run(tmp_path / 'r', CONFIG, DEFAULTS)
    with pytest.raises(Stop, match=says):
        files.claim_run(tmp_path / 'r', CONFIG | change, DEFAULTS)


def test_runs_are_found_by_their_config_and_a_wrong_name_lists_those_there(tmp_path):
    with pytest.raises(Stop, match=r'python train\.py'):
        files.runs(tmp_path)
    for name in ('b', 'a'):
        files.claim_run(tmp_path / 'runs' / name, CONFIG, DEFAULTS)
    (tmp_path / 'runs' / 'no_run').mkdir()
    assert [p.name for p in files.runs(tmp_path)] == ['a', 'b']
    assert [p.name for p in files.runs(tmp_path, 'b, a')] == ['b', 'a']
    with pytest.raises(Stop, match=r'no run named c .*; there: a, b'):
        files.runs(tmp_path, 'c')


def test_json_that_is_broken_is_named(tmp_path):
    for text in ('{', '[1]'):
        (tmp_path / 'config.json').write_text(text)
        with pytest.raises(Stop, match=r'config\.json'):
            files.read_json(tmp_path / 'config.json')
