"""The report: one HTML page about a blend."""

from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from lib import blending, calibration, figures, files, images, summary, thresholds
from lib.calibration import Calibration
from lib.demo import PREFIX
from lib.score import MEASURES, format_estimate
from lib.tables import competition_of, read_folds

N_IMAGES = 8  # in each sheet
SHEETS = (  # title, target, whether the threshold calls it malignant
    ('Malignant images with the highest predictions (true positives)', 1, True),
    ('Malignant images with the lowest predictions (false negatives)', 1, False),
    ('Benign images with the lowest predictions (true negatives)', 0, False),
    ('Benign images with the highest predictions (false positives)', 0, True),
)


@dataclass
class Scores:
    """What a blend's out-of-fold predictions are worth."""

    rows: pd.DataFrame  # of summary.summarize
    floor: pd.DataFrame  # the same of the shortcut floor
    floor_sentence: str
    runs: pd.DataFrame  # of blending.compare_runs
    fitted: Calibration
    in_sample: float | None  # the AUC of fitted weights on the rows that they were fitted to

    @property
    def record(self) -> dict[str, Any]:
        """What scores.json holds of it."""
        record = {'scores': self.rows, 'floor': self.floor, 'runs': self.runs.rename_axis('run')}
        return record | {'in_sample': self.in_sample, 'probability': self.fitted.record}


def write(
    home: Path,
    names: list[str],
    blend: dict[str, Any],
    oof: pd.DataFrame | None,
    scores: Scores | None,
    correlations: np.ndarray | None,
    with_images: bool = True,
) -> Path:
    """Write HOME/report/index.html, and return its path.

    `names`: of the k runs; `blend`: its settings. `oof` and `scores` are None where not every run
    has out-of-fold predictions. `correlations`: (k, k), of ranks. `with_images` puts images of
    patients on the page.
    """
    path = home / 'report' / 'index.html'
    page = {'names': names, 'blend': blend, 'scored': scores is not None, 'sheets': []}
    pictures = []
    if scores is not None:
        pictures = figures.draw_predictions(oof, scores.rows, scores.fitted.bins)
        page |= describe_scores(oof, scores)
        page['sheets'] = choose_images(oof, home / 'folds.csv') if with_images else []
    if len(names) > 1:
        pictures.append(figures.draw_correlations(names, correlations))
    page |= {'pictures': pictures, 'configs': read_configs(home, names, blend)}
    page |= {'date': date.today().isoformat(), 'command': blend['command']}
    page['synthetic'] = oof is not None and oof.image_name.str.startswith(PREFIX).all()
    files.write_text(path, render('report.html', page))
    return path


def render(template: str, page: dict[str, Any]) -> str:
    """The text of a template of lib with the values of `page`, which are escaped in HTML, and with
    the notes that stand below tables."""
    notes = {'few_note': summary.FEW_NOTE, 'quality_note': calibration.QUALITY_NOTE}
    notes |= {'optimistic': thresholds.OPTIMISTIC}
    style = {'trim_blocks': True, 'lstrip_blocks': True, 'undefined': StrictUndefined}
    loader, is_html = FileSystemLoader(Path(__file__).parent), template.endswith('.html')
    environment = Environment(loader=loader, autoescape=is_html, **style)
    return environment.get_template(template).render(notes | page)


def sentence(text: str) -> str:
    """`text` with a capital letter and a full stop."""
    return f'{text[0].upper()}{text[1:]}.'


def describe_scores(oof: pd.DataFrame, scores: Scores) -> dict[str, Any]:
    """What the page shows of `scores`, all of it finished text and tables of text."""
    fitted, runs = scores.fitted, blending.tabulate_runs(scores.runs)
    page = {'headline': headline(oof, scores), 'unit': summary.resampling_unit(oof), 'runs': runs}
    page['floor'] = sentence(scores.floor_sentence)
    page['figures'] = summary.tabulate({'blend': scores.rows, 'shortcut floor': scores.floor})
    page['in_sample'] = '' if scores.in_sample is None else f'{scores.in_sample:.4f}'
    page |= {'probabilities': f'{fitted.sentence}.', 'quality': None}
    if not fitted.quality.empty:
        page |= {'quality': calibration.tabulate_quality(fitted.quality)}
        page['thresholds'] = thresholds.tabulate_thresholds(fitted.thresholds)
        page['per_1000'] = f'{1000 * fitted.prior:.1f}'
    page['common'] = f'{summary.common_threshold(oof):.4g}'
    return page | {'subgroups': summary.tabulate_subgroups(scores.rows)}


def figure(label: str, row: pd.Series) -> tuple[str, str, str]:
    """What a figure is, its value, and its interval and note, from value, low, high and note."""
    interval = '' if np.isnan(row.low) else f'95\xa0% interval {row.low:.4f} to {row.high:.4f}'
    value = 'none' if np.isnan(row.value) else f'{row.value:.4f}'
    return label, value, '; '.join(filter(None, [interval, row.note]))


def headline(oof: pd.DataFrame, scores: Scores) -> list[tuple[str, str, str]]:
    """The page's first figures: what each is, its value, and a note."""
    first, rows = competition_of(oof).measure, scores.rows
    cards = []
    if first != 'auc':
        cards.append(figure(MEASURES[first], rows[rows.measure == first].iloc[0]))
    cards.append(figure('out-of-fold AUC', summary.pooled_auc(rows)))
    floor = summary.pooled_auc(scores.floor)
    cards.append(figure('shortcut floor, no pixel seen', floor))
    for row in rows[rows.label == summary.SOURCE_ALONE].itertuples():
        value = format_estimate(row.value, np.nan, np.nan)
        cards.append(('the source alone', value, 'the AUC of a score that knows only the source'))
    return [*cards, count_images(oof)]


def count_images(rows: pd.DataFrame) -> tuple[str, str, str]:
    """How many images, malignant ones and groups `rows` (target, group) have, as `figure`."""
    counts, unit = f'images, {rows.target.sum():,} malignant', summary.name_groups(rows)
    groups = '' if unit == 'images' else f', {rows.group.nunique():,} {unit}'
    return 'scored on', f'{len(rows):,}', counts + groups


def choose_images(oof: pd.DataFrame, folds: Path) -> list[tuple[str, list[dict[str, str]]]]:
    """The most certain right and wrong images, by the threshold at a sensitivity of 95 %: each
    sheet's title and its images. Empty where the images are not here."""
    if not folds.exists():
        return []
    own = oof[calibration.evaluation_rows(oof)[0]]
    threshold = np.inf  # without a malignant image
    if own.target.any():
        threshold = thresholds.threshold(own.target.to_numpy(), own.pred.to_numpy(), 0.95)
    paths = read_folds(folds).set_index('image_name').path
    oof = oof.assign(path=oof.image_name.map(paths)).dropna(subset='path')
    sheets = []
    for title, target, called in SHEETS:
        rows = oof[(oof.target == target) & ((oof.pred >= threshold) == called)]
        rows = rows.sort_values('pred', ascending=not called, kind='stable').head(N_IMAGES)
        cells = []
        for row in rows.itertuples():
            try:
                jpeg = figures.encode(images.square(Path(row.path), 144).save, 'JPEG')
            except Exception:  # not here, or broken, where decoders raise anything: left out
                continue
            cells.append({'name': row.image_name, 'pred': f'{row.pred:.3f}', 'jpeg': jpeg})
        if cells:
            sheets.append((title, cells))
    return sheets


def read_configs(home: Path, names: list[str], blend: dict[str, Any]) -> list[tuple[str, str]]:
    """The blend's settings, and the files in which a run says how it was trained and predicted:
    titles and texts."""
    configs = [('This blend', '\n'.join(f'{key}: {value}' for key, value in blend.items()))]
    for name in names:
        for end in ('config.json', 'fold0/tta_oof.json', 'fold0/run.json'):
            path = home / 'runs' / name / end
            configs += [(f'{name}/{end}', path.read_text())] if path.exists() else []
    return configs
