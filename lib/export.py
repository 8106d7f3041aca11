"""Each run as a folder that others use without this project: timm's files and a model card."""

import re
import shlex
from pathlib import Path

import pandas as pd
import timm
from huggingface_hub import EvalResult, ModelCardData
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from lib import calibration, files, locks, model, shortcuts, summary
from lib.cli import Stop
from lib.demo import PREFIX
from lib.parts import Part, join_table, list_parts, pool, read_n_tta
from lib.prior import run_odds
from lib.runs import WEIGHTS, Run, choose_finished
from lib.tables import COMPETITION, ISIC2024, fingerprint, read_labelled

TAG = 'melanoma-classification-export'  # in a card's metadata: the folder may be replaced
EXPORTED = r'README\.md|fold\d+/(model\.safetensors|config\.json)'
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


def write(home: Path, runs: list[Run], out: Path, prior: float | None) -> None:
    """Write OUT/NAME for each of `runs` that is trained in all folds, whole or not at all.

    `prior`: the rate that the card's probabilities are for; None for the competition's own.
    Raises: Stop where infer.py has yet to predict one of them, or OUT/NAME holds something else.
    """
    path, table = home / 'folds.csv', read_labelled(home / 'folds.csv')
    folds = sorted(table.fold.unique().tolist())
    runs = choose_finished(runs, folds, fingerprint(path))
    parts = {run: list_parts(run, table, folds) for run in runs}
    for run, of in parts.items():  # before the first is written
        read_n_tta(of)
        check_free(out / run.name)
    for run, of in parts.items():
        with locks.held(run.lock), files.atomic_folder(out / run.name) as folder:
            for part in of:
                save_fold(part, folder / f'fold{part.k}')
            text = write_card(run, of, join_table(table, pool(of)['oof']), prior)
            files.write_text(folder / 'README.md', text)
        print(f'{out / run.name}: {len(of)} models for timm, and README.md, their card. To upload:')
        print(shlex.join(['hf', 'upload', f'YOUR_NAME/{run.name}', str(out / run.name)]))


def check_free(folder: Path) -> None:
    """Raises: Stop where `folder` holds anything but an earlier export, which may be replaced."""
    card = folder / 'README.md'
    is_export = card.is_file() and TAG in card.read_text(errors='replace')
    there = [folder] if folder.is_file() else [p for p in folder.rglob('*') if not p.is_dir()]
    names = {p: p.relative_to(folder).as_posix() for p in there}
    others = [p for p, name in names.items() if not (is_export and re.fullmatch(EXPORTED, name))]
    if others:
        why = f'{others[0]} is not of an earlier export, so it is left alone'
        raise Stop(f'{why}; choose another folder for --export')


def save_fold(part: Part, folder: Path) -> None:
    """Write what timm.create_model('local-dir:FOLDER', pretrained=True) loads.

    Its config.json holds the preprocessing as timm reads it, for images that are square already.
    Raises: Stop where the fold's weights are not those of the run's architecture.
    """
    config, size = part.run.config, part.run.config['size']
    net = model.load(config['arch'], size, part.weights)
    known = {k: v for k, v in net.pretrained_cfg.items() if not k.startswith('test_')}
    # into the model's own description, since only the newest timm takes a data_config
    net.pretrained_cfg = known | {'mean': config['mean'], 'std': config['std'], 'crop_pct': 1.0}
    net.pretrained_cfg |= {'input_size': (3, size, size), 'pool_size': None, 'crop_mode': 'center'}
    net.pretrained_cfg |= {'interpolation': 'lanczos', 'custom_load': False}
    args = {'img_size': size} if known.get('fixed_input_size') else None
    names, path = {'label_names': ['melanoma']}, folder / WEIGHTS
    timm.models.save_for_hf(net, folder, names, args, safe_serialization=True)
    path.chmod(path.with_name('config.json').stat().st_mode)  # others may read the weights too


def choose_licence(sources: list[str]) -> str:
    """The licence of weights trained on `sources`, in the hub's words: the strictest of theirs."""
    licences = [SOURCES[source][1] if source in SOURCES else 'unknown' for source in sources]
    return next((name for name in (NON_COMMERCIAL, 'unknown') if name in licences), 'mit')


def write_card(run: Run, parts: list[Part], oof: pd.DataFrame, prior: float | None) -> str:
    """The model card of a run, by lib/card.jinja, with the metadata of the Hugging Face hub.

    `oof`: what parts.join_table returns. Calibration is that of the plain pass, which is what the
    card's example computes.
    """
    of_image = oof.source.mask(oof.image_name.str.startswith(PREFIX), 'demo')
    columns = {'images': ('target', 'size'), 'melanomas': ('target', 'sum')}
    counts = oof.groupby(of_image).agg(**columns, groups=('group', 'nunique')).to_dict('index')
    passes = {'plain pass': 'pred_plain'}
    if n := read_n_tta(parts):
        passes[f'mean of {n} augmented passes'] = 'pred'
    scores = {label: summary.summarize(oof, column) for label, column in passes.items()}
    floor, plain = shortcuts.measure(oof), oof.assign(pred=oof.pred_plain)
    blend = {'odds': run_odds(run, oof.target), 'of_ranks': False, 'calibrate': None}
    page = {'facts': calibration.add_prob(plain, None, blend | {'prior': prior})[2]}
    page |= {'name': run.name, 'config': run.config, 'folds': [part.k for part in parts]}
    page |= {'sources': SOURCES, 'counts': counts, 'licence': choose_licence(list(counts))}
    page |= {'plain': scores['plain pass'], 'passes': list(passes), 'floor': floor}
    page['table'] = summary.tabulate(scores | {'shortcut floor': floor})
    page['metadata'] = card_metadata(run.name, page['licence'], scores).to_yaml()
    page |= {'summary': summary, 'shortcuts': shortcuts, 'calibration': calibration}
    style = {'trim_blocks': True, 'lstrip_blocks': True, 'undefined': StrictUndefined}
    environment = Environment(loader=FileSystemLoader(Path(__file__).parent), **style)
    return environment.get_template('card.jinja').render(page) + '\n'


def card_metadata(name: str, licence: str, scores: dict[str, dict]) -> ModelCardData:
    """The card's metadata for the hub: licence, tags, and the AUC pooled and by source."""
    task, results = 'image-classification', []
    for label, of in scores.items():
        for source, figures in ({'all sources': of['pooled']} | of.get('sources', {})).items():
            if 'auc' in figures:
                value, *interval = figures['auc']
                dataset = f'{SOURCES.get(source, [source])[0]}, out of fold'
                about = {'metric_name': f'AUC, {label}', 'metric_args': {'interval_95': interval}}
                results.append(EvalResult(task, source, dataset, 'roc_auc', value, **about))
    return ModelCardData(
        license=licence, library_name='timm', pipeline_tag=task, model_name=name,
        tags=['melanoma', TAG], metrics=['roc_auc'], eval_results=results or None,
    )  # fmt: skip
