"""Pictures of a run: what training leaves behind, as PNG, and heat maps, as JPEG."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont

from lib.files import atomic, write_csv

BLUE, RED = '#3f7fbf', '#d2603a'


def draw_history(path: Path, rows: Sequence[dict[str, float]]) -> None:
    """Save the rows of a fold's history.csv as PNG: losses, AUC and learning rate by epoch."""
    history = pd.DataFrame(rows)
    figure = Figure(figsize=(12, 3.6), layout='constrained')
    loss, auc, lr = figure.subplots(1, 3)
    # Even without overfitting the losses differ, since the images do; so the legend tells them.
    training, held_out = 'training, augmented', 'held out, up to 4 benign to 1'
    loss.plot(history.epoch, history.train_loss, color=BLUE, marker='.', label=training)
    loss.plot(history.epoch, history.valid_loss, color=RED, marker='.', label=held_out)
    loss.legend()
    auc.plot(history.epoch, history.auc, color=RED, marker='.')
    lr.plot(history.epoch, history.lr, color=BLUE, marker='.')
    labels = 'loss (binary cross-entropy)', 'AUC, held out', 'learning rate at the end'
    for axes, label in zip((loss, auc, lr), labels, strict=True):
        axes.set(ylabel=label, xlabel='epoch')
        axes.xaxis.get_major_locator().set_params(integer=True)
    _save(figure, path)


def draw_batch(path: Path, x: Any, y: Any, mean: Sequence[float], std: Sequence[float]) -> None:
    """Save the first images of a training batch as the model sees them, as PNG.

    `x`: (B, 3, H, W) float tensor, augmented and normalized with `mean` and `std`; `y`: (B,) 0/1.
    """
    shown = np.clip(np.moveaxis(x[:16].cpu().numpy(), 1, 3) * std + mean, 0, 1)
    lines = -(-len(shown) // 8)
    figure = Figure(figsize=(1.8 * min(len(shown), 8), 2 * lines), layout='constrained')
    for i, image in enumerate(shown):
        axes = figure.add_subplot(lines, min(len(shown), 8), i + 1)
        axes.imshow(image)
        axes.axis('off')
        axes.set_title('malignant' if y[i] else 'benign', fontsize=9)
    _save(figure, path)


def draw_heat_maps(folder: Path, rows: pd.DataFrame, maps: np.ndarray) -> str:
    """Save images with their heat maps beside them, as JPEG, and the table of them, heat.csv.

    `rows`: image_name, pred, cached and what else is known of the images; `maps`: (n, h, w) logits.
    Returns: a sentence that says what the colours mean.
    """
    cells = ' x '.join(map(str, maps.shape[1:]))
    scale = max(float(np.percentile(abs(maps), 95)), 1e-6)  # the highest cells would pale the rest
    legend = (
        f'red: for malignant, blue: against, in full colour from {scale:.3g} logits on; {cells} '
        'cells; it shows where, not why'
    )
    if min(maps.shape[1:]) < 4:
        legend += '\nSo few cells tell little; a larger --size has more'
    kinds = rows.target.map({1: 'malignant', 0: 'benign'}) + rows.pred.map(' {:.4f} '.format)
    captions = kinds + rows.image_name
    rows = rows.assign(picture=captions.str.replace(' ', '_') + '.jpg')
    for row, caption, values in zip(rows.itertuples(), captions, maps / scale, strict=True):
        _draw_heat(folder / row.picture, row.cached, values, f'{caption}\n{legend}')
    write_csv(folder / 'heat.csv', rows.drop(columns=['path', 'cached']).sort_values('picture'))
    return f'{len(rows)} images, ' + legend.replace('\n', '. ')


def _draw_heat(path: Path, image: Path, values: np.ndarray, text: str) -> None:
    """Save a square image, its heat map beside it, and `text` below both.

    `values`: (h, w), enlarged bilinearly over the image in grey: 1 is full red, -1 full blue.
    """
    side = 400  # pixels
    with Image.open(image) as cached:
        plain = cached.convert('RGB').resize((side, side), Image.Resampling.LANCZOS)
    cells = Image.fromarray(values.astype(np.float32))
    enlarged = np.asarray(cells.resize((side, side), Image.Resampling.BILINEAR))[..., None]
    strength = 0.65 * np.clip(abs(enlarged), 0, 1)
    colour = np.where(enlarged > 0, (215, 25, 25), (25, 70, 215))
    grey = 80 + 0.6 * np.asarray(plain.convert('L'))[..., None]  # light: colours show on dark spots
    mixed = (1 - strength) * grey + strength * colour
    height = side + 10 + 17 * len(text.splitlines())
    picture = Image.new('RGB', (2 * side, height), 'white')
    picture.paste(plain, (0, 0))
    picture.paste(Image.fromarray(mixed.astype(np.uint8)), (side, 0))
    font = ImageFont.load_default(14)
    ImageDraw.Draw(picture).text((6, side + 4), text, 'black', font)
    with atomic(path) as temporary:
        picture.save(temporary, 'JPEG', quality=90)


def _save(figure: Figure, path: Path) -> None:
    with atomic(path) as temporary:
        figure.savefig(temporary, dpi=120)
