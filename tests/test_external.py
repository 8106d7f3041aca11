"""A test on somebody else's images: nothing is fitted to them, and each figure can be had again."""

import json
import shutil
from unittest import mock

import numpy as np
import pandas as pd
import pytest
from conftest import oof
from PIL import Image
from sklearn.metrics import average_precision_score, brier_score_loss, roc_auc_score

from lib import external, score, tables, thresholds
from lib.cli import Stop
from lib.demo import draw

ASK = ['infer.py', '--n_tta', 2]


@pytest.fixture(scope='module')
def outside(tmp_path_factory):
    """40 images from elsewhere in two folders, and a table of them in the words of PAD-UFES-20."""
    folder, rng = tmp_path_factory.mktemp('outside'), np.random.default_rng(9)
    rows = []
    for i in range(40):
        name, target = f'{"deep/" * (i % 2)}PAT_{i}.png', int(i % 5 < 2)
        path = folder / 'images' / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(draw(rng, target)).save(path)
        rows.append([name, f'P{i // 2}', 30 + i, 'MALE' if i % 3 else 'FEMALE', float(i % 6 + 1)])
        rows[-1] += ['FACE', 'MEL' if target else 'NEV' if i % 3 else 'SEK']
    columns = ['img_id', 'patient_id', 'age', 'gender', 'fitspatrick', 'region', 'diagnostic']
    pd.DataFrame(rows, columns=columns).to_csv(folder / 'metadata.csv', index=False)
    return folder


@pytest.fixture(scope='module')
def scored(home, outside, ok, tmp_path_factory):
    """What is printed, the CSV, the JSON and the page of `outside`, with two images that the runs
    have seen: one by its name, one by its pixels; and one label without an image."""
    here = tmp_path_factory.mktemp('scored')
    folder = shutil.copytree(outside / 'images', here / 'images')
    seen = pd.read_csv(home / 'folds.csv').query("split == 'train'")
    paths = [home / path for path in seen.path]
    Image.new('RGB', (80, 70)).save(folder / f'{seen.image_name[0]}_downsampled.png')
    shutil.copy(paths[1], folder / 'renamed.jpg')
    shutil.copy(paths[2], folder / 'unlabelled.jpg')
    table = pd.read_csv(outside / 'metadata.csv')
    for name in (f'{seen.image_name[0]}_downsampled', 'renamed.jpg', 'nowhere.png'):
        table.loc[len(table)] = [name, 'Q', 50, 'MALE', 2, 'FACE', 'MEL']
    table.to_csv(here / 'labels.csv', index=False)
    words = ['--target', 'diagnostic', '--positive', 'MEL', '--negative', 'NEV,SEK']
    with mock.patch.object(external, 'ISIC_ID', r'DEMO_\d+'):  # as the demo's images are named
        said = ok(*ASK, '--home', home, '--images', folder, '--out', here / 'out.csv', '--labels',
                  here / 'labels.csv', *words)  # fmt: skip
    saved, page = json.loads((here / 'out.json').read_text()), (here / 'out.html').read_text()
    return said, pd.read_csv(here / 'out.csv'), saved, page


def test_what_the_runs_have_seen_is_left_out_and_what_does_not_fit_is_counted(scored, home):
    said, predicted, saved, _ = scored
    first = pd.read_csv(home / 'folds.csv').image_name[0]
    assert saved['left_out'] == [f'{first}_downsampled', 'renamed'] and len(predicted) == 43
    assert '2 images that the runs were trained on are left out; 1 labels are without' in said
    assert '1 images are without a label' in said and 'not in the cache' not in said
    (auc,) = (row for row in saved['scores'] if row['measure'] == 'auc')
    assert (auc['images'], auc['malignant']) == (40, 16)
    assert 'over 20 patients' in said and '16 malignant, 20 patients' in scored[3]


@pytest.fixture(scope='module')
def rows(scored, outside):
    """The outside images with target, pred and prob, joined by hand."""
    table = pd.read_csv(outside / 'metadata.csv').merge(
        scored[1], left_on='img_id', right_on='image_name'
    )
    return table.assign(target=(table.diagnostic == 'MEL').astype(int))


def test_the_figures_are_those_of_scikit_learn(scored, rows):
    saved = scored[2]
    figures = {row['measure']: row['value'] for row in saved['scores']}
    assert figures['auc'] == pytest.approx(roc_auc_score(rows.target, rows.pred))
    precision = average_precision_score(rows.target, rows.pred)
    assert figures['average_precision'] == pytest.approx(precision)
    quality = {row['index']: row['brier'] for row in saved['quality']}
    assert quality['pred'] == pytest.approx(brier_score_loss(rows.target, rows.pred))
    assert quality['prob'] == pytest.approx(brier_score_loss(rows.target, rows.prob))
    assert f'external AUC {figures["auc"]:.4f} [' in scored[0]


def test_thresholds_prob_and_the_auc_to_compare_with_are_those_of_the_runs_mean(scored, rows, home):
    one, twin = (
        pd.read_csv(p).set_index('image_name') for p in sorted(home.glob('runs/*/oof.csv'))
    )
    pred, saved = (one.pred + twin.pred[one.index]) / 2, scored[2]
    at_home = roc_auc_score(one.target, pred)
    assert saved['out_of_fold']['value'] == pytest.approx(at_home)
    auc = roc_auc_score(rows.target, rows.pred)
    assert saved['difference']['value'] == pytest.approx(auc - at_home)
    for row in saved['thresholds']:
        malignant = np.sort(pred[one.target == 1])
        k = len(malignant) - int(np.ceil(row['wanted'] * len(malignant) - 1e-9))
        assert row['pred'] == pytest.approx(malignant[k])
        assert row['sensitivity'] == (rows.pred[rows.target == 1] >= row['pred']).mean()
        assert row['specificity'] == (rows.pred[rows.target == 0] < row['pred']).mean()
        low, high = row['sensitivity_low'], row['sensitivity_high']
        assert low is None or low <= row['sensitivity'] <= high
    # one constant on the logit, fitted at home
    moved = np.log(rows.prob / (1 - rows.prob)) - np.log(rows.pred / (1 - rows.pred))
    assert np.ptp(moved) < 1e-6
    fitted = 1 / (1 + np.exp(-np.log(pred / (1 - pred)) - moved[0]))
    assert fitted.mean() == pytest.approx(one.target.mean())


def test_the_page_says_external_and_calls_none_of_its_scores_out_of_fold(scored):
    said, page = scored[0], scored[3]
    assert '<h1>External images' in page and 'skin tone: 2' in page and 'sex: female' in page
    assert 'site: head/neck' in page
    assert '<div>AUC<b>' in page and '<div>AUC minus the out-of-fold AUC<b>' in page
    assert 'shortcut' not in page + said
    assert page.count('data:image/png') == 4 and 'AUC by subgroup' in page
    assert '95 % sensitivity wanted' in page and '--labels' in page


def test_without_predictions_at_home_of_as_many_passes_the_command_is_named(
    home, outside, ok, refusal, tmp_path
):
    ask = ['infer.py', '--home', home, '--images', outside / 'images' / 'deep', '--out']
    labels = ['--n_tta', 1, '--labels', outside / 'metadata.csv', '--target', 'fitspatrick']
    labels += ['--positive', '1.0,2.0', '--negative', '3.0']
    text = refusal(*ask, tmp_path / 'out.csv', *labels)
    assert 'no out-of-fold predictions of 1 passes' in text and '--n_tta 1' in text
    assert not list(tmp_path.iterdir())
    (tmp_path / 'names.csv').write_text('image_name,target\nelsewhere,1\nnowhere,0\n')
    text = refusal(*ask, tmp_path / 'out.csv', '--n_tta', 2, '--labels', tmp_path / 'names.csv')
    assert 'has a label in' in text and 'compare the names' in text
    assert not (tmp_path / 'out.csv').exists()  # told before the work
    said = ok(*ask, tmp_path / 'out.csv', '--n_tta', 0, '--only', 'twin')
    assert 'prob is empty, since ' in said and '--only twin --n_tta 0' in said
    assert pd.read_csv(tmp_path / 'out.csv').prob.isna().all()


def labels_of(tmp_path, text, **flags) -> pd.DataFrame:
    (tmp_path / 'labels.csv').write_text(text)
    return external.read_labels(tmp_path / 'labels.csv', tables.Labels(**flags))


def test_labels_are_read_in_the_words_of_others(tmp_path):
    text = (
        'DDI_file,skin_tone,malignant,disease\n000001.png,56,True,melanoma\n000002.png,12,False,x\n'
    )
    rows = labels_of(tmp_path, text, target='malignant')
    assert rows.image_name.tolist() == ['000001', '000002'] and rows.target.tolist() == [1, 0]
    assert rows.skin_tone.tolist() == ['56', '12'] and rows.group.tolist() == ['000001', '000002']
    text = 'isic_id,lesion_id,target\nISIC_1,L,1\nISIC_2,L,0\n'
    assert labels_of(tmp_path, text).group.tolist() == ['L', 'L']


def test_names_are_matched_by_path_then_by_their_end_and_only_once(tmp_path):
    names = ['a/1.png', 'b/1.png', 'c/2.JPG', '3.jpg', 'd/3.jpg']
    table = pd.DataFrame({'image_name': names, 'path': names})
    labels = labels_of(tmp_path, 'image_name,target\na/1.jpg,1\n2,0\n3.jpg,1\nd/3,0\nx/2,1\n')
    rows = external.join_labels(table, labels)
    assert rows.set_index('file').image.to_dict() == {'a/1': 0, '2': 2, '3': 3, 'd/3': 4}
    for text, says in (('1.jpg,1', 'a/1.png and b/1.png'), ('a/1,1\n1,0', 'b/1.png')):
        labels = labels_of(tmp_path, f'image_name,target\n{text}\n')
        if text.startswith('1'):
            with pytest.raises(Stop, match=f'1 is the name of several images, {says}'):
                external.join_labels(table, labels)
        else:  # what is left of the name is one image
            rows = external.join_labels(table, labels)
            assert rows.set_index('file').image.to_dict() == {'a/1': 0, '1': 1}
    labels = labels_of(tmp_path, 'image_name,target\nc/2,1\n2,0\n')
    assert external.join_labels(table, labels).file.tolist() == ['c/2']  # never two of an image


def test_what_is_known_of_patients_and_of_a_missing_cache_is_said(home, outside, ok, tmp_path):
    alone = tmp_path / 'home'
    shutil.copytree(home / 'runs' / 'twin', alone / 'runs' / 'twin')
    table = pd.read_csv(outside / 'metadata.csv')
    folds = pd.read_csv(home / 'folds.csv')
    table['patient_id'] = [folds.patient_id[0], *[None] * 39]
    table.assign(target=(table.diagnostic == 'MEL').astype(int)).to_csv(tmp_path / 'labels.csv')
    said = ok(*ASK, '--home', alone, '--images', outside / 'images', '--out', tmp_path / 'o.csv',
              '--labels', tmp_path / 'labels.csv')  # fmt: skip
    assert '1 images are of a patient_id of the training images' in said
    assert '60 images of the training are not in the cache, so a copy of one is not found' in said
    assert 'over 40 images (if some are of one patient, the interval is too narrow)' in said


def test_an_interval_at_a_threshold_is_by_patient_and_of_one_class_there_is_none():
    rows = oof(n=300, groups=30)
    at = pd.DataFrame({'wanted': [0.8, 0.9], 'pred': [0.4, 0.3], 'prob': [0.1, 0.05]})
    narrow = thresholds.measure_thresholds(rows.assign(group=rows.index.astype(str)), at)
    four = pd.concat([rows] * 4, ignore_index=True)  # images of each
    wide = thresholds.measure_thresholds(four, at)
    assert (wide.sensitivity == narrow.sensitivity).all()
    width = [of.sensitivity_high - of.sensitivity_low for of in (wide, narrow)]
    assert (width[0] > 0.6 * width[1]).all()  # by image they would be half as wide
    benign = thresholds.measure_thresholds(rows[rows.target == 0], at)
    assert benign.sensitivity.isna().all() and benign.specificity.notna().all()


def test_the_difference_of_two_aucs_holds_its_truth_and_is_no_more_certain_than_they_are():
    one, other = (score.measure(oof(seed=seed)).loc['auc'] for seed in (1, 2))
    difference, low, high = external.compare_aucs(one, other)
    assert difference == one.value - other.value and low < difference < high
    assert high - low > max(one.high - one.low, other.high - other.low)
    assert external.compare_aucs(other, one) == pytest.approx((-difference, -high, -low))
    few = one.copy()
    few[['low', 'high']] = np.nan
    assert np.isnan(external.compare_aucs(few, other)[1:]).all()
