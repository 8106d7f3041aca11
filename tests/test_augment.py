"""The recipe's augmentation: order and ranges, where it applies, and what it never touches."""

import torch
from fastai.vision.all import Pipeline, TensorImage
from kornia.constants import Resample, SamplePadding

from lib.augment import Augment, batch_tfms

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)


def batch(n=4, side=32) -> TensorImage:
    generator = torch.Generator().manual_seed(0)
    return TensorImage(torch.randint(0, 256, (n, 3, side, side), generator=generator).byte())


def modules(cutout=True):
    return {
        type(m).__name__: m
        for tfm in batch_tfms(MEAN, STD, cutout)
        if isinstance(tfm, Augment)
        for m in tfm.modules
    }


def normalized(x):
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (MEAN, STD))
    return (x.float() / 255 - mean) / std


def test_the_order_is_the_recipes():
    steps = Pipeline(batch_tfms(MEAN, STD, cutout=True)).fs
    inner = [m for step in steps for m in (step.modules if type(step) is Augment else [step])]
    recipe = 'IntToFloatTensor RandomAffine RandomHorizontalFlip ColorJiggle Normalize'
    assert [type(m).__name__ for m in inner] == [*recipe.split(), 'RandomErasing']
    assert 'RandomErasing' not in modules(cutout=False)


def test_what_is_drawn_stays_in_the_recipes_ranges_and_fills_them():
    torch.manual_seed(0)
    x = torch.rand(500, 3, 32, 32)
    drawn = {}
    for name, module in modules().items():
        module(x)
        drawn[name] = module._params
    affine, jiggle = drawn['RandomAffine'], drawn['ColorJiggle']
    for values, low, high in [
        (affine['angle'], -180, 180),
        (affine['translations'] / 32, -0.02, 0.02),
        (jiggle['saturation_factor'], 0.7, 1.3),
        (jiggle['contrast_factor'], 0.8, 1.2),
        (jiggle['brightness_factor'] - 1, -0.1, 0.1),
        (jiggle['hue_factor'], 0, 0),
    ]:
        assert low - 1e-6 <= values.min() and values.max() <= high + 1e-6
        assert values.max() - values.min() >= 0.95 * (high - low)
    assert (affine['batch_prob'] == 1).all() and (jiggle['batch_prob'] == 1).all()
    for name in ('RandomHorizontalFlip', 'RandomErasing'):
        assert 0.4 < drawn[name]['batch_prob'].float().mean() < 0.6
    erased = drawn['RandomErasing']
    share = erased['widths'] * erased['heights'] / 32**2
    assert share.min() >= 0.01 and share.max() <= 0.11  # whole pixels of .02 to .1
    ratio = erased['widths'] / erased['heights']
    assert 0.2 < ratio.min() < 0.5 and 2 < ratio.max() < 4  # rectangles, lying and upright


def test_what_comes_in_from_outside_is_black_and_pixels_are_interpolated():
    torch.manual_seed(0)
    affine, half = modules()['RandomAffine'], torch.zeros(1, 3, 32, 32)
    half[..., 16:] = 1
    for x in (torch.ones(1, 3, 32, 32), half):
        turned = affine(
            x, params=affine.forward_parameters(x.shape) | {'angle': torch.tensor([45.0])}
        )
        assert (turned[..., [0, 0, -1, -1], [0, -1, 0, -1]] == 0).all()
        assert turned.max() == 1
    between = ((turned > 0.01) & (turned < 0.99)).float().mean()
    assert 0.02 < between < 0.2  # along the edges
    assert affine.flags['resample'] == Resample.BILINEAR
    assert affine.flags['padding_mode'] == SamplePadding.ZEROS


def test_brightness_is_added_not_multiplied():
    jiggle = modules()['ColorJiggle']
    jiggle(torch.rand(1, 3, 8, 8))
    params = {**jiggle._params, 'brightness_factor': torch.tensor([1.1])}
    params |= {k: torch.ones(1) for k in ('contrast_factor', 'saturation_factor')}
    grey = jiggle(torch.full((1, 3, 8, 8), 0.2), params=params)
    assert torch.allclose(grey, torch.full_like(grey, 0.3), atol=1e-3)


def test_an_image_comes_out_the_same_alone_and_in_a_batch():
    torch.manual_seed(1)
    together = alone = torch.rand(5, 3, 32, 32)
    alone = alone[2:3]
    for module in modules().values():
        together = module(together)
        params = {
            k: v[2:3] if v.ndim and len(v) == 5 and k != 'order' else v
            for k, v in module._params.items()
        }
        params['forward_input_shape'] = torch.tensor(alone.shape)
        alone = module(alone, params=params)
        assert torch.allclose(together[2:3], alone, atol=1e-5), type(module)


def test_it_is_drawn_in_training_and_tta_only():
    steps = batch_tfms(MEAN, STD, cutout=True)
    plain = Pipeline(steps, split_idx=1)(batch())
    assert torch.allclose(plain, normalized(batch()), atol=1e-6)
    augmented = Pipeline(steps, split_idx=0)(batch())
    assert not torch.allclose(plain, augmented, atol=0.1) and augmented.min() < -1  # normalized


def test_cutout_leaves_the_mean_colour():
    torch.manual_seed(0)
    erase = modules()['RandomErasing']
    x = torch.ones(64, 3, 32, 32)
    assert set(erase(x).unique().tolist()) == {0.0, 1.0}  # 0 after Normalize is the mean
