"""Each run as a folder that others use without this project: timm's files and a model card."""

import shlex
import shutil
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
import timm
import torch
from huggingface_hub import ModelCardData

from lib import calibration, files, model, report, shortcuts, summary
from lib.cli import Stop
from lib.demo import PREFIX
from lib.parts import Part, join_table, list_parts, read_n_tta
from lib.runs import WEIGHTS, Run, choose_finished
from lib.tables import COMPETITION, EXACT, ISIC2024, read_labelled
from lib.thresholds import tabulate_thresholds

NON_COMMERCIAL = 'cc-by-nc-4.0'
SOURCES = {  # what a source is called, its licence in the hub's words, and where it comes from
    COMPETITION: ('SIIM-ISIC 2020', NON_COMMERCIAL, 'https://doi.org/10.34970/2020-ds01'),
    ISIC2024: ('ISIC 2024', NON_COMMERCIAL, 'https://doi.org/10.34970/2024-slice-3d'),
    'isic2020': ('SIIM-ISIC 2020', NON_COMMERCIAL, 'https://doi.org/10.34970/2020-ds01'),
    'isic2019': ('ISIC 2019', NON_COMMERCIAL, 'https://challenge.isic-archive.com/data/#2019'),
    'isic2017': ('ISIC 2017', 'cc0-1.0', 'https://challenge.isic-archive.com/data/#2017'),
    'ham10000': ('HAM10000', NON_COMMERCIAL, 'https://doi.org/10.7910/DVN/DBW86T'),
    'demo': ('images drawn by a program', 'mit', None),  # in folds.csv the competition's
}
LICENCES = {'CC-0': 'cc0-1.0', 'CC-BY': 'cc-by-4.0', 'CC-BY-NC': NON_COMMERCIAL}  # the archive's


def write_exports(home: Path, runs: list[Run], out: Path, prior: float | None) -> None:
    """Write OUT/NAME for each of `runs` that is trained in all folds, with a card.

    `prior`: the rate that the card's probabilities are for; None for the competition's own. A
    folder has a hidden name until it is whole. Raises: Stop where infer.py has yet to predict one
    of the runs, or where OUT/NAME exists.
    """
    if out.is_file():
        raise Stop(f'--export {out} is a file; name a folder')
    table = read_labelled(home / 'folds.csv')
    parts = {run: list_parts(run, table) for run in choose_finished(runs, table)}
    for run in parts:  # before the first is written
        read_n_tta(parts[run])
        if (out / run.name).exists():
            raise Stop(f'{out / run.name} exists; move it away, or choose another --export')
    for run in parts:
        hidden = out / f'.{run.name}.part'
        shutil.rmtree(hidden, ignore_errors=True)  # of a killed process
        for part in parts[run]:
            save_fold(part, hidden / f'fold{part.k}')
        files.write_text(hidden / 'README.md', write_card(run, parts[run], table, prior))
        hidden.rename(out / run.name)
        print(f'{out / run.name}: {len(parts[run])} models for timm, and their card. To upload:')
        print(shlex.join(['hf', 'upload', f'YOUR_NAME/{run.name}', str(out / run.name)]))


def save_fold(part: Part, folder: Path) -> None:
    """Write what timm.create_model('local-dir:FOLDER', pretrained=True) loads.

    Its config.json holds the preprocessing as timm reads it, for images that are square already.
    Raises: Stop where the fold's weights are not those of the run's architecture.
    """
    config, size = part.run.config, part.run.config['size']
    net = model.load(config['arch'], size, part.weights)
    net = net.to(memory_format=torch.contiguous_format)  # safetensors takes no other
    known = {k: v for k, v in net.pretrained_cfg.items() if not k.startswith('test_')}
    # into the model's own description, since only the newest timm takes a data_config
    net.pretrained_cfg = known | {'mean': config['mean'], 'std': config['std'], 'crop_pct': 1.0}
    net.pretrained_cfg |= {'input_size': (3, size, size), 'pool_size': None, 'crop_mode': 'center'}
    net.pretrained_cfg |= {'interpolation': 'lanczos', 'custom_load': False}
    args = {'img_size': size} if known.get('fixed_input_size') else None
    names, path = {'label_names': ['malignant']}, folder / WEIGHTS
    timm.models.save_for_hf(net, folder, names, args, safe_serialization=True)
    path.chmod(path.with_name('config.json').stat().st_mode)  # others may read the weights too


def choose_licence(licences: Sequence[str]) -> str:
    """The licence of weights trained on images of `licences`, all in the hub's words: the strictest
    of them."""
    order = (NON_COMMERCIAL, 'unknown', 'cc-by-4.0')
    return next((name for name in order if name in licences), 'mit')


def write_card(run: Run, parts: list[Part], table: pd.DataFrame, prior: float | None) -> str:
    """The model card of a run, by lib/card.jinja, with the metadata of the Hugging Face hub.

    `table`: the labelled rows of folds.csv. Calibration is that of the plain pass, which is what
    the card's example computes.
    """
    oof = pd.read_csv(run.folder / 'oof.csv', dtype={'image_name': str}, **EXACT)
    oof = join_table(table, oof)
    passes = {'plain pass': 'pred_plain'}
    if n := read_n_tta(parts):
        passes[f'mean of {n} augmented passes'] = 'pred'
    scores = {label: summary.summarize(oof, column) for label, column in passes.items()}
    plain, (floor, floor_sentence) = scores['plain pass'], shortcuts.measure(oof)
    fitted = calibration.calibrate(oof.assign(pred=oof.pred_plain), prior)
    path = run.home / 'attribution.csv'
    credits = pd.read_csv(path) if path.exists() else pd.DataFrame()
    sources = describe_sources(oof, credits)
    licence = choose_licence(sources.licence.tolist())
    owners = credits.get('attribution', pd.Series(dtype=str)).dropna().unique()
    page = {'name': run.name, 'config': run.config, 'folds': [part.k for part in parts]}
    page |= {
        'sources': sources,
        'owners': '; '.join(owners),
        'licence': licence,
        'passes': list(passes),
        'fitted': fitted,
    }
    page |= {'auc': summary.format_rows(plain[plain.label == summary.POOLED])[0]}
    page |= {'unit': summary.resampling_unit(oof), 'floor': report.sentence(floor_sentence)}
    page |= {'has_sources': oof.source.nunique() > 1}
    page['has_skin_tone'] = oof.skin_tone.notna().any()
    page |= {'figures': summary.tabulate(scores | {'shortcut floor': floor})}
    page |= {'subgroups': summary.tabulate_subgroups(plain), 'quality': None}
    if not fitted.quality.empty:
        page |= {'quality': calibration.tabulate_quality(fitted.quality)}
        page |= {'thresholds': tabulate_thresholds(fitted.thresholds)}
    page['metadata'] = ModelCardData(
        license=licence, library_name='timm', pipeline_tag='image-classification',
        tags=['melanoma'], metrics=['roc_auc'],
    ).to_yaml()  # fmt: skip
    return report.render('card.jinja', page) + '\n'


def describe_sources(oof: pd.DataFrame, credits: pd.DataFrame) -> pd.DataFrame:
    """What the models were trained on, as text, a line for each source. `credits`: attribution.csv,
    of the sources whose tables name a licence of each image; perhaps empty."""
    of_image = oof.source.mask(oof.image_name.str.startswith(PREFIX), 'demo')
    columns = {'images': ('target', 'size'), 'malignant': ('target', 'sum')}
    counts = oof.groupby(of_image).agg(**columns, groups=('group', 'nunique'))
    of_sources = dict(SOURCES)
    for source, rows in credits.groupby('source') if len(credits) else ():
        licences = [LICENCES.get(licence, 'unknown') for licence in rows.licence]
        of_sources.setdefault(source, (source, choose_licence(licences), None))
    known = [of_sources.get(source, (None, 'unknown', None)) for source in counts.index]
    names = [f'[{name}]({url})' if url else name or '' for name, _, url in known]
    unit = summary.name_groups(oof)
    table = counts.map(str).rename(columns={'groups': unit})
    table = counts.map(str).drop(columns='groups') if unit == 'images' else table
    table.insert(0, 'images of', names)
    return table.assign(licence=[licence for _, licence, _ in known])
