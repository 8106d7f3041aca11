"""The demo's data set: synthetic lesions in Kaggle's layout, drawn from a seed.

It is not medical data; it serves to try and to test the scripts without any. Melanomas differ from
benign lesions in four traits that dermatology teaches: asymmetry, border, colours and diameter. The
classes overlap in each of them. Hair, vignette, light and skin vary independently of the class.
"""

from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image
from scipy.ndimage import gaussian_filter

from lib import files
from lib.cli import Stop
from lib.locks import held

PREFIX = 'DEMO_'  # of its images' names
MELANOMA_RATE = 0.18
SHIFT = 1.7  # between the classes in each trait, in standard deviations
HEIGHT, WIDTH = 96, 128  # pixels
SITES = ['torso', 'lower extremity', 'upper extremity', 'head/neck']


def make(home: Path, n_train: int = 500, n_test: int = 100) -> Path:
    """Write train.csv, test.csv, sample_submission.csv and jpeg/ to `home`, and return that.

    A demo that is there already is kept. Raises: Stop where `home` holds other data.
    """
    label, last = home / 'SYNTHETIC.txt', home / 'train.csv'
    with held(home / '.lock'):  # another process may make it
        if label.exists() and last.exists():
            return home
        if last.exists():
            raise Stop(f'{home} holds data that --demo did not make; move it away first')
        text = 'Drawn by a program (python folds.py --demo). These images are not medical data.\n'
        files.write_text(label, text)
        rng, tables = np.random.default_rng(0), {}
        for split, n, first in (('train', n_train, 0), ('test', n_test, n_train)):
            tables[split] = rows = _draw_table(rng, n, first, split)
            for name, target in zip(rows.image_name, rows.target, strict=True):
                with files.atomic(home / 'jpeg' / split / f'{name}.jpg') as temporary:
                    Image.fromarray(draw(rng, target)).save(temporary, 'JPEG', quality=90)
        test = tables['test'].drop(columns=['target', 'diagnosis', 'benign_malignant'])
        submission = test[['image_name']].iloc[rng.permutation(n_test)].assign(target=0)
        files.write_csv(home / 'sample_submission.csv', submission)
        files.write_csv(home / 'test.csv', test)
        files.write_csv(last, tables['train'])  # written last: then all is there
    return home


def _draw_table(rng: np.random.Generator, n: int, first: int, split: str) -> pd.DataFrame:
    """A table in Kaggle's columns: several images a patient, some ages and sexes missing."""
    patients = np.repeat(np.arange(n), rng.integers(1, 11, size=n))[:n]
    target = (rng.random(n) < MELANOMA_RATE).astype(int)
    age = np.clip(rng.normal(50, 15, size=n)[patients] // 5 * 5, 10, 90)
    sex = rng.choice(['male', 'female'], size=n)[patients]
    rows = pd.DataFrame(
        {
            'image_name': [f'{PREFIX}{first + i:05d}' for i in range(n)],
            'patient_id': [f'{split.upper()}_{patient:04d}' for patient in patients],
            'sex': np.where(rng.random(n) < 0.05, None, sex),
            'age_approx': np.where(rng.random(n) < 0.05, np.nan, age),
            'anatom_site_general_challenge': rng.choice(SITES, size=n),
            'diagnosis': np.where(target, 'melanoma', 'nevus'),
            'benign_malignant': np.where(target, 'malignant', 'benign'),
            'target': target,
        }
    )
    return rows.iloc[rng.permutation(n)]


def draw(rng: np.random.Generator, target: int) -> np.ndarray:
    """One image: (HEIGHT, WIDTH, 3) uint8."""
    asymmetry, border, colours, diameter = rng.normal(SHIFT * target, 1, size=4)
    y, x = np.mgrid[:HEIGHT, :WIDTH].astype(float)
    skin = rng.uniform(0.7, 1) * np.array([245, 195, 170]) + rng.normal(0, 6, size=3)
    image = skin + 5 * _noise(rng, 3)[..., None]

    # the lesion: an ellipse, skewed by asymmetry, its border waved, its edge blurred
    x, y = x - WIDTH / 2 + rng.normal(0, 4), y - HEIGHT / 2 + rng.normal(0, 4)
    turn = rng.uniform(0, 2 * np.pi)
    along, across = x * np.cos(turn) + y * np.sin(turn), y * np.cos(turn) - x * np.sin(turn)
    angle = np.arctan2(across, along)
    radius = 22 * np.exp(0.14 * diameter) * (1 + 0.11 * np.exp(0.5 * asymmetry) * np.cos(angle))
    for wave in (5, 8, 13):
        phase = rng.uniform(0, 2 * np.pi)
        radius *= 1 + 0.02 * np.exp(0.55 * border) * np.cos(wave * angle + phase)
    inside = 1 / (1 + np.exp((np.hypot(along, 1.2 * across) - radius) / 1.5))

    # its colours: a brown, and patches of black, red and blue-grey, more of them with `colours`
    pigment = rng.uniform([95, 55, 35], [150, 95, 70]) + 12 * _noise(rng, 4)[..., None]
    for tone in ([45, 30, 30], [165, 60, 60], [105, 110, 130]):
        patch = 1 / (1 + np.exp(-6 * (_noise(rng, 7) - 1.5 + 0.5 * colours)))
        pigment += patch[..., None] * (np.array(tone) - pigment)
    image += inside[..., None] * (pigment - image)

    # hair, vignette, light and grain, which do not depend on the class
    t = np.linspace(0, 1, 2 * WIDTH)[:, None]
    for _ in range(rng.poisson(2)):  # a hair is a dark arc
        start, middle, end = rng.uniform([0, 0], [WIDTH, HEIGHT], size=(3, 2))
        curve = (1 - t) ** 2 * start + 2 * t * (1 - t) * middle + t**2 * end
        column, row = curve.astype(int).T
        image[row, column] = rng.uniform(20, 60)
    corner = np.hypot(x / WIDTH, y / HEIGHT)
    image *= 1 - rng.uniform(0, 1.2) * np.clip(corner - 0.35, 0, None)[..., None]
    image *= rng.uniform(0.85, 1.15) + rng.uniform(-0.15, 0.15) * (x / WIDTH)[..., None]
    image += rng.normal(0, 3, size=image.shape)
    return np.clip(image, 0, 255).astype(np.uint8)


def _noise(rng: np.random.Generator, sigma: float) -> np.ndarray:
    """Smooth noise of mean 0 and standard deviation 1: (HEIGHT, WIDTH)."""
    noise = gaussian_filter(rng.normal(size=(HEIGHT, WIDTH)), sigma)
    return (noise - noise.mean()) / noise.std()
