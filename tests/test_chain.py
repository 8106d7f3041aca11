"""The four scripts, one after the other, as a person types them."""

import json
import shutil

import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import roc_auc_score

QUICK = ['--arch', 'test_resnet', '--nopretrained', '--size', 64, '--epochs', 1]


@pytest.fixture(scope='module')
def home(demo, script, tmp_path_factory):
    """A home in which folds.py, train.py (two runs), infer.py and blend.py have run; read only."""
    home = tmp_path_factory.mktemp('home')
    for command in [
        ['folds.py', '--data', demo, '--home', home, '--n_folds', 2],
        ['train.py', '--home', home, *QUICK],
        ['train.py', '--home', home, *QUICK, '--seed', 1, '--cutout', '--name', 'twin'],
        ['infer.py', '--home', home, '--n_tta', 2],
        ['blend.py', '--home', home],
    ]:
        done = script(*command)
        assert done.returncode == 0, done.stderr
        assert '\r' not in done.stdout and '█' not in done.stderr  # a log file without bars
        (home / f'{len(list(home.glob("*.log")))}.log').write_text(done.stdout)
    return home


@pytest.fixture
def copy(home, tmp_path):
    """`home` again, to be changed; beside it, since folds.csv's paths are relative."""
    return shutil.copytree(home, home.with_name(f'copy_{tmp_path.name}'))


def run_of(home):
    return next(p for p in (home / 'runs').iterdir() if p.name != 'twin')


def test_the_submission_is_the_mean_of_the_runs_in_the_samples_order(home, demo):
    submission = pd.read_csv(home / 'submission.csv')
    sample = pd.read_csv(demo / 'sample_submission.csv')
    assert submission.columns.tolist() == ['image_name', 'target']
    assert submission.image_name.tolist() == sample.image_name.tolist()
    tests = [pd.read_csv(p).set_index('image_name').pred for p in home.glob('runs/*/test.csv')]
    assert len(tests) == 2
    np.testing.assert_allclose(submission.target, sum(tests).loc[submission.image_name] / 2)
    assert submission.target.between(0, 1).all()


def test_a_run_holds_what_the_design_promises(home):
    run = run_of(home)
    assert run.name == 'test_resnet_nopretrained_size-64_epochs-1'
    config = json.loads((run / 'config.json').read_text())
    assert config['size'] == 64 and config['mean'] == [0.5, 0.5, 0.5]
    assert not {'fold', 'workers', 'home', 'name'} & set(config)
    for fold in ('fold0', 'fold1'):
        names = {p.name for p in (run / fold).iterdir()}
        expected = {'model.safetensors', 'history.csv', 'run.json', 'oof.csv', 'tta_oof.csv'}
        assert expected | {'history.png', 'batch.png'} <= names
    oof, test = pd.read_csv(run / 'oof.csv'), pd.read_csv(run / 'test.csv')
    columns = 'image_name patient_id group source fold target pred pred_plain prob'
    assert oof.columns.tolist() == columns.split()
    assert test.columns.tolist() == ['image_name', 'pred', 'pred_plain', 'prob']
    folds = pd.read_csv(home / 'folds.csv')
    assert set(oof.image_name) == set(folds[folds.split == 'train'].image_name)
    assert (oof.pred != oof.pred_plain).any()


def test_every_image_is_scored_by_the_model_that_did_not_see_it(home):
    folds = pd.read_csv(home / 'folds.csv').set_index('image_name').fold
    for k in (0, 1):
        oof = pd.read_csv(run_of(home) / f'fold{k}' / 'oof.csv')
        assert (folds[oof.image_name] == k).all()
        tta = pd.read_csv(run_of(home) / f'fold{k}' / 'tta_oof.csv')
        # infer.py rebuilds from config and weights alone what train.py had in memory
        np.testing.assert_allclose(oof.pred_plain, tta.pred_plain, atol=1e-6)


def test_the_printed_auc_is_scikit_learns(home):
    oof = pd.read_csv(run_of(home) / 'oof.csv')
    trained, inferred, blended = ((home / f'{i}.log').read_text() for i in (1, 3, 4))
    assert f' {roc_auc_score(oof.target, oof.pred_plain):.4f} [' in trained
    assert f' {roc_auc_score(oof.target, oof.pred):.4f} [' in inferred
    saved = json.loads((run_of(home) / 'scores.json').read_text())
    for column in ('pred', 'pred_plain'):
        auc = saved[column]['pooled']['auc'][0]
        assert auc == pytest.approx(roc_auc_score(oof.target, oof[column]))
    assert saved['tta'][0] == pytest.approx(
        roc_auc_score(oof.target, oof.pred) - roc_auc_score(oof.target, oof.pred_plain)
    )
    twin = pd.read_csv(home / 'runs' / 'twin' / 'oof.csv').set_index('image_name')
    both = (oof.pred + twin.pred[oof.image_name].to_numpy()) / 2
    assert f' {roc_auc_score(oof.target, both):.4f} [' in blended
    assert 'the shortcut floor' in blended and 'Brier' in blended


def test_prob_is_pred_moved_once_to_the_rate_of_melanomas(home):
    folds = pd.read_csv(home / 'folds.csv')
    rate = folds.target.mean()
    factor = rate / (1 - rate)  # trained at 1:1
    for folder in (run_of(home), home / 'report'):
        for name in ('oof.csv', 'test.csv'):
            table = pd.read_csv(folder / name)
            expected = table.pred * factor / (table.pred * factor + 1 - table.pred)
            np.testing.assert_allclose(table.prob, expected, rtol=1e-9)
    submission = pd.read_csv(home / 'submission.csv')
    assert (submission.target == pd.read_csv(home / 'report' / 'test.csv').pred).all()


def test_another_prior_moves_prob_and_predicts_nothing_again(copy, ok):
    run = run_of(copy)
    before = pd.read_csv(run / 'test.csv')
    out = ok('infer.py', '--home', copy, '--n_tta', 2, '--only', run.name, '--prior', 0.5)
    assert 'is finished' in out
    after = pd.read_csv(run / 'test.csv')
    assert (after.pred == before.pred).all() and (after.prob > before.prob).all()
    np.testing.assert_allclose(after.prob, after.pred, rtol=1e-9)  # 1:1, as trained


def test_a_blend_is_kept_can_be_blended_and_is_no_run_to_predict_with(copy, ok, script):
    one = run_of(copy).name
    ok('blend.py', '--home', copy, '--name', 'both', '--how', 'rank')
    kept = copy / 'runs' / 'both'
    assert {p.name for p in kept.iterdir()} == {'oof.csv', 'test.csv', 'blend.json'}
    assert 'both' not in ok('infer.py', '--home', copy, '--n_tta', 2)
    ok('blend.py', '--home', copy)
    blend = json.loads((copy / 'report' / 'scores.json').read_text())['blend']
    assert blend['runs'] == [one, 'twin']  # not the blend, unless it is named
    ok('blend.py', '--home', copy, '--mix', f'both=.75,{one}=.25')
    found = pd.read_csv(copy / 'submission.csv').target
    tests = [pd.read_csv(copy / 'runs' / name / 'test.csv').pred for name in ('both', one)]
    np.testing.assert_allclose(found, 0.75 * tests[0] + 0.25 * tests[1])
    ok('blend.py', '--home', copy, '--name', 'both', '--how', 'rank')  # the same again
    for name, how, says in (
        ('both', 'mean', "how 'rank' (now 'mean')"),
        ('twin', 'mean', 'one of the runs'),
    ):
        done = script('blend.py', '--home', copy, '--name', name, '--how', how)
        assert done.returncode == 1 and says in done.stderr
    done = script('train.py', '--home', copy, *QUICK, '--name', 'both')
    assert done.returncode == 1 and 'blend' in done.stderr


def test_any_folder_of_images_is_predicted_with_a_threshold_from_out_of_fold(
    copy, demo, ok, script, tmp_path
):
    folder, out = tmp_path / 'images', tmp_path / 'out.csv'
    (folder / 'deep').mkdir(parents=True)
    test = pd.read_csv(copy / 'runs' / 'twin' / 'test.csv').set_index('image_name')
    for k, name in enumerate(test.index[:4]):
        to = folder / ('deep' if k == 3 else '.') / f'{k}.jpg'
        shutil.copy(demo / 'jpeg' / 'test' / f'{name}.jpg', to)
    (folder / 'notes.txt').write_text('no image')
    ask = ['infer.py', '--home', copy, '--images', folder, '--out', out]
    text = ok(*ask, '--n_tta', 2, '--sensitivity', 0.8)
    found = pd.read_csv(out)
    assert found.columns.tolist() == ['image_name', 'pred', 'prob', 'class']
    assert found.image_name.tolist() == ['0.jpg', '1.jpg', '2.jpg', 'deep/3.jpg']
    oofs = [pd.read_csv(p).set_index('image_name') for p in copy.glob('runs/*/oof.csv')]
    mean = (oofs[0].pred + oofs[1].pred[oofs[0].index]) / 2
    melanomas = np.sort(mean[oofs[0].target == 1])[::-1]
    at = melanomas[int(np.ceil(0.8 * len(melanomas))) - 1]
    assert (found['class'] == np.where(found.pred >= at, 'melanoma', 'benign')).all()
    assert f'{at:.4f}' in text and 'no diagnosis' in text

    ok('infer.py', '--home', copy, '--n_tta', 0)
    ok('infer.py', '--home', copy, '--images', folder / '0.jpg', '--out', out, '--n_tta', 0)
    plain = np.mean([pd.read_csv(p).pred_plain[0] for p in copy.glob('runs/*/test.csv')])
    assert pd.read_csv(out).pred.tolist() == pytest.approx([plain], abs=1e-4)
    (folder / 'bad.jpg').write_bytes(b'no JPEG')
    for extra, says in (
        (['--n_tta', 0], 'bad.jpg'),
        (['--n_tta', 3], 'add --n_tta 0'),
        (['--n_tta', 0, '--sensitivity', 1.5], '--sensitivity'),
    ):
        done = script(*ask, *extra)
        assert done.returncode in (1, 2) and says in done.stderr, done.stderr
    assert len(pd.read_csv(out)) == 1  # what was there is whole


def test_what_is_finished_is_not_done_again_and_what_is_missing_is(copy, ok):
    run = run_of(copy)
    weights = {p: p.stat().st_mtime_ns for p in run.glob('fold*/model.safetensors')}
    (run / 'fold1' / 'oof.csv').unlink()
    assert 'fold 0 is finished' in ok('train.py', '--home', copy, *QUICK, '--fold', 0)
    out = ok('train.py', '--home', copy, *QUICK)
    assert 'fold 1 epoch' in out and 'fold 0 epoch' not in out
    now = {p.parent.name: p.stat().st_mtime_ns != weights[p] for p in weights}
    assert now == {'fold0': False, 'fold1': True}

    # the same seed trained the same weights, so that the predictions are finished still
    before = (run / 'oof.csv').stat().st_mtime_ns
    assert ok('infer.py', '--home', copy, '--n_tta', 2).count('is finished') == 2
    assert (run / 'oof.csv').stat().st_mtime_ns == before
    plain = ok('infer.py', '--home', copy, '--n_tta', 0, '--only', run.name)
    assert 'is finished' not in plain and 'TTA passes change' not in plain
    oof = pd.read_csv(run / 'oof.csv')
    assert (oof.pred == oof.pred_plain).all()


def test_one_fold_alone_says_which_are_missing(copy, ok, script):
    out = ok('train.py', '--home', copy, *QUICK, '--name', 'part', '--fold', 1)
    assert 'fold 0 still to be trained' in out
    assert 'passed over' in ok('infer.py', '--home', copy, '--n_tta', 2)
    blend = script('blend.py', '--home', copy)
    assert blend.returncode == 1 and 'part: fold 0 still to be trained' in blend.stderr
    command = blend.stderr.split('trained: python ')[1].split()
    assert 'fold 0 epoch' in ok(*command)  # the command that is named makes what is missing
    ok('blend.py', '--home', copy, '--only', 'twin')


def test_the_range_test_trains_nothing_and_leaves_its_picture(copy, ok):
    out = ok('train.py', '--home', copy, *QUICK, '--name', 'rates', '--lr_find')
    assert 'suggested: --lr_min' in out
    files = [p for p in (copy / 'runs' / 'rates').rglob('*') if p.is_file()]
    assert [p.name for p in files] == ['lr_find.png'] and files[0].stat().st_size > 10_000


def test_runs_and_tables_that_do_not_fit_are_refused_by_name(copy, script):
    def refusal(*command):
        done = script(*command)
        assert done.returncode == 1 and 'Traceback' not in done.stderr, done.stderr
        return done.stderr

    other = refusal('train.py', '--home', copy, *QUICK, '--name', 'twin')
    assert 'cutout True (now False), seed 1 (now 0)' in other
    weights = copy / 'runs' / 'twin' / 'fold0' / 'model.safetensors'
    old = weights.read_bytes()
    weights.write_bytes((copy / 'runs' / 'twin' / 'fold1' / 'model.safetensors').read_bytes())
    assert 'trained again' in refusal('blend.py', '--home', copy)
    weights.write_bytes(old)
    (copy / 'runs' / 'twin' / 'test.csv').unlink()
    assert 'python infer.py' in refusal('blend.py', '--home', copy)
    table = pd.read_csv(copy / 'folds.csv')
    table.loc[table.group == table.group[0], 'fold'] = 0
    table.loc[0, 'fold'] = 1
    table.to_csv(copy / 'folds.csv', index=False)
    assert 'folds.csv' in refusal('infer.py', '--home', copy)
    leak = refusal('train.py', '--home', copy, *QUICK)
    assert table.group[0] in leak and 'more than one fold' in leak


def test_folds_csv_is_not_changed_under_the_runs_trained_on_it(copy, demo, script, ok):
    before = (copy / 'folds.csv').read_bytes()
    again = ['folds.py', '--data', demo, '--home', copy, '--n_folds', 2]
    done = script(*again, '--seed', 5)
    assert done.returncode == 1 and 'runs' in done.stderr
    assert (copy / 'folds.csv').read_bytes() == before


def test_the_demo_has_kaggles_layout_and_says_that_it_is_not_medical(ok, tmp_path):
    out = ok('folds.py', '--demo', cwd=tmp_path)
    home = tmp_path / 'data' / 'demo'
    assert 'not medical data' in out and 'not medical data' in (home / 'SYNTHETIC.txt').read_text()
    train, test = pd.read_csv(home / 'train.csv'), pd.read_csv(home / 'test.csv')
    assert 0.05 <= train.target.mean() <= 0.2 and 'target' not in test
    assert train.patient_id.nunique() < len(train) / 3
    assert not set(train.patient_id) & set(test.patient_id)
    assert train.age_approx.isna().any() and train.sex.isna().any()
    assert len(list((home / 'jpeg' / 'train').glob('*.jpg'))) == len(train)
