"""Scores of out-of-fold predictions: pooled, by fold, by source, by subgroup, and printed."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

from lib import files, locks, score, splits
from lib.runs import Run
from lib.score import MEASURES, Estimate
from lib.tables import COMPETITIONS, competition_of

MIN_CLASS = 20  # a subgroup with fewer melanomas or benign images shows its counts only
FEW = 50  # with fewer melanomas, intervals of measures other than the AUC are often too narrow
MAX_SUBGROUPS = 30  # of a kind; the smaller ones are put together
AGES = [0, 30, 45, 60, 75, np.inf]  # years
AGE_BANDS = ['under 30', '30 to 44', '45 to 59', '60 to 74', '75 and over']


def report_run(run: Run, oof: pd.DataFrame, columns: list[str]) -> None:
    """Print the scores of the `columns` of `oof`, `pred_plain` and `pred`; write scores.json."""
    print(f'{run}: out of fold [95 % interval over {resampling_unit(oof)}]')
    scores = {column: summarize(oof, column) for column in columns}
    print(format_summaries(scores))
    if len(columns) > 1:
        both = [oof.pred, oof.pred_plain]
        scores['tta'] = score.compare_paired(oof.target, both, 1, oof.group)[1][0]
        print(f'test-time augmentation changes the AUC by {scores["tta"]}')
    path = run.folder / 'scores.json'
    with locks.held(run.lock):
        if 'pred' in columns or not path.exists():  # train.py again leaves infer.py's
            files.write_json(path, scores)


def summarize(oof: pd.DataFrame, pred: str = 'pred') -> dict[str, Any]:
    """What `measure_overall` returns, and `subgroups` by sex, age_approx (years), anatom_site."""
    return measure_overall(oof, pred) | {'subgroups': measure_subgroups(oof, pred)}


def measure_overall(oof: pd.DataFrame, pred: str = 'pred') -> dict[str, Any]:
    """The scores of the predictions `pred` in `oof` (target, group, source, fold).

    Returns: `pooled`, `resampling_unit`, `competition` (a key of COMPETITIONS), `ranked` (pooled
    after ranking within each fold), `folds`, `fold_mean` and `fold_sd` of the folds' AUCs,
    `sources`, `source_alone` (the AUC of a source's rate of melanomas as the score: what telling
    the archives apart is worth).
    """
    summary = {'pooled': score.measure(oof, pred), 'resampling_unit': resampling_unit(oof)}
    summary['competition'] = competition_of(oof).source
    ranked = oof.assign(**{pred: score.rank_within_folds(oof[pred], oof.fold)})
    summary['ranked'] = {'auc': score.measure(ranked, pred).get('auc', Estimate(None))}
    # a seed for each fold: with the same draws in all of them their mean would vary too much
    folds = {k: score.measure_with_draws(rows, pred, int(k)) for k, rows in oof.groupby('fold')}
    summary['folds'] = {str(k): figures for k, (figures, _) in folds.items()}
    scored = [(figures['auc'].value, each) for figures, each in folds.values() if 'auc' in figures]
    if scored:
        aucs, draws = zip(*scored, strict=True)
        mean, draws = float(np.mean(aucs)), np.mean(draws, axis=0)
        # draws of the folds may be paired in any order where no group is in two folds; it may be in
        # predictions of others
        leaks = splits.find_leaks(oof.group, oof.fold)
        interval = score.auc_estimate(mean, draws, oof.target, oof.group)
        summary['fold_mean'] = Estimate(mean) if leaks else interval
    if len(scored) > 1:
        summary['fold_sd'] = float(np.std(aucs, ddof=1))
    if oof.source.nunique() > 1:
        by_source = oof.groupby('source')
        summary['sources'] = {source: score.measure(rows, pred) for source, rows in by_source}
        summary['source_alone'] = score.auc(oof.target, by_source.target.transform('mean'))
    return summary


def resampling_unit(oof: pd.DataFrame) -> str:
    """The units that the intervals of `oof` (group) resample, and their number, in words."""
    n = oof.group.nunique()
    if n == len(oof) > 1:
        return f'{n:,} images (no patient with several is known; else the interval is too narrow)'
    return f'{n:,} patients or lesions'


def measure_subgroups(oof: pd.DataFrame, pred: str = 'pred') -> dict[str, dict[str, Any]]:
    """`score.measure` of each sex, age band, site and source; of a small one only the counts."""
    kinds = oof.reindex(columns=['sex', 'age_approx', 'anatom_site', 'source'])
    kinds = kinds.set_axis(['sex', 'age', 'site', 'source'], axis=1)
    kinds['age'] = pd.cut(kinds.age, AGES, right=False, labels=AGE_BANDS).astype('str')
    if oof.source.nunique() < 2:
        del kinds['source']
    subgroups = {}
    for kind, values in kinds.dropna(axis=1, how='all').items():
        values = values.fillna('not known')
        values = values.where(values.isin(values.value_counts().index[:MAX_SUBGROUPS]), 'others')
        in_order = sorted(oof.groupby(values), key=lambda item: item[0] != 'under 30')
        subgroups[kind] = {value: _measure_subgroup(rows, pred) for value, rows in in_order}
    return subgroups


def _measure_subgroup(rows: pd.DataFrame, pred: str) -> dict[str, Any]:
    n, melanomas = len(rows), int(rows.target.sum())
    if min(melanomas, n - melanomas) >= MIN_CLASS:
        return score.measure(rows, pred)
    note = f'fewer than {MIN_CLASS} of a class'
    return {'images': n, 'melanomas': melanomas, 'note': note}


def tabulate(summaries: Mapping[str, dict[str, Any]]) -> pd.DataFrame:
    """A table of text: one row per figure, one column for each of `summaries`, and the counts."""
    table = pd.DataFrame({name: _column(summary) for name, summary in summaries.items()})
    summary = next(iter(summaries.values()))
    positives = COMPETITIONS[summary['competition']].positives
    for count, word in (('images', 'images'), ('melanomas', positives)):
        counted = _counted(summary).items()
        table[word] = pd.Series({label: str(rows[count]) for label, rows in counted})
    return table.fillna('')


def _counted(summary: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The figures of all images and of each source, by the labels of their rows."""
    sources = summary.get('sources', {}).items()
    return {'AUC, pooled': summary['pooled']} | {f'  within {name}': rows for name, rows in sources}


def format_summaries(summaries: Mapping[str, dict[str, Any]]) -> str:
    """The table of `tabulate` as printed, and below it the reasons for missing figures."""
    lines, summary = [format_table(tabulate(summaries))], next(iter(summaries.values()))
    counted = _counted(summary).items()
    lines += [f'{label.strip()}: {rows["note"]}' for label, rows in counted if 'note' in rows]
    positives = COMPETITIONS[summary['competition']].positives
    return '\n'.join(lines + [few_note(positives)] * (summary['pooled']['melanomas'] < FEW))


def few_note(positives: str) -> str:
    """A sentence on intervals where there are few `positives`."""
    return (
        f'below {FEW} {positives} the intervals of measures other than the AUC are approximate: '
        'they are often too narrow'
    )


def _column(summary: dict[str, Any]) -> dict[str, str]:
    """The printed figures of one summary, by the labels of their rows."""
    pooled, nothing = dict(summary['pooled']), Estimate(None)
    first = COMPETITIONS[summary['competition']].measure
    column = {MEASURES[first]: pooled.pop(first)} if first != 'auc' and first in pooled else {}
    column['AUC, pooled'] = pooled.pop('auc', nothing)
    column['  ranked in each fold'] = summary['ranked']['auc']
    if 'fold_mean' in summary:
        n = sum('auc' in figures for figures in summary['folds'].values())
        column[f'  mean over {n} folds'] = summary['fold_mean']
    if 'fold_sd' in summary:
        column['  standard deviation over folds'] = f'{summary["fold_sd"]:.4f}'
    for source, figures in summary.get('sources', {}).items():
        column[f'  within {source}'] = figures.get('auc', nothing)
    if 'source_alone' in summary:
        alone = summary['source_alone']  # NaN where there is one class only
        column['  the source alone, no pixel seen'] = '-' if np.isnan(alone) else f'{alone:.4f}'
    column |= {label: pooled[name] for name, label in MEASURES.items() if name in pooled}
    return {label: str(figure) for label, figure in column.items()}


def shorten(name: str) -> str:
    """A run's name on one line, cut in the middle to 27 characters."""
    name = ''.join(c if c.isprintable() else '\ufffd' for c in name)
    return name if len(name) <= 28 else f'{name[:13]}…{name[-13:]}'


def format_table(table: pd.DataFrame) -> str:
    """A table as printed text, with the names of its rows; a missing value is an empty cell."""
    with pd.option_context('display.unicode.east_asian_width', True):
        lines = table.fillna('').to_string().split('\n')
    return '\n'.join(line.rstrip() for line in lines)
