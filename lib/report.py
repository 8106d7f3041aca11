"""One page that shows what a blend knows, from saved files only."""

import base64
import io
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lib import files, images, probability, score, shortcuts
from lib.pictures import BLUE, RED
from lib.tables import read_folds

INK = '#010203'  # becomes the page's own colour of text, light or dark
N_IMAGES = 8  # in each sheet
SHEETS = (  # title, target, whether it was called a melanoma
    ('Melanomas, surest and right', 1, True),
    ('Melanomas, surest and wrong', 1, False),
    ('Benign, surest and right', 0, False),
    ('Benign, surest and wrong', 0, True),
)
STYLE = {
    'text.color': INK,
    'axes.labelcolor': INK,
    'axes.edgecolor': INK,
    'xtick.color': INK,
    'ytick.color': INK,
    'axes.spines.top': False,
    'axes.spines.right': False,
    'font.size': 11,
    'svg.hashsalt': 'report',  # the same page from the same files
    'text.parse_math': False,  # a run's name may hold a $
}


def write(home: Path) -> str:
    """Write HOME/report/index.html from report/{scores.json,oof.csv}, folds.csv and the runs.

    Returns: a line that says where it lies.
    """
    folder = home / 'report'
    found = files.read_json(folder / 'scores.json')
    names = found['blend']['runs']
    page: dict[str, Any] = {'found': found, 'names': names, 'figures': [], 'sheets': []}
    page['configs'] = {name: _config(home / 'runs' / name) for name in names}
    with matplotlib.rc_context(STYLE):
        if 'summary' in found:
            oof = pd.read_csv(folder / 'oof.csv', dtype={'image_name': str})
            page |= {
                'floor': shortcuts.sentence(found['floor']),
                'probability': probability.describe(found['probability'])
                if 'probability' in found
                else None,
                'figures': _figures(oof, found),
                'sheets': _sheets(oof, home / 'folds.csv', _threshold(found)),
            }
        if len(names) > 1:
            rho = found.get('test_correlations')
            if 'runs' in found:
                rho = [found['runs'][name]['correlations'] for name in names]
            page['figures'].append(_correlations(names, np.array(rho)))
        page['figures'] += _learning_curves({name: home / 'runs' / name for name in names})
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters['estimate'] = lambda triple: str(score.Estimate(*(triple or [None])))
    environment.filters['difference'] = lambda four: str(
        score.Difference(*four) if four else 'the best'
    )
    text = environment.get_template('report.html').render(measures=score.MEASURES, **page)
    files.write_text(folder / 'index.html', text)
    return f'{folder / "index.html"}: the report'


def _config(run: Path) -> dict[str, Any]:
    """What a run says of itself: its flags, its predictions, its first fold's machine."""
    paths = [run / 'config.json', run / files.BLEND, run / 'infer.json', run / 'fold0' / 'run.json']
    return {p.relative_to(run).as_posix(): p.read_text() for p in paths if p.exists()}


def _figure(title: str, draw, size: tuple[float, float], note: str = '') -> dict[str, str]:
    """`draw(axes)` as SVG in the page's own colours, with a title and a note beside it."""
    figure = Figure(figsize=size, layout='constrained')
    draw(figure.add_subplot())
    text = io.StringIO()
    figure.savefig(text, format='svg', transparent=True, metadata={'Date': None})
    svg = text.getvalue()
    svg = svg[svg.index('<svg') :].replace(INK, 'currentColor')
    svg = re.sub(r'<g id="[^"]*">', '<g>', svg)  # each picture would have the same ones
    svg = re.sub(r'<metadata>.*?</metadata>', '', svg, flags=re.DOTALL)
    svg = re.sub(r' (width|height)="[\d.]+pt"', '', svg, count=2)  # as wide as the page lets it be
    return {'title': title, 'svg': svg, 'note': note, 'points': str(round(72 * size[0]))}


def _figures(oof: pd.DataFrame, found: dict[str, Any]) -> list[dict[str, str]]:
    target, pred = oof.target.to_numpy(), oof.pred.to_numpy()
    figures = []
    if len(np.unique(target)) == 2:
        curves = score.curves(target, pred, oof.group)
        rate = float(target.mean())
        band = f'The band holds 95 % of 200 draws of {found["summary"]["drawn"]}.'
        for title, key, x, y, chance in (
            ('ROC', 'roc', 'benign images called', 'sensitivity', ([0, 1], [0, 1])),
            ('Precision and recall', 'precision', 'sensitivity', 'precision', ([0, 1], [rate] * 2)),
        ):
            draw = _curve(curves['grid'], curves[key], chance, x, y)
            figures.append(_figure(title, draw, (5.4, 4.2), band))
    rows = _forest_rows(found['summary'])
    size = (6, 0.9 + 0.27 * len(rows))
    note = f'A subgroup with fewer than {score.MIN_CLASS} of a class has its counts only.'
    title = 'AUC by fold, source and subgroup'
    figures.append(_figure(title, lambda axes: _forest(axes, rows), size, note))
    if 'before' in found.get('probability', {}):
        note = 'Bins of as many images each; on the line, probabilities are rates.'
        draw = _reliability(found['probability'])
        figures.append(_figure('Reliability, before and after', draw, (5.4, 4.2), note))
    figures.append(_figure('Scores', lambda axes: _scores(axes, target, pred), (5.4, 4.2)))
    return figures


def _curve(grid: np.ndarray, curve: np.ndarray, chance: Sequence, x: str, y: str):
    def draw(axes: Axes) -> None:
        axes.plot(*chance, color=INK, linewidth=0.8, linestyle=':')
        axes.fill_between(grid, curve[:, 1], curve[:, 2], color=BLUE, alpha=0.3, linewidth=0)
        axes.plot(grid, curve[:, 0], color=BLUE)
        axes.set(xlabel=x, ylabel=y, xlim=(0, 1), ylim=(0, 1.01))

    return draw


def _forest_rows(summary: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    rows = [('all', summary['pooled'])]
    rows += [(f'fold {k}', part) for k, part in summary['folds'].items()]
    for name, parts in summary['subgroups'].items():
        rows += [(f'{name}: {value}', part) for value, part in parts.items()]
    return rows


def _forest(axes: Axes, rows: Sequence[tuple[str, dict[str, Any]]]) -> None:
    def known(part: dict[str, Any]) -> bool:
        return 'auc' in part and part['auc'][1] is not None

    places = -np.arange(len(rows))
    values = [v for _, part in rows for v in part.get('auc', ())[:2] if v is not None]
    left = min([0.95, *values])
    for y, (_, part) in zip(places, rows, strict=True):
        counts = f'{part["images"]} images, {part["melanomas"]} melanomas'
        axes.text(1.01, y, counts, va='center', fontsize=8, transform=axes.get_yaxis_transform())
        if 'auc' not in part:
            continue
        value, low, high = part['auc']
        if known(part):
            axes.plot([low, high], [y, y], color=BLUE, linewidth=2)
        axes.plot(value, y, 'o', color=BLUE, markersize=5)
    axes.set_yticks(places, [label for label, _ in rows])
    axes.set(xlim=(left - 0.02, 1), ylim=(places[-1] - 0.6, 0.6), xlabel='AUC')
    if 'auc' in rows[0][1]:
        axes.axvline(rows[0][1]['auc'][0], color=INK, linewidth=0.8, linestyle=':')


def _reliability(found: dict[str, Any]):
    def draw(axes: Axes) -> None:
        root = (lambda x: np.sqrt(np.maximum(x, 0)), np.square)  # room for the small ones
        axes.set_xscale('function', functions=root)
        axes.set_yscale('function', functions=root)
        axes.plot([0, 1], [0, 1], color=INK, linewidth=0.8, linestyle=':')
        for name, colour, marker in (('before', RED, 's'), ('after', BLUE, 'o')):
            x, y = ([b[c] for b in found[f'bins_{name}']] for c in ('predicted', 'observed'))
            label = f'{name}, Brier {found[name]["brier"]:.4f}'
            axes.plot(x, y, color=colour, marker=marker, label=label)
        ticks = [0, 0.01, 0.05, 0.1, 0.25, 0.5, 1]
        axes.set_xticks(ticks, ticks)
        axes.set_yticks(ticks, ticks)
        axes.tick_params(axis='x', labelsize=9)
        axes.set(xlabel='probability', ylabel='rate of melanomas', xlim=(0, 1), ylim=(0, 1))
        axes.legend(frameon=False)

    return draw


def _scores(axes: Axes, target: np.ndarray, pred: np.ndarray) -> None:
    for value, name, colour in ((0, 'benign', BLUE), (1, 'melanoma', RED)):
        of = pred[target == value]
        if len(of):
            weights = np.full(len(of), 1 / len(of))
            style = {'color': colour, 'histtype': 'stepfilled', 'alpha': 0.45, 'label': name}
            axes.hist(of, bins=np.linspace(0, 1, 41), weights=weights, **style)
    axes.set(xlabel='pred', ylabel='share of the class', xlim=(0, 1))
    axes.legend(frameon=False)


def _correlations(names: Sequence[str], rho: np.ndarray) -> dict[str, str]:
    k = len(names)

    def draw(axes: Axes) -> None:
        axes.imshow(rho, cmap='Blues', vmin=min(0, rho.min()), vmax=1)
        for i, j in np.ndindex(rho.shape) if k <= 12 else ():
            colour = '#ffffff' if rho[i, j] > 0.6 else '#102030'
            axes.text(j, i, f'{rho[i, j]:.2f}', ha='center', va='center', color=colour, fontsize=9)
        axes.set_xticks(range(k), [str(i + 1) for i in range(k)])
        axes.set_yticks(range(k), [f'{_short(name)}  {i + 1}' for i, name in enumerate(names)])

    side = 1.6 + 0.42 * k
    return _figure('Rank correlation of the runs', draw, (side + 2, side))


def _short(name: str, most: int = 28) -> str:
    return name if len(name) <= most else name[: most - 1] + '…'


def _learning_curves(runs: Mapping[str, Path]) -> list[dict[str, str]]:
    histories = {
        name: [pd.read_csv(p) for p in sorted(run.glob('fold*/history.csv'))]
        for name, run in runs.items()
    }
    histories = {name: of for name, of in histories.items() if of}
    if not histories:
        return []
    colours = matplotlib.colormaps['tab10'].colors
    figures = []
    for title, column in (
        ('Held-out AUC by epoch', 'auc'),
        ('Held-out loss by epoch', 'valid_loss'),
    ):

        def draw(axes: Axes, column: str = column) -> None:
            for i, (name, folds) in enumerate(histories.items()):
                for k, history in enumerate(folds):
                    label = _short(name) if k == 0 else None
                    style = {'color': colours[i % 10], 'linewidth': 1.2, 'label': label}
                    axes.plot(history.epoch, history[column], **style)
            axes.set(xlabel='epoch')
            axes.xaxis.get_major_locator().set_params(integer=True)
            if len(histories) <= 8:
                axes.legend(frameon=False, fontsize=9)

        note = 'A line a fold; on its melanomas and a sample of its benign images.'
        figures.append(_figure(title, draw, (5.4, 4.2), note))
    return figures


def _threshold(found: dict[str, Any]) -> float:
    """The `pred` that finds 95 % of the melanomas; .5 where that is not known."""
    rows = found.get('probability', {}).get('thresholds', ())
    return next((row['pred'] for row in rows if row['wanted'] == 0.95), 0.5)


def _sheets(oof: pd.DataFrame, folds: Path, at: float) -> list[dict[str, Any]]:
    """The surest right and wrong images of both classes, called melanomas from `at` on.

    None where the images are not here.
    """
    if not folds.exists():
        return []
    paths = read_folds(folds).set_index('image_name').path
    sheets = []
    for title, target, called in SHEETS:
        rows = oof[(oof.target == target) & ((oof.pred >= at) == called)]
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
