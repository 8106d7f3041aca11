"""The four scripts, one after the other, as a person types them."""

import json
import shutil
from functools import partial

import numpy as np
import pandas as pd
import pytest
from conftest import QUICK, contents
from fastai.vision.all import Learner
from PIL import Image
from scipy.special import logit
from sklearn.metrics import roc_auc_score
from test_locks import held_by_another

from lib.demo import make

TRAIN = [*QUICK, '--epochs', 1]


@pytest.fixture(scope='module')
def blended(home, ok):
    """`home` after blend.py too, whose output is 4.log. Read only."""
    blended = shutil.copytree(home, home.with_name('blended'))
    (blended / '4.log').write_text(ok('blend.py', '--home', blended))
    return blended


def run_of(home):
    return next(p for p in (home / 'runs').iterdir() if p.name != 'twin')


def test_a_run_holds_what_the_design_promises(home):
    run = run_of(home)
    assert run.name == 'test_resnet_nopretrained_size-64_epochs-1'
    config = json.loads((run / 'config.json').read_text())
    assert config['size'] == 64 and config['mean'] == [0.5, 0.5, 0.5]
    assert not {'fold', 'workers', 'home', 'name'} & set(config)
    for fold in ('fold0', 'fold1'):
        with Image.open(run / fold / 'history.png') as image:
            assert image.format == 'PNG' and min(image.size) > 200
        names = {p.name for p in (run / fold).iterdir()}
        made = {'model.safetensors', 'history.csv', 'history.png', 'batch.png', 'run.json'}
        parts = {f'tta_{kind}.{suffix}' for kind in ('oof', 'test') for suffix in ('csv', 'json')}
        assert made | {'oof.csv'} | parts == {name for name in names if not name.startswith('.')}
        about = json.loads((run / fold / 'run.json').read_text())
        assert about['precision'] == about['scoring_precision'] == 'fp32'
        assert about['device'] == 'cpu'
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
    trained, inferred = ((home / f'{i}.log').read_text() for i in (1, 3))
    assert f' {roc_auc_score(oof.target, oof.pred_plain):.4f} [' in trained
    assert f' {roc_auc_score(oof.target, oof.pred):.4f} [' in inferred
    saved = json.loads((run_of(home) / 'scores.json').read_text())
    aucs = {column: roc_auc_score(oof.target, oof[column]) for column in ('pred', 'pred_plain')}
    for column, auc in aucs.items():
        (row,) = (row for row in saved[column] if row['label'] == 'AUC, pooled')
        assert row['value'] == pytest.approx(auc) and row['images'] == 60
    assert saved['tta'][0]['difference'] == pytest.approx(aucs['pred'] - aucs['pred_plain'])


def test_prob_is_pred_moved_by_one_constant_to_the_rate_of_melanomas(blended):
    rate = pd.read_csv(blended / 'folds.csv').target.mean()
    for folder in (run_of(blended), blended / 'report'):
        tables = [pd.read_csv(folder / name) for name in ('oof.csv', 'test.csv')]
        assert tables[0].prob.mean() == pytest.approx(rate)
        moved = np.concatenate([logit(table.prob) - logit(table.pred) for table in tables])
        assert np.ptp(moved) < 1e-6


def test_another_prior_moves_prob_and_predicts_nothing_again(copy, ok):
    run = run_of(copy)
    before = pd.read_csv(run / 'test.csv')
    out = ok('infer.py', '--home', copy, '--n_tta', 2, '--only', run.name, '--prior', 0.5)
    assert 'is finished' in out
    after = pd.read_csv(run / 'test.csv')
    assert (after.pred == before.pred).all() and (after.prob > before.prob).all()


def test_any_images_are_predicted_by_the_mean_of_the_runs(copy, demo, ok, refusal, tmp_path):
    folder, out = tmp_path / 'images', tmp_path / 'out.csv'
    (folder / 'deep').mkdir(parents=True)
    test = pd.read_csv(copy / 'runs' / 'twin' / 'test.csv').set_index('image_name')
    names = ['0.jpg', '1.jpg', '2.jpg', 'deep/3.jpg']
    for image, name in zip(test.index, names, strict=False):
        shutil.copy(demo / 'jpeg' / 'test' / f'{image}.jpg', folder / name)
    (folder / 'notes.txt').write_text('no image')
    shutil.rmtree(copy / 'cache')
    ask = ['infer.py', '--home', copy, '--out', out]
    out_text = ok(*ask, '--images', folder, '--n_tta', 2)
    assert 'no diagnosis' in out_text and out_text.count('has 2 trained folds') == 2
    with_tta = pd.read_csv(out)
    assert with_tta.columns.tolist() == ['image_name', 'pred', 'prob']
    assert with_tta.image_name.tolist() == names
    assert '--out' in refusal(*ask, '--images', folder)  # which is there
    assert (with_tta.prob < with_tta.pred).all()
    out.unlink()
    ok(*ask, '--images', folder, '--n_tta', 2, '--prior', 0.5)
    even = pd.read_csv(out)
    assert (even.prob > with_tta.prob).all() and (even.pred == with_tta.pred).all()
    out.unlink()
    ok(*ask, '--images', folder, '--n_tta', 0)
    without = pd.read_csv(out)
    out.unlink()
    plain = [pd.read_csv(p).pred_plain[:4] for p in copy.glob('runs/*/test.csv')]
    np.testing.assert_allclose(without.pred, np.mean(plain, axis=0), atol=1e-6)
    assert (without.pred != with_tta.pred).all() and without.prob.isna().all()  # at home: 2 passes
    ok(*ask, '--images', folder / '0.jpg', '--n_tta', 0)
    np.testing.assert_allclose(pd.read_csv(out).pred, without.pred[:1], atol=1e-6)
    assert not (copy / 'cache').exists()  # images that come once are not kept
    (folder / '1.jpg').write_bytes(b'no JPEG')
    out.unlink()
    assert '1.jpg: cannot' in ok(*ask, '--images', folder, '--n_tta', 0)
    partly = pd.read_csv(out)
    assert partly.image_name.tolist() == names and partly.pred.isna().tolist() == [0, 1, 0, 0]
    np.testing.assert_allclose(partly.pred.dropna(), without.pred.drop(1), atol=1e-6)


def test_what_is_finished_is_not_done_again_and_what_is_missing_is(copy, ok):
    run = run_of(copy)
    weights = {p: p.stat().st_mtime_ns for p in run.glob('fold*/model.safetensors')}
    # the same seed trains the same weights, so that the predictions stay finished
    paths = [*run.glob('fold*/tta_*.csv'), *run.glob('*.csv')]
    before = {p: (p.read_bytes(), p.parent == run or p.stat().st_mtime_ns) for p in paths}
    (run / 'fold1' / 'oof.csv').unlink()
    assert 'fold 0 is finished' in ok('train.py', '--home', copy, *TRAIN, '--fold', 0)
    out = ok('train.py', '--home', copy, *TRAIN)
    assert 'fold 1 epoch' in out and 'fold 0 epoch' not in out
    now = {p.parent.name: p.stat().st_mtime_ns != weights[p] for p in weights}
    assert now == {'fold0': False, 'fold1': True}
    assert 'tta' not in json.loads((run / 'scores.json').read_text())  # of the weights before
    assert ok('infer.py', '--home', copy, '--n_tta', 2).count('is finished') == 2
    assert before == {p: (p.read_bytes(), p.parent == run or p.stat().st_mtime_ns) for p in paths}
    scores = (run / 'scores.json').read_bytes()
    assert b'"tta"' in scores and 'is finished' in ok('train.py', '--home', copy, *TRAIN)
    assert (run / 'scores.json').read_bytes() == scores  # of infer.py


def test_predictions_are_made_anew_where_they_would_be_others(copy, ok):
    run = run_of(copy)
    infer = ['infer.py', '--home', copy, '--only', run.name]
    before = pd.read_csv(run / 'oof.csv')
    plain = ok(*infer, '--n_tta', 0)
    assert plain.count('0 augmented passes') == 4 and 'test-time augmentation' not in plain
    oof = pd.read_csv(run / 'oof.csv')
    assert (oof.pred == oof.pred_plain).all() and (oof.pred_plain == before.pred_plain).all()
    assert json.loads((run / 'fold0' / 'tta_oof.json').read_text())['n_tta'] == 0
    assert 'tta' not in json.loads((run / 'scores.json').read_text())
    shutil.copy(*(run / f'fold{k}' / 'model.safetensors' for k in (0, 1)))  # fold 1 is another
    again = ok(*infer, '--n_tta', 0)
    assert again.count('fold 1, ') == 2 and 'fold 0, ' not in again
    first, second = (pd.read_csv(run / f'fold{k}' / 'tta_test.csv').pred for k in (0, 1))
    assert (first == second).all() and (pd.read_csv(run / 'test.csv').pred == first).all()


def test_one_fold_alone_says_which_are_missing(copy, ok):
    out = ok('train.py', '--home', copy, *TRAIN, '--name', 'part', '--fold', 1)
    assert 'part: not trained yet: fold 0.' in out
    out = ok('infer.py', '--home', copy, '--n_tta', 2)
    assert 'passed over' in out and 'part: not trained yet: fold 0.' in out
    command = out.split('type: python ')[1].splitlines()[0].split()
    out = ok(*command)  # the command that is named makes what is missing
    assert 'fold 0 epoch' in out and 'out of fold' in out


def test_the_range_test_leaves_its_picture_alone(copy, ok, monkeypatch):
    """On a finished run too, and on a fold that another process has."""
    find = Learner.lr_find
    monkeypatch.setattr(Learner, 'lr_find', lambda *a, **o: find(*a, **o | {'num_it': 20}))
    before = contents(copy)
    twin = ['train.py', '--home', copy, *TRAIN, '--seed', 1, '--cutout', '--name', 'twin']
    with held_by_another(copy / 'runs' / 'twin' / 'fold1' / '.lock'):
        out = ok(*twin, '--lr_find', '--fold', 1)
    assert 'suggested: --lr_min' in out and 'first look at' in out
    after = contents(copy)
    assert after.keys() - before.keys() == {'runs/twin/fold1/lr_find.png'}
    assert before.items() <= after.items()


def test_an_unfinished_run_is_passed_over_by_a_blend_unless_a_weight_names_it(copy, ok, refusal):
    (copy / 'runs' / 'half').mkdir()
    shutil.copy(copy / 'runs' / 'twin' / 'config.json', copy / 'runs' / 'half')
    said = ok('blend.py', '--home', copy)
    assert 'passed over' in said and 'half: not trained yet: fold 0, 1.' in said
    assert 'mean of 2 run(s)' in said
    text = refusal('blend.py', '--home', copy, '--mix', 'twin=.5,half=.5')
    assert '--mix names a run that is not finished' in text
    assert 'no run is trained in all folds' in refusal('blend.py', '--home', copy, '--only', 'half')


def test_runs_without_out_of_fold_predictions_are_named(copy, ok):
    (copy / 'runs' / 'theirs').mkdir()
    shutil.copy(copy / 'runs' / 'twin' / 'test.csv', copy / 'runs' / 'theirs')
    said = ok('blend.py', '--home', copy, '--only', 'twin,theirs')
    assert 'no out-of-fold score and no prob: there is no oof.csv of theirs' in said


def test_the_demo_has_kaggles_layout_and_says_that_it_is_not_medical(ok, tmp_path, monkeypatch):
    monkeypatch.setattr('lib.demo.make', partial(make, n_train=120, n_test=12))  # of 800
    out = ok('folds.py', '--demo', cwd=tmp_path)
    home = tmp_path / 'data' / 'demo'
    assert 'not medical data' in out and 'not medical data' in (home / 'SYNTHETIC.txt').read_text()
    train, test = pd.read_csv(home / 'train.csv'), pd.read_csv(home / 'test.csv')
    assert 0.05 <= train.target.mean() <= 0.2 and 'target' not in test
    assert train.patient_id.nunique() < len(train) / 3
    assert not set(train.patient_id) & set(test.patient_id)
    assert train.age_approx.isna().any() and train.sex.isna().any()
    assert len(list((home / 'jpeg' / 'train').glob('*.jpg'))) == len(train)
    grey = [Image.open(home / 'jpeg' / 'train' / f'{n}.jpg').convert('L') for n in train.image_name]
    dark = [(pixels < 0.75 * np.quantile(pixels, 0.9)).mean() for pixels in map(np.asarray, grey)]
    assert roc_auc_score(train.target, dark) > 0.7  # melanomas are larger


# blend.py


def test_the_submission_is_the_mean_of_the_runs_in_the_samples_order(blended, demo):
    submission = pd.read_csv(blended / 'submission.csv')
    sample = pd.read_csv(demo / 'sample_submission.csv')
    assert submission.columns.tolist() == ['image_name', 'target']
    assert submission.image_name.tolist() == sample.image_name.tolist()
    tests = [pd.read_csv(p).set_index('image_name').pred for p in blended.glob('runs/*/test.csv')]
    assert len(tests) == 2
    np.testing.assert_allclose(submission.target, sum(tests).loc[submission.image_name] / 2)
    assert (submission.target == pd.read_csv(blended / 'report' / 'test.csv').pred).all()


def test_the_blends_auc_is_scikit_learns(blended):
    one, twin = (pd.read_csv(p) for p in sorted(blended.glob('runs/*/oof.csv')))
    both = (one.pred + twin.set_index('image_name').pred[one.image_name].to_numpy()) / 2
    printed = (blended / '4.log').read_text()
    assert f' {roc_auc_score(one.target, both):.4f} [' in printed
    assert 'the shortcut floor' in printed and 'Brier' in printed
