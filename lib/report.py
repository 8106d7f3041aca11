"""The report: one HTML page about a blend, made from saved files only."""

import base64
import io
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from PIL import Image

from lib import calibration, comparison, figures, files, images, prior, score, shortcuts, summary
from lib.runs import BLEND
from lib.tables import COMPETITION, COMPETITIONS, competition_of, read_folds

N_IMAGES = 8  # in each sheet
SHEETS = (  # title, target, whether the threshold calls it positive
    ('{} with the highest predictions (true positives)', 1, True),
    ('{} with the lowest predictions (false negatives)', 1, False),
    ('Benign images with the lowest predictions (true negatives)', 0, False),
    ('Benign images with the highest predictions (false positives)', 0, True),
)


def write(home: Path, with_images: bool = True) -> str:
    """Write HOME/report/index.html from report/{scores.json,oof.csv}, folds.csv and the runs.

    `with_images` puts images of patients on the page, and the heat maps that infer.py --heat made.
    Returns: a line that says where it lies.
    """
    path = home / 'report' / 'index.html'
    scores = files.read_json(path.with_name('scores.json'))
    runs = {name: home / 'runs' / name for name in scores['blend']['runs']}
    pictures, sheets, rho = [], [], scores.get('test_correlations')
    heat = _read_heat(runs)
    if 'summary' in scores:
        oof = pd.read_csv(path.with_name('oof.csv'), dtype={'image_name': str})
        pictures = figures.draw_predictions(oof, scores)
        sheets = _sheets(oof, home / 'folds.csv', heat) if with_images else []
        rho = [run['correlations'] for run in scores['runs'].values()]
    if len(runs) > 1:
        pictures.append(figures.draw_correlations(list(runs), np.array(rho)))
    pictures += figures.draw_histories(runs)
    page = {'scores': scores, 'names': list(runs), 'figures': pictures, 'sheets': sheets}
    page |= {'heat': heat, 'configs': {name: _read_configs(run) for name, run in runs.items()}}
    page |= {'calibration': calibration, 'comparison': comparison, 'shortcuts': shortcuts}
    competition = COMPETITIONS[scores.get('summary', {}).get('competition', COMPETITION)]
    page |= {'measures': score.MEASURES, 'competition': competition, 'few': summary.FEW}
    page['few_note'] = summary.few_note(competition.positives)
    loader = FileSystemLoader(Path(__file__).parent)
    style = {'trim_blocks': True, 'lstrip_blocks': True, 'undefined': StrictUndefined}
    environment = Environment(loader=loader, autoescape=True, **style)
    environment.filters['estimate'] = lambda saved: str(score.Estimate(*(saved or [None])))
    environment.filters['difference'] = lambda saved: str(score.Difference(*(saved or [None])))
    files.write_text(path, environment.get_template('report.html').render(page))
    return f'{path}: the report'


def _read_configs(run: Path) -> dict[str, str]:
    """The files in which a run says how it was trained and predicted, as text by name."""
    names = ('config.json', BLEND, 'infer.json', 'fold0/tta_oof.json', 'fold0/run.json')
    return {name: (run / name).read_text() for name in names if (run / name).exists()}


def _read_heat(runs: dict[str, Path]) -> dict[str, dict[str, Any]]:
    """The heat.json of each run that has heat maps, and `paths`, the picture of each image."""
    heat = {}
    for name, run in runs.items():
        if (run / 'heat' / 'heat.json').exists():
            table = pd.read_csv(run / 'heat' / 'heat.csv', dtype=str)
            paths = [run / 'heat' / Path(picture).name for picture in table.picture]
            heat[name] = files.read_json(run / 'heat' / 'heat.json')
            heat[name]['paths'] = dict(zip(table.image_name, paths, strict=True))
    return heat


def _sheets(oof: pd.DataFrame, folds: Path, heat: dict[str, dict]) -> list[dict[str, Any]]:
    """The most certain right and wrong images, by the threshold at a sensitivity of 95 %,
    each with the map of the first run that has one, as `_read_heat` returns them.

    Empty where the images are not here.
    """
    if not folds.exists():
        return []
    own = oof[prior.evaluation_rows(oof)[0]]
    threshold = np.inf  # without a melanoma
    if own.target.any():
        threshold = calibration.threshold(own.target.to_numpy(), own.pred.to_numpy(), 0.95)
    paths = read_folds(folds).set_index('image_name').path
    oof = oof.assign(path=oof.image_name.map(paths)).dropna(subset='path')
    sheets = []
    for title, target, called in SHEETS:
        rows = oof[(oof.target == target) & ((oof.pred >= threshold) == called)]
        rows = rows.sort_values('pred', ascending=not called, kind='stable').head(N_IMAGES)
        cells = []
        for row in rows.itertuples():
            name = row.image_name
            run = next((run for run in heat if name in heat[run]['paths']), None)
            try:
                shown = [images.square(Path(row.path), 144)]
                if run is not None:  # the right one of two squares
                    with Image.open(heat[run]['paths'][name]) as picture:
                        side = picture.width // 2
                        shown.append(picture.resize((144, 144), box=(side, 0, 2 * side, side)))
            except Exception:  # not here, or broken, where decoders raise anything: left out
                continue
            encoded = [_encode(image) for image in shown]
            cells.append({'name': name, 'pred': row.pred, 'run': run, 'images': encoded})
        if cells:
            positives = competition_of(oof).positives.capitalize()
            sheets.append({'title': title.format(positives), 'cells': cells})
    return sheets


def _encode(image: Image.Image) -> str:
    """An image as JPEG in base64."""
    data = io.BytesIO()
    image.save(data, 'JPEG', quality=85)
    return base64.b64encode(data.getvalue()).decode()
