"""The recipe's augmentation (kornia), Normalize and Cutout, as fastai batch transforms."""

import torch
from fastai.vision.all import IntToFloatTensor, Normalize, TensorImage, Transform
from kornia.augmentation import ColorJiggle, RandomAffine, RandomErasing, RandomHorizontalFlip
from torch import nn


class Augment(Transform):
    """Applies kornia modules to a whole batch on its device, in training and TTA (split_idx 0).

    `order` places it among fastai's batch transforms: IntToFloatTensor has 10, Normalize 99.
    Images are (B, 3, H, W) float. kornia draws from torch's global CPU generator.
    """

    split_idx = 0

    def __init__(self, modules: list[nn.Module], order: int):
        self.modules, self.order = nn.Sequential(*modules), order

    def encodes(self, x: TensorImage) -> TensorImage:
        plain = x.as_subclass(torch.Tensor)  # kornia's Python is slow on a subclass
        return self.modules(plain).as_subclass(TensorImage)


def batch_tfms(
    mean: tuple[float, ...], std: tuple[float, ...], cutout: bool = False
) -> list[Transform]:
    """The batch transforms of training, TTA and plain passes, from uint8 to what the model reads.

    Images are augmented while their values are in 0..1, since ColorJiggle clips to that range.
    Cutout comes after Normalize, where its value 0 is the mean colour. `mean`, `std`: (3,), of
    values in 0..1.
    """
    geometry_and_colour = [
        RandomAffine(degrees=180, translate=(0.02, 0.02), p=1.0),
        RandomHorizontalFlip(p=0.5),
        # ColorJiggle adds brightness, as the recipe does; ColorJitter would multiply it
        ColorJiggle(brightness=0.1, contrast=(0.8, 1.2), saturation=(0.7, 1.3), p=1.0),
    ]
    erasing = [RandomErasing(p=0.5, scale=(0.02, 0.1), ratio=(0.3, 3.3), value=0.0)]
    return [
        IntToFloatTensor(),
        Augment(geometry_and_colour, order=20),
        Normalize.from_stats(mean, std),  # on the device, as the batches
        *([Augment(erasing, order=100)] if cutout else []),
    ]
