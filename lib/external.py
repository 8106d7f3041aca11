"""Images from elsewhere: predicted by all runs together, and scored where their labels are known.

Nothing is fitted to them. Thresholds, probabilities and the AUC to compare with are those of the
mean of the same runs' out-of-fold predictions, of as many TTA passes: "at home".
"""

import shlex
import sys
import tempfile
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy.stats import t

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
from lib.calibration import Calibration
from lib.cli import Stop
from lib.runs import Run
from lib.score import format_estimate

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
    and a page beside it. `predict`: of a part, the mean of `n_tta` passes first. Raises: Stop."""
    seen: set[str] = set()
    try:
        home, seen, leaks = read_home(runs, n_tta)
        fitted = calibration.calibrate(home, prior)
    except Stop as why:
        fitted = calibration.no_probabilities(pd.DataFrame({'pred': []}), str(why))
    labelled = read_labels(Path(path), labels) if path else None
    if path and fitted.thresholds.empty:
        raise Stop(f'there are no thresholds and no prob at home: {fitted.sentence}')
    table = predict_images(runs, folder, seen, predict)
    table['prob'] = fitted.curve(table.pred.to_numpy())
    files.write_csv(out, table[['image_name', 'pred', 'prob']])
    print(f'prob: {fitted.sentence}\n{out}: {len(table)} images. This is no diagnosis')
    if labelled is None:
        return
    rows = join_labels(table.dropna(subset='pred'), labelled)
    ids = rows.file.str.split('/').str[-1].str.removesuffix('_downsampled')
    is_known = rows.is_known | ids.isin(seen)
    if is_known.all():
        raise Stop(f'no image of {folder} has a label in {path} and is new to the runs')
    counts = [f'{is_known.sum()} images that the runs were trained on are left out']
    counts += [f'{len(labelled) - len(rows)} labels are without an image']
    counts += [f'{len(table) - len(rows)} images without a label or not readable']
    print(counts := '; '.join(counts))
    own, population = calibration.evaluation_rows(home)
    about = {'folder': str(folder), 'labels': path, 'counts': report.sentence(counts)}
    about |= {'leaks': leaks, 'population': population, 'left_out': list(rows.file[is_known])}
    about['probabilities'] = f'prob is pred, moved as at home to a rate of {fitted.prior:.4g}.'
    write_report(out, [r.name for r in runs], rows[~is_known], fitted, home[own], about)


def predict_images(
    runs: Sequence[Run], folder: Path, seen: Collection[str], predict: Predict
) -> pd.DataFrame:
    """The images of `folder`, by `images.list_images`, with `pred`, the mean of the runs, each the
    mean of its folds, and `is_known`: whether the cached square of one that was `seen` in training
    has the same bytes.

    Rows that cannot be read have NaN. Raises: Stop where no run has a trained fold.
    """
    if not (runs := [run for run in runs if run.trained_folds]):
        raise Stop('no run has a trained fold yet; type the train.py command again')
    table = images.list_images(folder).assign(is_known=False)
    preds = []
    for run in runs:
        run.warn_of_code()
        print(f'{run} has {len(run.trained_folds)} trained folds')
        of_run = [parts.Part(run, k, 'other', table) for k in run.trained_folds]
        with tempfile.TemporaryDirectory() as home:
            of_run = parts.cache_images(of_run, Path(home))
            pred = np.mean([predict(part)[0] for part in of_run], axis=0)
            readable = of_run[0].readable
            cached = (run.home / 'cache' / str(run.config['size'])).rglob('*.jpg')
            trained = [path for path in cached if path.stem.removesuffix('_downsampled') in seen]
            is_twin = find_twins(list(readable.cached), trained)
            table.loc[readable.index[is_twin], 'is_known'] = True
        preds.append(pd.Series(pred, readable.index))
    return table.assign(pred=pd.concat(preds, axis=1).mean(axis=1))


def find_twins(paths: Sequence[Path], others: Sequence[Path]) -> np.ndarray:
    """Which of the files `paths` have the same bytes as one of `others`, (n,)."""
    sizes = {path.stat().st_size for path in paths}
    known = {path.read_bytes() for path in others if path.stat().st_size in sizes}
    return np.array([path.read_bytes() in known for path in paths], dtype=bool)


def read_home(runs: Sequence[Run], n_tta: int) -> tuple[pd.DataFrame, set[str], str]:
    """The mean of the runs' out-of-fold predictions, as `pred` beside what is known of the images;
    the ISIC ids of all images that a run has seen; and a sentence where folds split patients.

    Raises: Stop with the command where a run has none of `n_tta` passes by its weights of today.
    """
    for run in runs:
        path = run.folder / 'oof.json'
        record = files.read_json(path) if path.exists() else {}
        weights = [files.sha256(run.weights(k)) for k in run.trained_folds]
        if (record.get('n_tta'), record.get('weights_sha256')) != (n_tta, weights):
            words = ['python', 'infer.py', '--home', run.home, '--only', run.name, '--n_tta', n_tta]
            raise Stop(
                f'{run} has no out-of-fold predictions of {n_tta} passes by its weights of today, '
                f'which are needed here: {shlex.join(map(str, words))}'
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
    rows = tables.parse_columns(rows.reindex(columns=columns).astype({'lesion_id': 'str'}))
    return rows.astype({'target': int}).assign(group=splits.join_groups(rows))


def join_labels(table: pd.DataFrame, rows: pd.DataFrame) -> pd.DataFrame:
    """`rows` of `read_labels` with the predictions of `table`, matched by name or by the end of the
    path; those without an image are left out. Raises: Stop where a name is that of two images."""
    names = table.image_name.map(tables.plain_name)
    ends = pd.concat([names, names[names.str.contains('/')].str.split('/').str[-1]])
    table = table.drop(columns='image_name').loc[ends.index].assign(file=ends.to_numpy())
    table = table[table.file.isin(rows.file)]
    if (twice := table.file.duplicated()).any():
        raise Stop(
            f'{table.file[twice].iloc[0]} is the name of two images; label them by their paths'
        )
    return rows.drop(columns='path').merge(table.drop(columns='source'), on='file')


def measure_thresholds(rows: pd.DataFrame, at: pd.DataFrame) -> pd.DataFrame:
    """Sensitivity and specificity of `rows` (pred, target, group) at thresholds that were chosen
    elsewhere, `at` (wanted, pred, prob): a row each, with intervals over draws of whole groups."""
    target, hit = rows.target.to_numpy(), rows.pred.to_numpy() >= at.pred.to_numpy()[:, None]
    code, weights = score.resample(rows.group, score.N_DRAWS, seed=0)
    weights, table = np.array(list(weights)), at[['wanted', 'pred', 'prob']].copy()
    n = weights.shape[1]  # groups
    for name, own, right in (('sensitivity', target == 1, hit), ('specificity', target == 0, ~hit)):
        table[[name, low := f'{name}_low', high := f'{name}_high']] = np.nan
        if not own.any():
            continue
        of_group = np.array([np.bincount(code[own & of], minlength=n) for of in right])
        with np.errstate(invalid='ignore'):  # a draw may have none of the class
            draws = weights @ of_group.T / (weights @ np.bincount(code[own], minlength=n))[:, None]
        table[name] = right[:, own].mean(axis=1)
        if (n_own := len(np.unique(code[own]))) > 1:
            pairs, half = zip(table[name], draws.T, strict=True), 0.5 / own.sum()
            table[[low, high]] = [score.logit_interval(*pair, n_own, half) for pair in pairs]
    return table


def compare_aucs(rows: pd.DataFrame, home: pd.DataFrame) -> tuple[float, float, float]:
    """The AUC of `rows` less that of other images, `home`, and its 95 % interval: by Student's t on
    the standard deviations of both, over draws of whole groups."""
    both = [score.auc(of.target, of.pred) for of in (rows, home)]
    draws = [score.bootstrap(of.target, [of.pred], of.group)[:, 0, 0] for of in (rows, home)]
    n_groups = min(of.group[of.target == 1].nunique() for of in (rows, home))
    width = np.nan
    if n_groups > 1 and not any(np.isnan(of).mean() > 0.5 for of in draws):
        width = np.hypot(*(np.nanstd(of) for of in draws)) * t.ppf(0.975, n_groups - 1)
    difference = both[0] - both[1]
    return difference, difference - width, difference + width


def write_report(
    out: Path,
    names: list[str],
    rows: pd.DataFrame,
    fitted: Calibration,
    home: pd.DataFrame,
    about: dict[str, Any],
) -> None:
    """Print the scores of `rows` (read_labels, pred, prob), and write them to a JSON and a page
    beside `out`. `home`: the rows of `read_home` that `fitted` is judged on; `about`: sentences."""
    known = next((k for k in ('patient', 'lesion') if rows[f'{k}_id'].notna().any()), 'image')
    unit = f'{rows.group.nunique():,} {known}s' + (' (no patient is known)' * (known == 'image'))
    scores = summary.label_rows(score.measure(rows), 'main')
    auc, at_home = scores.loc['auc'], score.measure(home).loc['auc']
    difference = pd.Series(compare_aucs(rows, home), ['value', 'low', 'high'], dtype=object)
    subgroups = summary.measure_subgroups(rows)
    thresholds = measure_thresholds(rows, fitted.thresholds)
    target, ones = rows.target.to_numpy(), np.ones(len(rows))
    probs = {'before': rows.pred.to_numpy(), 'after': rows.prob.to_numpy()}
    quality = {k: calibration.measure_quality(target, p, ones) for k, p in probs.items()}
    quality = pd.DataFrame(quality, dtype=float).T

    texts = [format_estimate(*row[['value', 'low', 'high']]) for row in (auc, at_home)]
    apart = format_estimate(*difference, '+.4f')
    size = f'on {len(home):,} images, {home.target.sum()} malignant'
    wanted = (100 * thresholds.wanted).map('wanted at home: {:.0f} %'.format)
    table = pd.DataFrame(index=list(wanted))
    for name in ('sensitivity', 'specificity'):
        columns = thresholds[[name, f'{name}_low', f'{name}_high']].itertuples(index=False)
        table[name] = [format_estimate(*figures, '.3f') for figures in columns]
    table['pred from'] = [f'{pred:.4g}' for pred in thresholds.pred]
    tables_of = {'figures': pd.DataFrame({'external': summary.format_rows(scores)}, scores.label)}
    of_quality = calibration.tabulate_quality(Calibration(ones, None, '', quality=quality))
    tables_of |= {'thresholds': table, 'subgroups': summary.tabulate_subgroups(subgroups)}
    tables_of |= {'quality': of_quality.rename({'before': 'pred', 'after': 'prob, as shipped'})}
    print(f'external AUC {texts[0]} [95 % interval over {unit}]' + (auc.note and f': {auc.note}'))
    print(f'less the AUC at home: {apart}; at home {texts[1]}, {size}')
    for name in ('thresholds', 'quality'):
        print(summary.format_table(tables_of[name]))

    page = about | tables_of | {'names': names, 'unit': unit, 'prior': f'{fitted.prior:.4g}'}
    page |= {'few_note': report.sentence(summary.FEW_NOTE)}
    difference['note'] = f'at home {texts[1]}, {size}'
    malignant = f'images, {auc.malignant} malignant, {unit}'
    page['headline'] = [report.figure('AUC', auc), ('scored on', f'{len(rows):,}', malignant)]
    page['headline'].insert(1, report.figure('less the AUC at home', difference))
    bins = {name: calibration.reliability(target, p, ones) for name, p in probs.items()}
    forest = pd.concat([scores.replace({'label': {'AUC': summary.POOLED}}), subgroups])
    bins = pd.concat(bins, names=['name']).reset_index('name')
    page['pictures'] = figures.draw_predictions(rows, forest, bins)
    page['command'] = shlex.join(['python', *sys.argv])
    files.write_text(out.with_suffix('.html'), report.render('external.html', page))
    record = about | {'runs': names, 'command': page['command'], 'scores': scores}
    record |= {'home': dict(at_home), 'difference': dict(difference), 'thresholds': thresholds}
    record |= {'quality': quality, 'subgroups': subgroups}
    files.write_json(out.with_suffix('.json'), record)
    print(f'{out.with_suffix(".html")}: the page; {out.with_suffix(".json")}: its figures')
