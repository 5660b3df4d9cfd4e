"""Builds a named model for a data set, with seeded initial values."""

import torch
from torch import nn

from clients.data import Dataset
from clients.errors import AppConfigError

__all__ = ["MODEL_NAMES", "build_model"]

MODEL_NAMES = ("logistic", "cnn")


def build_model(name: str, dataset: Dataset, seed: int) -> nn.Module:
    """Return a new model that maps a batch of `dataset.train_x` to logits, shape (batch, classes).

    Args:
        name: `logistic`, multinomial logistic regression on anything, or `cnn`, for images.
        dataset: Says the shape of an example and the number of classes.
        seed: Seed of the initial values; the global torch generator stays as it was.

    Raises:
        AppConfigError: The name is unknown, or a cnn is asked for data that are not images.
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
                return _cnn(shape, dataset.classes)
    raise AppConfigError(f"There is no model {name!r}; model is one of {', '.join(MODEL_NAMES)}.")


def _cnn(shape: tuple[int, ...], classes: int) -> nn.Sequential:
    """Return three convolutions and a linear layer: 20,794 parameters for 8x8 images, 42,394 for 28x28."""
    if len(shape) != 3 or min(shape[1:]) < 4:
        raise AppConfigError(
            f"model is 'cnn', which needs images of 4x4 or more; an example of this data set has shape "
            f"{shape}. Set model to 'logistic'."
        )
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
