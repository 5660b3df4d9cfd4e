"""Builds a named model for a data set, with seeded initial values."""

import numpy as np
import torch
from torch import Tensor, nn

from clients.data import Dataset
from clients.errors import AppConfigError

__all__ = ["MODEL_NAMES", "build_model"]

MODEL_NAMES = ("logistic", "cnn", "small-cnn", "char")


def build_model(name: str, dataset: Dataset, seed: int) -> nn.Module:
    """Return a new model that maps a batch of `dataset.train_x` to logits, shape (batch, classes).

    Args:
        name: `logistic`, multinomial logistic regression on anything; `cnn`, for images; `small-cnn`, also for
            images, less accurate and several times cheaper; `char`, for characters as numbers below `classes`.
        dataset: Says the shape of an example and the number of classes.
        seed: Seed of the initial values; the global torch generator stays as it was.

    Raises:
        AppConfigError: The name is unknown, or the model cannot work on such data.
    """
    if seed < 0:
        raise AppConfigError(f"seed is {seed}; it has to be 0 or more.")
    shape = dataset.train_x.shape[1:]
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would also seed the accelerators
        match name:
            case "logistic":
                return nn.Sequential(nn.Flatten(), nn.Linear(int(dataset.train_x[0].size), dataset.classes))
            case "cnn":
                _check_images(name, shape)
                return _cnn(shape, dataset.classes)
            case "small-cnn":
                _check_images(name, shape)
                return _small_cnn(shape, dataset.classes)
            case "char":
                _check_characters(dataset)
                return _char(shape[0], dataset.classes)
    raise AppConfigError(f"There is no model {name!r}; model is one of {', '.join(MODEL_NAMES)}.")


def _cnn(shape: tuple[int, ...], classes: int) -> nn.Sequential:
    """Return three convolutions and a linear layer: 20,794 parameters for 8x8 images, 42,394 for 28x28."""
    channels, height, width = shape
    # GroupNorm, not BatchNorm: no running statistics to average, and no dependence on the batch
    return nn.Sequential(
        nn.Conv2d(channels, 16, kernel_size=3, padding=1),
        nn.GroupNorm(4, 16),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(16, 32, kernel_size=3, padding=1),
        nn.GroupNorm(8, 32),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(32, 48, kernel_size=3, padding=1),
        nn.GroupNorm(8, 48),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(48 * (height // 4) * (width // 4), classes),
    )


def _small_cnn(shape: tuple[int, ...], classes: int) -> nn.Sequential:
    """Return two strided convolutions and a linear layer: 1,946 parameters for 8x8 images, 9,146 for 28x28."""
    channels, height, width = shape
    # strides instead of pooling save most of the time; GroupNorm costs a tenth and saves about half of the epochs
    return nn.Sequential(
        nn.Conv2d(channels, 8, kernel_size=3, stride=2, padding=1),
        nn.GroupNorm(2, 8),
        nn.ReLU(),
        nn.Conv2d(8, 16, kernel_size=3, stride=2, padding=1),
        nn.GroupNorm(4, 16),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(16 * -(-height // 4) * -(-width // 4), classes),
    )


def _char(context: int, classes: int) -> nn.Sequential:
    """Return the model of the next character from those before it: 29,513 parameters for 20 of 65 characters.

    References:
        Bengio, Ducharme, Vincent, Jauvin, "A neural probabilistic language model", JMLR 3, 2003; without the
        direct connections from the embedding to the output.
    """
    return nn.Sequential(
        _Numbers(),
        nn.Embedding(classes, 8),
        nn.Flatten(),
        nn.Linear(8 * context, 128),
        nn.Tanh(),
        nn.Linear(128, classes),
    )


class _Numbers(nn.Module):
    """Whole numbers, which a data set keeps as floats as it keeps everything."""

    def forward(self, x: Tensor) -> Tensor:
        return x.long()


def _check_images(name: str, shape: tuple[int, ...]) -> None:
    if len(shape) != 3 or min(shape[1:]) < 4:
        raise AppConfigError(
            f"model is {name!r}, which needs images of 4x4 or more; an example of this data set has shape "
            f"{shape}. Set model to 'logistic'."
        )


def _check_characters(dataset: Dataset) -> None:
    x = dataset.train_x[:100]  # enough to tell: called at every message
    if x.ndim != 2 or not np.isin(x, np.arange(dataset.classes)).all():
        raise AppConfigError(
            f"model is 'char', which needs characters as whole numbers from 0 to {dataset.classes - 1}, as in "
            "shakespeare; this data set has other values. Set model to 'logistic'."
        )
