"""Scores of out-of-fold predictions as one table of rows, which print, report, card and JSON read.

A row has `kind` (main, fold or subgroup), `label` (whose figure it is), `measure` (of
score.MEASURES or OF_SUBGROUPS), `value` with its 95 % interval `low` to `high` (NaN where there is
none), `images` and `malignant` (what it was computed on), and `note` (why a figure is missing).
"""

from collections.abc import Mapping

import numpy as np
import pandas as pd

from lib import files, locks, score, thresholds
from lib.runs import Run
from lib.score import MEASURES
from lib.tables import competition_of

MIN_CLASS = 20  # a subgroup with fewer malignant or benign images shows its counts only
MAX_SUBGROUPS = 30  # of a kind; the smaller ones are put together
FEW = 100  # malignant images
FEW_NOTE = (
    f'Below {FEW} malignant images the intervals of average precision and of sensitivity at a '
    'specificity are often too narrow.'
)
AGES = [0, 30, 45, 60, 75, np.inf]  # years
AGE_BANDS = ['under 30', '30 to 44', '45 to 59', '60 to 74', '75 and over']
SENSITIVITY = 0.9  # of all malignant images, at the one threshold of all subgroups
OF_SUBGROUPS = {'auc': 'AUC', 'sensitivity': 'sensitivity', 'specificity': 'specificity'}
POOLED = 'AUC, pooled'
RANKED = 'AUC, ranked within each fold'
WITHIN = 'AUC within '  # and a source
SOURCE_ALONE = 'AUC of the source alone, no pixel seen'
COLUMNS = ['kind', 'label', 'measure', 'value', 'low', 'high', 'images', 'malignant', 'note']


def report_run(run: Run, oof: pd.DataFrame, columns: list[str], is_known: bool = False) -> None:
    """Print the scores of the `columns` of `oof`, `pred_plain` and `pred`; write scores.json.

    Where an earlier command has printed those of `pred_plain`, only the AUC of the last column, and
    the competition's own measure, are printed.
    """
    print(f'{run}: out of fold [95 % interval over {resampling_unit(oof)}]')
    scores = {column: summarize(oof, column) for column in columns}
    shown = scores
    if is_known:
        rows, own = scores[columns[-1]], {'auc', competition_of(oof).measure}
        shown = {columns[-1]: rows[rows.measure.isin(own)]}
    print(format_summaries(shown))
    if len(columns) > 1:
        both = [oof.pred, oof.pred_plain]
        scores['tta'] = score.compare_paired(oof.target, both, 1, oof.group)[:1]
        change = score.format_difference(scores['tta'].iloc[0])
        print(f'test-time augmentation changes the AUC by {change}')
    path = run.folder / 'scores.json'
    with locks.held(run.lock):
        if 'pred' in columns or not path.exists():  # train.py again leaves infer.py's
            files.write_json(path, scores)


def report_trained(run: Run, table: pd.DataFrame) -> None:
    """Print the pooled out-of-fold scores of a run, or which folds are still to be trained.

    `table`: the labelled rows of folds.csv.
    """
    folds = sorted(table.fold.unique().tolist())
    if run.unfinished(folds):
        return print(run.describe_unfinished(folds))
    oof = run.read_oof(folds)[['image_name', 'pred_plain']]
    report_run(run, table.merge(oof, on='image_name'), ['pred_plain'])


def summarize(oof: pd.DataFrame, pred: str = 'pred', subgroups: bool = True) -> pd.DataFrame:
    """The rows of the predictions `pred` in `oof` (target, group, source, fold, and of what the
    subgroups are: sex, age_approx in years, anatom_site, skin_tone), as the module says.

    The main rows begin with the competition's own measure. `RANKED` is the AUC after ranking within
    each fold, `SOURCE_ALONE` that of a score that knows only an image's source: the source's rate
    of malignant images. Where all images are of one fold there are no rows of folds.
    """
    first, pooled = competition_of(oof).measure, score.measure(oof, pred)
    ranked = oof.assign(**{pred: score.rank_within_folds(oof[pred], oof.fold)})
    by_fold = oof.groupby('fold') if oof.fold.nunique() > 1 else ()
    folds = {k: score.measure(rows, pred).loc[['auc']] for k, rows in by_fold}
    aucs = pd.Series([of_fold.value.auc for of_fold in folds.values()], dtype=float).dropna()

    def single(label: str, value: float) -> pd.DataFrame:
        row = pooled.loc[['auc']].assign(value=value, low=np.nan, high=np.nan)
        return label_rows(row, 'main', label)

    rest = [name for name in MEASURES if name not in ('auc', first)]
    rows = [label_rows(pooled.loc[[first]], 'main')] if first != 'auc' else []
    rows += [label_rows(pooled.loc[['auc']], 'main', POOLED)]
    if folds:
        rows += [label_rows(score.measure(ranked, pred).loc[['auc']], 'main', RANKED)]
    if len(aucs) > 1:
        rows += [single(f'AUC, mean of {len(aucs)} folds', aucs.mean())]
        rows += [single(f'AUC, standard deviation of {len(aucs)} folds', aucs.std())]
    if oof.source.nunique() > 1:
        for source, of_source in oof.groupby('source'):
            measured = score.measure(of_source, pred).loc[['auc']]
            rows += [label_rows(measured, 'main', f'{WITHIN}{source}')]
        rates = oof.groupby('source').target.transform('mean')
        rows += [single(SOURCE_ALONE, score.auc(oof.target, rates))]
    rows += [label_rows(pooled.loc[rest], 'main')]
    rows += [label_rows(of_fold, 'fold', f'fold {k}') for k, of_fold in folds.items()]
    if subgroups and len(of_groups := measure_subgroups(oof, pred)):
        rows += [of_groups]
    return pd.concat(rows, ignore_index=True)[COLUMNS]


def common_threshold(oof: pd.DataFrame) -> float:
    """The highest `pred` that SENSITIVITY of all malignant images reach; NaN without any."""
    if not oof.target.any():
        return np.nan
    return thresholds.threshold(oof.target.to_numpy(), oof.pred.to_numpy(), SENSITIVITY)


def measure_subgroups(
    oof: pd.DataFrame, pred: str = 'pred', at: float | None = None
) -> pd.DataFrame:
    """The rows of the subgroups alone, perhaps none: OF_SUBGROUPS, sensitivity and specificity at
    the threshold `at`, by default `common_threshold`."""
    oof, rows = oof.assign(pred=oof[pred]), [pd.DataFrame(columns=COLUMNS)]
    at = common_threshold(oof) if at is None else at
    threshold = pd.DataFrame({'wanted': [SENSITIVITY], 'pred': at, 'prob': np.nan})
    for name, of_group in _subgroups(oof):
        measured = score.measure(of_group, least=MIN_CLASS).loc[['auc'] * 3]
        measured = measured.set_axis(list(OF_SUBGROUPS))
        if measured.value.notna().all():  # there are enough of both classes
            figures = thresholds.measure_thresholds(of_group, threshold).iloc[0]
            for measure in ('sensitivity', 'specificity'):
                own = [measure, f'{measure}_low', f'{measure}_high']
                measured.loc[measure, ['value', 'low', 'high']] = figures[own].to_numpy()
        rows += [label_rows(measured, 'subgroup', name)]
    return pd.concat(rows[1:] or rows)


def label_rows(rows: pd.DataFrame, kind: str, label: str | None = None) -> pd.DataFrame:
    """Rows of `score.measure` with kind, label (by default the measure's own) and measure."""
    labels = rows.index.map(MEASURES) if label is None else label
    return rows.assign(kind=kind, label=labels, measure=rows.index)


def _subgroups(oof: pd.DataFrame) -> list[tuple[str, pd.DataFrame]]:
    """The rows of each sex, age band, site, skin tone and source, with names like 'sex: male'."""
    kinds = oof.reindex(columns=['sex', 'age_approx', 'anatom_site', 'skin_tone', 'source'])
    kinds = kinds.set_axis(['sex', 'age', 'site', 'skin tone', 'source'], axis=1)
    kinds['age'] = pd.cut(kinds.age, AGES, right=False, labels=AGE_BANDS).astype(object)
    if oof.source.nunique() < 2:
        del kinds['source']
    subgroups = []
    for kind, values in kinds.dropna(axis=1, how='all').items():
        values = values.fillna('not known')
        values = values.where(values.isin(values.value_counts().index[:MAX_SUBGROUPS]), 'others')
        # groupby sorts by text, which would put 'under 30' last
        of_kind = sorted(oof.groupby(values), key=lambda item: item[0] != 'under 30')
        subgroups += [(f'{kind}: {value}', rows) for value, rows in of_kind]
    return subgroups


def resampling_unit(oof: pd.DataFrame) -> str:
    """The units that the intervals of `oof` (group) resample, and their number, in words."""
    is_by_image = (unit := name_groups(oof)) == 'images'
    warning = ' (if some are of one patient, the interval is too narrow)' if is_by_image else ''
    return f'{oof.group.nunique():,} {unit}{warning}'


def name_groups(rows: pd.DataFrame) -> str:
    """What the groups of `rows` are, in words."""
    patients = rows.get('patient_id', pd.Series(dtype=object))
    if patients.notna().all() and patients.nunique() == rows.group.nunique():
        return 'patients'
    return 'images' if rows.group.is_unique else 'patients or lesions'


def pooled_auc(rows: pd.DataFrame) -> pd.Series:
    """The row of the pooled AUC in the rows of `summarize`."""
    return rows[rows.label == POOLED].iloc[0]


def format_rows(rows: pd.DataFrame) -> list[str]:
    """The figures of rows, each with its interval, as text."""
    figures = rows[['value', 'low', 'high']].itertuples(index=False, name=None)
    return [score.format_estimate(*figure) for figure in figures]


def tabulate(summaries: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """A table of text: a line for each main row, a column for each of `summaries`, the counts."""
    main = {name: rows[rows.kind == 'main'] for name, rows in summaries.items()}
    columns = {name: pd.Series(format_rows(rows), rows.label) for name, rows in main.items()}
    first = next(iter(main.values()))
    table, counts = pd.DataFrame(columns, list(first.label)), counted(first).set_index('label')
    for column in ('images', 'malignant'):
        table[column] = counts[column].map(str)
    return table.fillna('')


def tabulate_subgroups(rows: pd.DataFrame) -> pd.DataFrame:
    """The subgroups as text, a line for each; of a small one only the counts."""
    rows = rows[rows.kind == 'subgroup']
    counts = rows.groupby('label', sort=False)[['images', 'malignant']].first()
    rows = rows.assign(text=format_rows(rows), column=rows.measure.map(OF_SUBGROUPS))
    rows['text'] = rows.text.where(rows.value.notna(), rows.note.where(rows.measure == 'auc', ''))
    figures = rows.pivot(index='label', columns='column', values='text')
    columns = list(OF_SUBGROUPS.values())
    return counts.map('{:,}'.format).join(figures.reindex(columns=columns))


def counted(rows: pd.DataFrame) -> pd.DataFrame:
    """The rows of all images and of each source, whose counts and notes are shown."""
    is_source = rows.label.str.startswith(WITHIN)
    return rows[(rows.kind == 'main') & ((rows.label == POOLED) | is_source)]


def format_summaries(summaries: Mapping[str, pd.DataFrame]) -> str:
    """The table of `tabulate` as printed, and below it the reasons for missing figures."""
    rows = counted(next(iter(summaries.values())))
    lines = [format_table(tabulate(summaries))]
    lines += [f'{row.label}: {row.note}' for row in rows.itertuples() if row.note]
    has_others = 'average_precision' in {*next(iter(summaries.values())).measure}
    few = pooled_auc(rows).malignant < FEW and has_others
    return '\n'.join(lines + ([FEW_NOTE] if few else []))


def format_table(table: pd.DataFrame) -> str:
    """A table as printed text, with the names of its rows; a missing value is an empty cell."""
    with pd.option_context('display.unicode.east_asian_width', True):
        lines = table.fillna('').to_string().split('\n')
    return '\n'.join(line.rstrip() for line in lines)


def shorten(name: str) -> str:
    """A run's name on one line, cut in the middle to 27 characters."""
    name = ''.join(c if c.isprintable() else '\ufffd' for c in name)
    return name if len(name) <= 28 else f'{name[:13]}…{name[-13:]}'
