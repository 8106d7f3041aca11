"""Images from elsewhere: predicted by all runs together, and scored where their labels are known.

Nothing is fitted to them. Thresholds, probabilities and the AUC to compare with are those of the
mean of the same runs' out-of-fold predictions, of as many TTA passes.
"""

import shlex
import sys
import tempfile
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from lib import (
    calibration,
    figures,
    files,
    images,
    parts,
    predictions,
    report,
    score,
    splits,
    summary,
    tables,
)
from lib.archives import ISIC_ID
from lib.calibration import Calibration
from lib.cli import Stop
from lib.runs import Run
from lib.score import format_estimate
from lib.thresholds import measure_thresholds, name_wanted

Predict = Callable[[parts.Part], tuple[np.ndarray, ...]]


def predict_and_score(
    runs: list[Run],
    folder: Path,
    out: Path,
    n_tta: int,
    prior: float | None,
    predict: Predict,
    path: str | None,
    labels: tables.Labels,
) -> None:
    """Write the CSV `out` for the images of `folder`; with a table of labels at `path` also a JSON
    and a page beside it. `predict`: of a part, the mean of `n_tta` passes first. Raises: Stop where
    a run is not trained, or where the labels do not fit the images."""
    if not (runs := [run for run in runs if run.trained_folds]):
        raise Stop('no run has a trained fold yet; type the train.py command again')
    table, seen = images.list_images(folder), set()
    try:
        oof, seen, leaks = read_mean_oof(runs, n_tta)
        fitted = calibration.calibrate(oof, prior)
    except Stop as why:
        fitted = calibration.no_probabilities(pd.DataFrame({'pred': []}), str(why))
    if path:  # all that may be wrong is told before the work
        if fitted.thresholds.empty:
            raise Stop(f'the runs have no thresholds to score by: {fitted.sentence}')
        for end in ('.json', '.html'):
            if out.with_suffix(end).exists():
                raise Stop(f'{out.with_suffix(end)} is there; take another --out')
        labelled = read_labels(Path(path), labels)
        if (joined := join_labels(table, labelled)).empty:
            raise Stop(f'no image of {folder} has a label in {path}; compare the names in both')
    table, n_absent = predict_images(table, runs, seen if path else set(), predict)
    table['prob'] = fitted.curve(table.pred.to_numpy())
    files.write_csv(out, table[['image_name', 'pred', 'prob']])
    print(f'{fitted.sentence}\n{out}: {len(table)} images. This is no diagnosis')
    if not path:
        return
    rows = joined.join(table[['pred', 'prob', 'is_known']], on='image').dropna(subset='pred')
    if rows.empty:
        raise Stop(f'no image of {folder} that has a label in {path} can be read')
    ids = rows.file.str.split('/').str[-1].str.removesuffix('_downsampled')
    is_known = rows.is_known | (ids.isin(seen) & ids.str.fullmatch(ISIC_ID))
    if is_known.all():
        raise Stop(f'the runs were trained on every image of {folder} that has a label in {path}')
    n_patients = rows.patient_id[~is_known].isin(oof.patient_id.dropna()).sum()
    counts = [
        f'{is_known.sum()} images that the runs were trained on are left out',
        f'{len(labelled) - len(rows)} labels are without an image that can be read',
        f'{len(table) - len(joined)} images are without a label',
        f'{n_patients} images are of a patient_id of the training images' if n_patients else '',
        f'{n_absent} images of the training are not in the cache, so a copy of one is not found'
        if n_absent
        else '',
    ]
    print(said := '; '.join(filter(None, counts)))
    own, population = calibration.evaluation_rows(oof)
    about = {'folder': str(folder), 'labels': path, 'counts': report.sentence(said)}
    about |= {'leaks': leaks, 'population': population, 'left_out': list(rows.file[is_known])}
    shifted = 'prob is pred with the constant that was fitted out of fold'
    about['probabilities'] = f'{shifted}, for a rate of malignant images of {fitted.prior:.4g}.'
    write_report(out, [r.name for r in runs], rows[~is_known], fitted, oof[own], about)


def predict_images(
    table: pd.DataFrame, runs: Sequence[Run], seen: Collection[str], predict: Predict
) -> tuple[pd.DataFrame, int]:
    """The rows of `images.list_images` with `pred`, the mean of the runs, each the mean of its
    folds, and `is_known`: whether the cached square of one that was `seen` in training has the same
    bytes. Images that cannot be read have NaN. And how many of `seen` are not in a cache."""
    preds, n_absent = [], 0
    numbered = table.assign(image_name=table.index.astype(str))  # names may be too long for a file
    table = table.assign(is_known=False)
    for run in runs:
        run.warn_of_code()
        print(f'{run} has {len(run.trained_folds)} trained folds')
        of_run = [parts.Part(run, k, 'other', numbered) for k in run.trained_folds]
        with tempfile.TemporaryDirectory() as place:
            of_run = parts.cache_images(of_run, Path(place))
            pred = np.mean([predict(part)[0] for part in of_run], axis=0)
            readable = of_run[0].readable
            cached = (run.home / 'cache' / str(run.config['size'])).rglob('*.jpg')
            trained = [p for p in cached if p.stem.removesuffix('_downsampled') in seen]
            is_twin = find_twins(list(readable.cached), trained)
            table.loc[readable.index[is_twin], 'is_known'] = True
        n_absent = max(n_absent, len(seen) - len(trained))
        preds.append(pd.Series(pred, readable.index))
    return table.assign(pred=pd.concat(preds, axis=1).mean(axis=1)), n_absent


def find_twins(paths: Sequence[Path], others: Sequence[Path]) -> np.ndarray:
    """Which of the files `paths` have the same bytes as one of `others`, (n,)."""
    sizes = {path.stat().st_size for path in paths}
    known = {files.sha256(path) for path in others if path.stat().st_size in sizes}
    if not known:
        return np.zeros(len(paths), dtype=bool)
    return np.array([files.sha256(path) in known for path in paths], dtype=bool)


def read_mean_oof(runs: Sequence[Run], n_tta: int) -> tuple[pd.DataFrame, set[str], str]:
    """The mean of the runs' out-of-fold predictions, as `pred` beside what is known of the images;
    the names of all images that a run has seen; and a sentence where folds split patients.

    Raises: Stop with the command where a run has none of `n_tta` passes by its weights of today.
    """
    for run in runs:
        path = run.folder / 'oof.json'
        record = files.read_json(path) if path.exists() else {}
        weights = [files.sha256(run.weights(k)) for k in run.trained_folds]
        if (record.get('n_tta'), record.get('weights_sha256')) != (n_tta, weights):
            words = ['python', 'infer.py', '--home', run.home, '--only', run.name, '--n_tta', n_tta]
            raise Stop(
                f'{run} has no out-of-fold predictions of {n_tta} passes by its weights of today; '
                f'make them, or leave the run out by --only: {shlex.join(map(str, words))}'
            )
    oofs = predictions.read_oofs(runs, None)
    names = pd.concat([pd.read_csv(run.folder / 'oof.csv', dtype=str).image_name for run in runs])
    seen = set(names.str.removesuffix('_downsampled'))
    return oofs.rows.assign(pred=oofs.preds.mean(axis=1)), seen, ' '.join(oofs.leaks)


def read_labels(path: Path, labels: tables.Labels) -> pd.DataFrame:
    """A table of labelled images of anybody, by the reader of folds.csv: its columns less path and
    fold, with `group`. `file` is the name as it stands there. Raises: Stop."""
    rows = tables.parse_target(tables.read_csv(path, ['image_name']), path, labels)
    rows = rows.assign(file=rows.image_name, split='train', source='external')
    rows['image_name'] = rows.image_name.str.replace('/', '_')
    columns = [*tables.COLUMNS, 'lesion_id', 'file']
    rows = tables.parse_columns(rows.reindex(columns=columns).astype({'lesion_id': object}))
    rows = rows.astype({'target': int}).assign(group=splits.join_groups(rows))
    splits.warn_of_groups(rows, rows.group)
    return rows


def join_labels(table: pd.DataFrame, rows: pd.DataFrame) -> pd.DataFrame:
    """`rows` of `read_labels` with `image`, the index in `table` of their image: of the same path,
    else of the same name at its end. Those without an image are left out.

    Raises: Stop where a name is that of two images.
    """
    paths = table.image_name.map(tables.plain_name)
    ends = paths.str.split('/').str[-1]
    left = ~paths.isin(rows.file) & ~ends.isin(rows.file[rows.file.isin(paths)])
    names = pd.concat([paths[paths.isin(rows.file)], ends[left & ends.isin(rows.file)]])
    if len(twice := names[names.duplicated(keep=False)]):
        both = ' and '.join(table.image_name[twice[twice == twice.iloc[0]].index])
        raise Stop(
            f'{twice.iloc[0]} is the name of several images, {both}; label them by their paths'
        )
    rows = rows.drop(columns='path')
    return rows.merge(pd.DataFrame({'file': names, 'image': names.index}), on='file')


def compare_aucs(one: pd.Series, other: pd.Series) -> tuple[float, float, float]:
    """The difference of two AUCs of different images, rows of `score.measure`, and its 95 %
    interval from both of theirs; NaN where one has none.

    In simulations of equal true AUCs (150 pairs of 80 images with 8 malignant ones and 600 with
    100) it holds 0 in 95 to 98 %, and one from the spread of both AUCs' draws in 81 to 88 %.
    Source: Zou and Donner 2008, Statistics in Medicine 27 (square-and-add, MOVER).
    """
    difference = one.value - other.value
    below = np.hypot(one.value - one.low, other.high - other.value)
    above = np.hypot(one.high - one.value, other.value - other.low)
    return difference, difference - below, difference + above


def write_report(
    out: Path,
    names: list[str],
    rows: pd.DataFrame,
    fitted: Calibration,
    oof: pd.DataFrame,
    about: dict[str, Any],
) -> None:
    """Print the scores of `rows` (read_labels, pred, prob), and write them to a JSON and a page
    beside `out`. `oof`: the rows of `read_mean_oof` that `fitted` is judged on; `about`: what else
    the page says."""
    unit = summary.resampling_unit(rows)
    scores = summary.label_rows(score.measure(rows), 'main')
    auc, own_auc = scores.loc['auc'], score.measure(oof).loc['auc']
    apart = pd.Series(compare_aucs(auc, own_auc), ['value', 'low', 'high'], dtype=object)
    thresholds = measure_thresholds(rows, fitted.thresholds)
    common = thresholds.pred[thresholds.wanted == summary.SENSITIVITY].iloc[0]
    subgroups = summary.measure_subgroups(rows, at=common)
    target, ones = rows.target.to_numpy(), np.ones(len(rows))
    probs = {'pred': rows.pred.to_numpy(), 'prob': rows.prob.to_numpy()}
    quality = {k: calibration.measure_quality(target, p, ones) for k, p in probs.items()}
    quality = pd.DataFrame(quality, dtype=float).T

    texts = [format_estimate(*row[['value', 'low', 'high']]) for row in (auc, own_auc)]
    own = f'{texts[1]} on {len(oof):,} images, {oof.target.sum()} malignant'
    table = pd.DataFrame(index=name_wanted(thresholds))
    for name in ('sensitivity', 'specificity'):
        columns = thresholds[[name, f'{name}_low', f'{name}_high']].itertuples(index=False)
        table[name] = [format_estimate(*shares, '.3f') for shares in columns]
    table['pred at least'] = [f'{pred:.4g}' for pred in thresholds.pred]
    tables_of = {'figures': pd.DataFrame({'external': summary.format_rows(scores)}, scores.label)}
    tables_of |= {'thresholds': table, 'subgroups': summary.tabulate_subgroups(subgroups)}
    tables_of['quality'] = calibration.tabulate_quality(quality)
    print(f'external AUC {texts[0]} [95 % interval over {unit}]' + (auc.note and f': {auc.note}'))
    print(f'minus the out-of-fold AUC, {own}: {format_estimate(*apart, "+.4f")}')
    for name in ('thresholds', 'quality'):
        print(summary.format_table(tables_of[name]))

    page = about | tables_of | {'names': names, 'unit': unit, 'prior': f'{fitted.prior:.4g}'}
    apart['note'] = f'out of fold {own}'
    difference = report.figure('AUC minus the out-of-fold AUC', apart)
    page['headline'] = [report.figure('AUC', auc), difference, report.count_images(rows)]
    bins = {name: calibration.reliability(target, p, ones) for name, p in probs.items()}
    forest = pd.concat([scores.replace({'label': {'AUC': summary.POOLED}}), subgroups])
    bins = pd.concat(bins, names=['name']).reset_index('name')
    page['pictures'] = figures.draw_predictions(rows, forest, bins)
    page['command'] = shlex.join(['python', *sys.argv])
    files.write_text(out.with_suffix('.html'), report.render('external.html', page))
    record = about | {'runs': names, 'command': page['command'], 'scores': scores}
    record |= {'out_of_fold': dict(own_auc), 'difference': dict(apart)}
    record |= {'thresholds': thresholds, 'quality': quality, 'subgroups': subgroups}
    files.write_json(out.with_suffix('.json'), record)
    print(f'{out.with_suffix(".html")}: the page; {out.with_suffix(".json")}: its figures')
