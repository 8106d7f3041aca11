"""One page that shows what a blend knows, from saved files only."""

import base64
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from lib import calibration, comparison, figures, files, images, prior, score, shortcuts, summary
from lib.runs import BLEND
from lib.tables import read_folds

N_IMAGES = 8  # in each sheet
SHEETS = (  # title, target, whether the threshold calls it a melanoma
    ('Melanomas with the highest predictions (true positives)', 1, True),
    ('Melanomas with the lowest predictions (false negatives)', 1, False),
    ('Benign images with the lowest predictions (true negatives)', 0, False),
    ('Benign images with the highest predictions (false positives)', 0, True),
)


def write(home: Path) -> str:
    """Write HOME/report/index.html from report/{scores.json,oof.csv}, folds.csv and the runs.

    Returns: a line that says where it lies.
    """
    folder = home / 'report'
    scores = files.read_json(folder / 'scores.json')
    runs = {name: home / 'runs' / name for name in scores['blend']['runs']}
    page = {'scores': scores, 'names': list(runs), 'figures': [], 'sheets': []}
    page['configs'] = {name: _read_configs(run) for name, run in runs.items()}
    if 'summary' in scores:
        oof = pd.read_csv(folder / 'oof.csv', dtype={'image_name': str})
        page['floor'] = shortcuts.describe(scores['floor'])
        page['probability'] = calibration.describe(scores['probability'])
        page['figures'] = figures.of_predictions(oof, scores)
        page['sheets'] = _sheets(oof, home / 'folds.csv', _threshold(oof))
    best = scores.get('best_run')
    page['best'] = comparison.describe_best_run(best) if best else None
    if len(runs) > 1:
        rho = scores.get('test_correlations')
        if 'runs' in scores:
            rho = [run['correlations'] for run in scores['runs'].values()]
        page['figures'].append(figures.of_correlations(list(runs), np.array(rho)))
    page['figures'] += figures.of_histories(runs)
    page |= {'measures': score.MEASURES, 'few': summary.FEW, 'few_note': summary.FEW_NOTE}
    text = _template().render(page)
    files.write_text(folder / 'index.html', text)
    return f'{folder / "index.html"}: the report'


def _template():
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )

    def estimate(saved: Sequence[float] | None) -> str:
        return str(score.Estimate(*(saved or [None])))

    def difference(saved: Sequence[float] | None) -> str:
        return str(score.Difference(*(saved or [None])))

    environment.filters |= {'estimate': estimate, 'difference': difference}
    return environment.get_template('report.html')


def _read_configs(run: Path) -> dict[str, str]:
    """What a run says of itself: its flags, its predictions, its first fold's machine."""
    names = ('config.json', BLEND, 'infer.json', 'fold0/tta_oof.json', 'fold0/run.json')
    paths = [run / name for name in names]
    return {p.relative_to(run).as_posix(): p.read_text() for p in paths if p.exists()}


def _threshold(oof: pd.DataFrame) -> float:
    """The `pred` at a sensitivity of 95 %; infinite where there is no melanoma."""
    own, _ = prior.evaluation_rows(oof)
    if not oof.target[own].any():
        return np.inf
    return calibration.threshold(oof.target[own].to_numpy(), oof.pred[own].to_numpy(), 0.95)


def _sheets(oof: pd.DataFrame, folds: Path, threshold: float) -> list[dict[str, Any]]:
    """The surest right and wrong images of both classes, called melanomas from `threshold` on.

    None where the images are not here.
    """
    if not folds.exists():
        return []
    paths = read_folds(folds).set_index('image_name').path
    sheets = []
    for title, target, called in SHEETS:
        rows = oof[(oof.target == target) & ((oof.pred >= threshold) == called)]
        rows = rows[rows.image_name.isin(paths.index)]
        rows = rows.sort_values('pred', ascending=not called, kind='stable').head(N_IMAGES)
        cells = []
        for row in rows.itertuples():
            picture = io.BytesIO()
            try:
                images.square(Path(paths[row.image_name]), 144).save(picture, 'JPEG', quality=85)
            except Exception:  # not here, or broken, where decoders raise anything: left out
                continue
            data = base64.b64encode(picture.getvalue()).decode()
            cells.append({'name': row.image_name, 'pred': row.pred, 'data': data})
        if cells:
            sheets.append({'title': title, 'cells': cells})
    return sheets
