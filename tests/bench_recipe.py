"""What each part of the recipe is worth, on real images and with paired intervals. Run by hand:

python tests/bench_recipe.py --data DATA --weights FILE --home HOME     # Kaggle's layout; lite0's

A row is the README's small real run with one thing changed, trained and predicted by the scripts;
or something else that is done with the base's predictions. Typed again it goes on where it stopped,
and in two terminals two processes share out the folds. The figures of each finished row, without
names of images, are added to tests/bench_recipe.csv, and the table is made from that file.

Measured on two shared cores in about eight hours: all rows but size_224, and of epochs_20 folds 0
and 1; the rest is still to be run. The recipe in miniature (base, twin, cutout and cutout_128, five
folds each): AUC .904 [.892, .915] by greedy and by stack, .903 [.891, .914] by the mean, and .901
of its best single run.
"""

import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import pandas as pd  # noqa: E402
from fastai.vision.all import Learner, noop  # noqa: E402

from lib import augment, cli, files, locks, model, score, tables, tta  # noqa: E402
from lib import data as loaders  # noqa: E402
from lib.images import cache  # noqa: E402
from lib.parts import Part, Settings, claim, list_parts  # noqa: E402
from lib.runs import Run  # noqa: E402
from lib.sampling import Downsample  # noqa: E402

LITE0 = 'tf_efficientnet_lite0'
SMALL = {'arch': LITE0, 'size': 160, 'epochs': 10, 'batch_size': 32, 'lr_max': 1e-3}
SETTINGS = {'n_tta': 15, 'seed': 0, 'batch_size': 32, 'precision': 'fp32'}  # infer.py's defaults
SOURCES = ('all', 'isic2019', 'isic2017')  # the competition's has 23 melanomas, too few to tell
PASSES = (0, 1, 2, 4, 8, 15, 30)
MEMBERS = ('base', 'twin', 'cutout', 'cutout_128')  # the recipe's four models in miniature
FIGURES = Path(__file__).with_suffix('.csv')
PICTURE = Path(__file__).with_suffix('.png')


@dataclass(frozen=True)
class Row:
    """What is changed, in words and as flags of train.py, and how many folds are trained."""

    change: str
    flags: dict[str, Any] = field(default_factory=dict)
    n_folds: int = 3


ROWS = {
    'base': Row('nothing', n_folds=5),
    'twin': Row('another seed', {'seed': 1}, n_folds=5),
    'cutout': Row('Cutout', {'cutout': True}, n_folds=5),
    'cutout_128': Row('Cutout, 128 px', {'cutout': True, 'size': 128}, n_folds=5),
    'neg_ratio_3': Row('three benign images a melanoma', {'neg_ratio': 3.0}),
    'all_benign': Row('all benign images, 3 epochs', {'neg_ratio': 0.0, 'epochs': 3}),
    'size_128': Row('128 px', {'size': 128}),
    'size_224': Row('224 px', {'size': 224}),
    'lr_max_3e-4': Row('--lr_max 3e-4', {'lr_max': 3e-4}),
    'epochs_20': Row('20 epochs', {'epochs': 20}),
    'wd_.01': Row('--wd .01', {'wd': 0.01}),
    'scratch': Row('no ImageNet weights', {'pretrained': False}),
}
FASTAI = Row(
    "fastai's vision_learner, aug_transforms, fine_tune(2) and tta, all of a fold's images"
)


def main(
    *,
    home: str,  # folder of what is made; folds.csv is made there from --data where it is missing
    weights: str,  # ImageNet weights of tf_efficientnet_lite0
    data: str | None = None,  # Kaggle's layout, where HOME/folds.csv is still to be made
    only: str | None = None,  # names of rows, with commas between, instead of all in their order
) -> None:
    """Train, predict and measure each row that bench_recipe.csv has not, then print its table."""
    others: dict[str, Callable] = {
        'fastai': finish_fastai, 'tta': finish_tta, 'blends': finish_blends,
        'metadata': finish_metadata,
    }  # fmt: skip
    home, names = Path(home), [*ROWS, *others]
    wanted = names if only is None else only.split(',')
    for name in wanted:
        cli.check_one_of(names, only=name)
    if not (home / 'folds.csv').exists():
        call('folds.py', '--data', data or 'data', '--home', home)
    table = tables.read_labelled(home / 'folds.csv')
    for name in wanted:
        if name in ROWS:
            finish_run(home, name, table, weights)
        else:
            others[name](home, table, weights)
    figures = pd.read_csv(FIGURES)
    print(format_figures(figures))
    if 'tta 30' in set(figures.row):
        draw_tta(figures)


def call(script: str, *args: Any) -> None:
    """Run a script of the project, and end where it fails."""
    command = [sys.executable, str(ROOT / script), *map(str, args)]
    if subprocess.run(command).returncode:
        raise cli.Stop(f'{script} failed; the row is still to be made')


def finish_run(home: Path, name: str, table: pd.DataFrame, weights: str) -> None:
    """Train and predict the folds of a row of ROWS, and measure it."""
    row, run = ROWS[name], Run(home / 'runs' / name)
    flags = SMALL | {'home': home, 'name': name, 'weights': weights} | row.flags
    if not flags.get('pretrained', True):
        del flags['weights']
    words = [w for f, v in flags.items() for w in cli_words(f, v)]
    folds = list(range(row.n_folds))
    for k in run.unfinished(folds):
        call('train.py', *words, '--fold', k)
    if run.unfinished(folds):
        return print(f'{name}: {run.describe_unfinished(run.unfinished(folds))}')
    settings, parts = Settings(**SETTINGS), oof_parts(run, table, folds)
    for part in claim(parts, settings):
        print(f'{part}, {settings.n_tta} augmented passes', flush=True)
        part.write(*predict(part, settings), settings, 'fp32')
    if not all(part.is_made(settings) for part in parts):
        return print(f'{name}: another process predicts some of it')
    oof = read_parts(parts)
    seconds = [files.read_json(run.fold(k) / 'run.json')['seconds'] for k in folds]
    about = {'images': images_seen(run, table), 'minutes': np.median(seconds) / 60}
    base = base_oof(home, table)
    for passes, column in ((15, 'pred'), (0, 'pred_plain')):
        keep(name, row, passes, oof, oof[column], oof[['image_name']].merge(base)[column], about)


def cli_words(flag: str, value: Any) -> list[str]:
    """A flag as typed."""
    if isinstance(value, bool):
        return [f'--{flag}' if value else f'--no{flag}']
    return [f'--{flag}', str(value)]


def oof_parts(run: Any, table: pd.DataFrame, folds: Sequence[int]) -> list:
    """A run's parts of held-out images alone: infer.py would predict the test images too."""
    return [part for part in list_parts(run, table) if part.kind == 'oof' and part.k in folds]


def predict(part: Part, settings: Settings) -> list[np.ndarray]:
    """The mean of the augmented passes and the plain pass, (n,) each, as infer.py makes them."""
    run, draws = part.run.config, tta.SeedBatch([settings.seed, *part.seeds])
    tfms = [draws, *augment.batch_tfms(run['mean'], run['std'], run['cutout'])]
    dls = loaders.prediction_dls(part.readable, tfms, settings.batch_size)
    net = model.load(run['arch'], run['size'], part.weights)
    net = model.ProbabilityModel(net, run['size'], settings.precision)
    passes = tta.Passes(draws, settings.n_tta + 1, f'fold {part.k}')
    learn = Learner(dls, net, loss_func=noop, cbs=passes)
    with learn.no_bar():
        preds, _ = learn.tta(n=settings.n_tta, beta=None)
    return [tta.check_finite(pred, str(part)) for pred in preds]


def read_parts(parts: list) -> pd.DataFrame:
    """The finished parts' rows, with `pred` and `pred_plain`."""
    return pd.concat([pd.read_csv(part.path) for part in parts], ignore_index=True)


def base_oof(home: Path, table: pd.DataFrame) -> pd.DataFrame:
    """The base's predictions, image_name, pred and pred_plain. Raises: Stop where there are none"""
    parts = oof_parts(Run(home / 'runs' / 'base'), table, range(5))
    if not all(part.path.exists() for part in parts):
        raise cli.Stop('the base comes first: --only base')
    return read_parts(parts)[['image_name', 'pred', 'pred_plain']]


def images_seen(run: Any, table: pd.DataFrame) -> int:
    """Training images that fold 0 of a run has seen, in all its epochs together."""
    config, targets = run.config, table.target[table.fold != 0].to_numpy()
    ratio, loader = config['neg_ratio'], SimpleNamespace()
    Downsample(loader, targets, ratio, config['seed'], config['batch_size'])
    return config['epochs'] * loader.n


def keep(
    name: str,
    row: Row,
    passes: int,
    oof: pd.DataFrame,
    pred: Sequence[float],
    base: Sequence[float],
    about: dict[str, Any],
) -> None:
    """Measure `pred` beside `base`, (n,) each in the order of `oof`, and add it to the CSV."""
    lines, pred, base = [], np.asarray(pred), np.asarray(base)
    for source in SOURCES:
        rows = (oof.source == source).to_numpy() | (source == 'all')
        target, group = oof.target[rows].to_numpy(), oof.group[rows].to_numpy()
        apart = score.compare_paired(target, [pred[rows], base[rows]], 1, group).iloc[0]
        figures = {'auc': apart.auc, 'low': apart.auc_low, 'high': apart.auc_high}
        figures |= {'diff': apart.difference, 'diff_low': apart.difference_low}
        figures |= {'diff_high': apart.difference_high}
        melanomas = int(target.sum())
        line = {'row': name, 'change': row.change, 'folds': oof.fold.nunique(), **about}
        line |= {'passes': passes, 'source': source, 'melanomas': melanomas}
        lines.append(line | {k: round(v, 5) for k, v in figures.items()})
    with locks.held(FIGURES.with_name('.bench_recipe.lock')):
        new = pd.DataFrame(lines).round({'minutes': 1})
        if FIGURES.exists():
            old = pd.read_csv(FIGURES)
            old = old[(old.row != name) | (old.passes != passes)]
            new = pd.concat([old, new], ignore_index=True)
        files.write_csv(FIGURES, new)
    print(f'{name}, {passes} passes: {lines[0]}', flush=True)


def finish_tta(home: Path, table: pd.DataFrame, weights: str) -> None:
    """The base by the number of TTA passes: each of 30 passes is kept, and means are of the first.

    A pass draws the same whatever the number of passes, so that 15 of these are infer.py's own 15.
    """
    run, folder = Run(home / 'runs' / 'base'), home / 'passes'
    parts = oof_parts(run, table, range(5))
    settings = Settings(**SETTINGS | {'n_tta': max(PASSES)})
    paths = {part.k: folder / f'fold{part.k}.csv' for part in parts}
    of_lock, get_preds = {folder / f'.{part.k}.lock': part for part in parts}, Learner.get_preds
    rows = pd.concat([part.rows for part in parts])
    cached = pd.Series(cache(rows, home, run.config['size']), index=rows.image_name)
    for part in locks.claim(of_lock, lambda part: paths[part.k].exists()):
        passes = []

        def record(self: Learner, *args: Any, passes: list = passes, **options: Any) -> Any:
            result = get_preds(self, *args, **options)
            passes.append(result[0][:, 0].numpy())
            return result

        part = replace(part, rows=part.rows.assign(cached=part.rows.image_name.map(cached)))
        print(f'{part}, {settings.n_tta} augmented passes', flush=True)
        with mock.patch.object(Learner, 'get_preds', record):
            predict(part, settings)
        columns = {f'pass{i}': pred for i, pred in enumerate(passes)}  # the plain pass comes last
        files.write_csv(paths[part.k], part.rows[['image_name']].assign(**columns))
    if not all(path.exists() for path in paths.values()):
        return print('tta: another process is at the rest')
    base, oof = base_oof(home, table), read_parts(parts)
    passes = oof.merge(pd.concat(map(pd.read_csv, paths.values())), on='image_name')
    for n in PASSES:
        pred = passes[[f'pass{i}' for i in range(n)] if n else ['pass30']].mean(axis=1)
        if n == 15:
            print(f'apart from infer.py at most {np.abs(pred - passes.pred).max():.1e}')
        other = oof[['image_name']].merge(base)['pred_plain']
        keep(f'tta {n}', Row(f'{n} passes, beside none', n_folds=5), n, oof, pred, other, {})


def finish_fastai(home: Path, table: pd.DataFrame, weights: str) -> None:
    """A plain fastai script as its users would write it, at about the base's training images."""
    import fastai.vision.all as fastai

    size, folds = SMALL['size'], range(FASTAI.n_folds)
    cached = cache(table, home, size)
    table = table.assign(cached=cached, label=table.target.map({0: 'benign', 1: 'melanoma'}))
    paths = {k: home / 'fastai' / f'fold{k}.csv' for k in folds}
    of_lock = {home / 'fastai' / f'.{k}.lock': k for k in folds}
    for k in locks.claim(of_lock, lambda k: paths[k].exists()):
        fastai.set_seed(k)
        frame = table.assign(is_valid=table.fold == k).reset_index(drop=True)
        dls = fastai.ImageDataLoaders.from_df(
            frame, path='/', fn_col='cached', label_col='label', valid_col='is_valid', bs=32,
            num_workers=0, item_tfms=fastai.Resize(size), batch_tfms=fastai.aug_transforms(),
        )  # fmt: skip
        weights_file = {'pretrained_cfg_overlay': {'file': weights}}  # as there is no network
        auc = fastai.RocAucBinary()
        learn = fastai.vision_learner(dls, LITE0, metrics=auc, path=home, **weights_file)
        with learn.no_bar():
            learn.fine_tune(2)
            melanoma = dls.vocab.o2i['melanoma']
            pred, plain = learn.tta()[0], learn.get_preds()[0]
        rows = frame[frame.is_valid][tables.OOF_COLUMNS]
        columns = {'pred': pred[:, melanoma].numpy(), 'pred_plain': plain[:, melanoma].numpy()}
        files.write_csv(paths[k], rows.assign(**columns))
    if not all(path.exists() for path in paths.values()):
        return print('fastai: another process is at the rest')
    oof, base = pd.concat(map(pd.read_csv, paths.values())), base_oof(home, table)
    about = {'images': 3 * int((table.fold != 0).sum()) // 32 * 32}
    for passes, column in ((4, 'pred'), (0, 'pred_plain')):
        other = oof[['image_name']].merge(base)[column]
        keep('fastai', FASTAI, passes, oof, oof[column], other, about)


def finish_blends(home: Path, table: pd.DataFrame, weights: str) -> None:
    """The recipe in miniature: each way of blending beside the best single run, by blend.py."""
    folder, oofs = home / 'miniature', {}
    folds = range(min(ROWS[name].n_folds for name in MEMBERS))
    for name in MEMBERS:
        parts = oof_parts(Run(home / 'runs' / name), table, folds)
        if not all(part.path.exists() for part in parts):
            return print(f'blends: {name} is not predicted yet')
        oofs[name] = read_parts(parts)
        files.write_csv(folder / 'runs' / name / 'oof.csv', oofs[name])
    best = max(oofs, key=lambda n: score.auc(oofs[n].target, oofs[n].pred))
    for how in ('mean', 'rank', 'greedy', 'stack'):
        call('blend.py', '--home', folder, '--how', how)
        oof = pd.read_csv(folder / 'report' / 'oof.csv').merge(
            oofs[best][['image_name', 'pred']], on='image_name', suffixes=('', '_best')
        )
        row = Row(f'{how} of {len(oofs)} models, beside the best ({best})')
        keep(f'blend {how}', row, 15, oof, oof.pred, oof.pred_best, {})


def finish_metadata(home: Path, table: pd.DataFrame, weights: str) -> None:
    """Late fusion: a logistic regression on the base's logit, age, sex and site, in each source.

    It is fitted without the fold that it predicts, and within a source: one fit over all would
    tell the archives apart by what each of them leaves out.
    """
    from scipy.special import logit
    from sklearn.linear_model import LogisticRegression

    base = base_oof(home, table)
    oof = table.merge(base, on='image_name')
    fused = oof.pred.to_numpy().copy()
    for source in oof.source.unique():
        of_source = (oof.source == source).to_numpy()
        rows = oof[of_source]
        x = pd.get_dummies(rows[['sex', 'anatom_site']], dummy_na=True, dtype=float)
        age = rows.age_approx.astype(float)
        x['age'] = age.fillna(age.mean()).fillna(0) / 10
        x['logit'] = logit(rows.pred.clip(1e-6, 1 - 1e-6))
        pred = np.empty(len(rows))
        for k in rows.fold.unique():
            held_out = (rows.fold == k).to_numpy()
            model = LogisticRegression(C=1, max_iter=1000)
            model.fit(x[~held_out], rows.target[~held_out])
            pred[held_out] = model.predict_proba(x[held_out])[:, 1]
        fused[of_source] = pred
    row = Row('late fusion with age, sex and site, fitted within each source', n_folds=5)
    keep('metadata', row, 15, oof, fused, oof.pred, {})


def format_figures(figures: pd.DataFrame) -> str:
    """The table of bench_recipe.csv in Markdown: a line a row and number of passes."""

    def cell(line: Any, names: Sequence[str], digits: str) -> str:
        value, low, high = (line[name] for name in names)
        return f'{value:{digits}} [{low:{digits}}, {high:{digits}}]'

    header = ['changed', 'folds', 'images seen', 'minutes a fold', 'passes', 'AUC', 'difference']
    header += [f'within {source}' for source in SOURCES[1:]]
    lines = [header, ['---'] * len(header)]
    for (_, passes), group in figures.groupby(['row', 'passes'], sort=False):
        of = group.set_index('source')
        first, apart = of.loc['all'], ('diff', 'diff_low', 'diff_high')
        cells = [first.change, first.folds, first.get('images'), first.get('minutes'), passes]
        cells = ['' if pd.isna(c) else f'{c:,.0f}' if not isinstance(c, str) else c for c in cells]
        cells.append(cell(first, ('auc', 'low', 'high'), '.3f'))
        cells += [cell(of.loc[source], apart, '+.3f') for source in SOURCES]
        lines.append(cells)
    return '\n'.join(f'| {" | ".join(map(str, line))} |' for line in lines)


def draw_tta(figures: pd.DataFrame) -> None:
    """The difference that TTA makes by its number of passes, with intervals, as a PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.2), dpi=120, layout='constrained')
    ax = figure.subplots()
    for source in SOURCES:
        lines = figures[figures.row.str.startswith('tta ') & (figures.source == source)]
        x = lines.passes + 0.15 * SOURCES.index(source)
        low, high = lines['diff'] - lines.diff_low, lines.diff_high - lines['diff']
        ax.errorbar(x, lines['diff'], [low, high], marker='o', ms=4, capsize=2, label=source)
    ax.axhline(0, color='gray', lw=0.8)
    ax.set(xlabel='passes of test-time augmentation', ylabel='AUC minus that of the plain pass')
    ax.legend(frameon=False)
    figure.savefig(PICTURE)


if __name__ == '__main__':
    cli.run(main)
