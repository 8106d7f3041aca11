"""The flags of train.py: checked, turned into a run's name, and saved in config.json."""

import platform
import re
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from lib import cli, devices, files, ranks, tables
from lib.cli import Stop
from lib.model import describe_arch
from lib.runs import MAX_SIZE, Run, hash_code, run_folder

# Flags that may change between two starts of a run; config.json leaves them out
NOT_IN_CONFIG = ('home', 'name', 'fold', 'lr_find', 'workers', 'precision', 'log')


def check(flags: dict[str, Any]) -> None:
    """Check the flags of train.py. Raises: Stop where one is wrong or two contradict each other."""
    cli.check_within(64, MAX_SIZE, size=flags['size'])
    cli.check_within(1, **{k: flags[k] for k in ('epochs', 'accumulate')})
    cli.check_within(2, batch_size=flags['batch_size'])  # one image has no batch statistics
    cli.check_within(0, **{k: flags[k] for k in ('lr_min', 'lr_max', 'wd', 'neg_ratio', 'seed')})
    cli.check_within(0, 256, workers=flags['workers'])
    low, high = flags['lr_min'], flags['lr_max']
    if not 0 < low <= high < 10:
        raise Stop(f'expected 0 < --lr_min <= --lr_max < 10, found {low} and {high}')
    if flags['weights'] is not None and not flags['pretrained']:
        raise Stop('--weights and --nopretrained contradict each other; leave one out')
    if flags['lr_find'] and ranks.WORLD > 1:
        raise Stop('--lr_find runs in one process; start it without a launcher')
    cli.check_one_of((None, 'tensorboard', 'wandb'), log=flags['log'])
    if log := flags['log']:
        try:
            version(log)  # a folder named wandb, as wandb makes, could be imported too
        except PackageNotFoundError:
            raise Stop(f'--log {log} needs a package that is not here: pip install {log}') from None


def open_run(
    flags: dict[str, Any], defaults: dict[str, Any]
) -> tuple[Run, pd.DataFrame, list[int]]:
    """The run that train.py's `flags` ask for, the labelled rows of folds.csv, the folds to train.

    Raises: Stop where a flag or the table is wrong, where a patient is in two folds, or where the
    run has begun with other flags or on other labelled rows.
    """
    check(flags)
    home, about = Path(flags['home']), describe_arch(flags['arch'])
    if about['arch'] != flags['arch']:
        print(f'timm has renamed {flags["arch"]} to {about["arch"]}')
    table, fold = tables.read_labelled(home / 'folds.csv'), flags['fold']
    folds = sorted(table.fold.unique().tolist())
    if fold is not None and fold not in folds:
        raise Stop(f'--fold {fold} is not in folds.csv, which has {folds[0]} to {folds[-1]}')
    config = {flag: value for flag, value in flags.items() if flag not in NOT_IN_CONFIG}
    about |= {'command': cli.command('train.py', config, defaults)}
    about |= {'folds_sha256': tables.fingerprint(table), 'code_sha256': hash_code()}
    name = flags['name'] or make_name(config, defaults)
    if flags['weights']:
        path = Path(flags['weights'])
        config |= {'weights': path.name, 'weights_sha256': files.sha256(path)}
    run = Run(run_folder(home, name), config | about)
    run.check()
    run.warn_of_code()
    return run, table, folds if fold is None else [fold]


def make_name(flags: dict[str, Any], defaults: dict[str, Any]) -> str:
    """A folder's name from the flags that differ from their defaults, else the architecture's.

    It is for people: nothing ever reads a flag out of it.
    """
    words = []
    for flag, value in flags.items():
        if value != defaults[flag]:
            word = flag if value is True else f'no{flag}' if value is False else f'{flag}-{value}'
            words.append(re.sub(r'[^\w.+-]', '', word.removeprefix('arch-')))
    return '_'.join(words).lstrip('.') or flags['arch']


def describe_environment(
    device: torch.device, precision: str, scoring_precision: str
) -> dict[str, Any]:
    """Device, versions and the code's commit, on which a result may depend beside the flags."""
    packages = ('fastai', 'torch', 'torchvision', 'timm', 'kornia', 'numpy', 'pillow')
    about = {'device': devices.describe(device), 'processes': ranks.WORLD}
    about |= {'precision': precision, 'scoring_precision': scoring_precision}
    versions = {package: version(package) for package in packages}
    return about | {'python': platform.python_version()} | versions | {'commit': _commit()}


def _commit() -> str | None:
    """The git commit of this code, with '-dirty' where files have changed; None without git."""
    describe = ['git', 'describe', '--always', '--dirty', '--abbrev=40', '--match=']
    here = Path(__file__).parent
    try:
        out = subprocess.run(describe, cwd=here, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return out.stdout.strip()
