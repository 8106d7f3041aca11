"""How time and memory grow with the number of images. Run by hand:

python tests/bench_growth.py                    # 1,000, 10,000 and 100,000 labelled images
python tests/bench_growth.py --rows 1000,10000 --tables 0

Each step is a command of its own, its imports included: processor seconds, which do not depend on
what else the machine does, and the peak memory of its largest process. The images are a few small
ones under many names (links); the model is timm's smallest, so that what is measured is the code
around it. The last column is the exponent of the last step in size: 1 is linear, and n log n
between these sizes is 1.1.
"""

import math
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import pandas as pd  # noqa: E402
from PIL import Image  # noqa: E402

from lib import cli, files  # noqa: E402

MODEL = ['--arch', 'test_resnet', '--nopretrained', '--size', 64, '--epochs', 1, '--name', 'small']
CACHE = 'import sys; from pathlib import Path; from lib import images, tables; home = Path(sys.argv[1]); images.cache(tables.read_folds(home / "folds.csv"), home, 64)'  # fmt: skip # noqa: E501


def main(*, rows: str = '1000,10000,100000', tables: int = 1_000_000) -> None:
    """Time every step at several sizes, and print a table.

    Args:
        rows: numbers of labelled images, with commas between; a third as many are test images.
        tables: a further size, at which folds.py and blend.py alone are run; 0 for none.
    """
    sizes, seconds, peaks = [int(n) for n in rows.split(',')], {}, {}
    with tempfile.TemporaryDirectory() as folder:
        for n in [*sizes, *([tables] if tables else [])]:
            home = Path(folder, str(n))
            layout(home, n)
            steps = {'folds.py': script('folds.py', '--data', home, '--n_folds', 2)}
            if n in sizes:
                steps |= {
                    'the cache': [sys.executable, '-c', CACHE],
                    'train.py, an epoch and a fold': script('train.py', *MODEL, '--fold', 0),
                    'the other fold': script('train.py', *MODEL, '--fold', 1),
                    'infer.py, 1 + 1 passes': script('infer.py', '--n_tta', 1),
                }
            steps['blend.py'] = script('blend.py')
            for name, command in steps.items():
                if name == 'blend.py' and n not in sizes:
                    made_up_run(home, Path(folder, str(sizes[0])))
                seconds[name, n], peaks[name, n] = timed(command, home)
                print(f'{n} {name}: {seconds[name, n]:.1f} s, {peaks[name, n]:.0f} MB', flush=True)
    for title, figures in (('processor seconds', seconds), ('peak MB', peaks)):
        table = pd.Series(figures).unstack().reindex(dict.fromkeys(step for step, _ in figures))
        table['exponent'] = [exponent(row.dropna()) for _, row in table.iterrows()]
        print(f'\n{title}\n{table.round(2).to_string(na_rep="")}')


def exponent(row: pd.Series) -> float:
    """b of time ~ n ** b between the two largest sizes."""
    if len(row) < 2:
        return float('nan')
    (n, m), (a, b) = row.index[-2:], row.iloc[-2:]
    return math.log(b / a) / math.log(m / n)


def script(name: str, *args: object) -> list[str]:
    return [sys.executable, str(ROOT / name), *map(str, args), '--home']


def timed(command: list[str], home: Path) -> tuple[float, float]:
    """Processor seconds, and peak resident MB, of a command that ends with the home."""
    log = home / 'log'
    with open(log, 'w') as f:
        process = subprocess.Popen([*command, str(home)], cwd=ROOT, stdout=f, stderr=f)
        _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f'{command} failed:\n{log.read_text()}')
    return usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024


def layout(home: Path, n: int) -> None:
    """Kaggle's layout with `n` labelled images, 1.76 % melanomas, 16 images a patient."""
    from lib.demo import draw

    rng = np.random.default_rng(0)
    for split, count in (('train', n), ('test', n // 3)):
        folder = home / 'jpeg' / split
        folder.mkdir(parents=True)
        names = [f'ISIC_{split}_{i:07d}' for i in range(count)]
        for i, name in enumerate(names):
            source = home / 'jpeg' / f'{i % 7}_{i // 50_000}.jpg'  # a file has 65,000 links at most
            if not source.exists():
                Image.fromarray(draw(rng, i % 2)).save(source)
            os.link(source, folder / f'{name}.jpg')
        table = pd.DataFrame({'image_name': names})
        table['patient_id'] = [f'{split}_{i // 16}' for i in rng.permutation(count)]
        table['sex'], table['age_approx'] = 'female', 50
        table['anatom_site_general_challenge'] = 'torso'
        table['width'], table['height'] = 128, 96
        if split == 'train':
            target = (rng.random(count) < 0.0176).astype(int)
            table['diagnosis'] = 'unknown'
            table['benign_malignant'] = np.where(target, 'malignant', 'benign')
            table['target'] = target
        else:
            files.write_csv(home / 'sample_submission.csv', table[['image_name']].assign(target=0))
        files.write_csv(home / f'{split}.csv', table)


def made_up_run(home: Path, other: Path) -> None:
    """The run of another home, as if it had been trained and predicted with on this table."""
    run = shutil.copytree(other / 'runs' / 'small', home / 'runs' / 'small')
    digest = files.sha256(home / 'folds.csv')
    for name in ('config.json', 'infer.json'):
        about = files.read_json(run / name) | {'folds_sha256': digest}
        files.write_json(run / name, about)
    table, rng = pd.read_csv(home / 'folds.csv', low_memory=False), np.random.default_rng(0)
    for name, split in (('oof.csv', 'train'), ('test.csv', 'test')):
        columns = pd.read_csv(other / 'runs' / 'small' / name, nrows=1).columns
        rows = table[table.split == split].reindex(columns=columns)
        for column in set(columns) - set(table.columns):
            rows[column] = rng.random(len(rows))
        if split == 'train':
            rows = rows.astype({'fold': int, 'target': int})
        files.write_csv(run / name, rows)


if __name__ == '__main__':
    cli.run(main)
