"""Trains a model on tensors with plain SGD and measures it; the same bits from the same seed."""

import hashlib
import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from fl_gradcode.privacy import PrivateTraining

__all__ = ["class_accuracies", "evaluate", "evaluate_by_class", "local_seed", "train", "train_privately"]

_EVALUATION_BATCH = 1024  # bounds the memory of a cnn's activations


def local_seed(seed: int, server_round: int, partition_id: int) -> int:
    """Return the seed of one training, the same in any process: a hash of these three numbers."""
    digest = hashlib.sha256(f"{seed}/{server_round}/{partition_id}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1  # 63 bits: fits a signed integer


def train(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    epochs: int,
    batch_size: int,
    learning_rate: float,
    proximal_mu: float = 0.0,
    work_share: float = 1.0,
    seed: int,
    device: torch.device,
) -> float:
    """Train the model in place with plain SGD and return the mean loss over the last epoch that was begun.

    Args:
        model: The model, with the values to start from.
        x: Inputs, first axis examples.
        y: Labels, shape (examples,).
        epochs: Passes over the examples, at least 1.
        batch_size: Examples a step; the last batch of an epoch may be smaller.
        learning_rate: Step size.
        proximal_mu: Adds (mu/2) ||w - w_start||^2 to what is minimised; it is not part of the returned loss.
        work_share: Do this part of the steps only, at least one: what a slow client may do by a deadline (FedProx).
        seed: Seed of the order of the examples.
        device: Where to compute; model and data are moved there.

    References:
        Li et al., "Federated optimization in heterogeneous networks", MLSys 2020 (the proximal term).
    """
    model.to(device).train()
    x, y = x.to(device), y.to(device)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    start = [parameter.detach().clone() for parameter in parameters] if proximal_mu > 0 else []
    generator = torch.Generator().manual_seed(seed)  # on the CPU, so that all devices draw the same order
    total = torch.zeros((), device=device)
    left = max(1, math.ceil(work_share * epochs * math.ceil(len(y) / batch_size)))
    seen = 0
    for _ in range(epochs):
        if not left:
            break
        total.zero_()
        seen = 0
        order = torch.randperm(len(y), generator=generator).to(device)
        for batch in torch.split(order, batch_size)[:left]:
            left -= 1
            seen += len(batch)
            loss = F.cross_entropy(model(x[batch]), y[batch])
            # by hand: torch.optim imports its compiler on first use, longer than a whole round here
            gradients = torch.autograd.grad(loss, parameters)
            with torch.no_grad():
                for i, (parameter, gradient) in enumerate(zip(parameters, gradients, strict=True)):
                    if proximal_mu > 0:
                        gradient = gradient.add(parameter - start[i], alpha=proximal_mu)
                    parameter.sub_(gradient, alpha=learning_rate)
                total += loss.detach() * len(batch)
    return float(total) / seen


def train_privately(dp: PrivateTraining, x: Tensor, y: Tensor, *, learning_rate: float, device: torch.device) -> None:
    """Train by differentially private SGD: batches, clipping and noise are those of `dp`.

    Args:
        dp: Of this shard and round, entered.
        x: Inputs, first axis examples.
        y: Labels, shape (examples,).
        learning_rate: Step size.
        device: Where to compute; model and data are moved there.
    """
    dp.model.to(device)
    x, y = x.to(device), y.to(device)
    optimizer = dp.optimizer(torch.optim.SGD(dp.model.parameters(), lr=learning_rate))
    criterion = dp.criterion(nn.CrossEntropyLoss())
    for indices in dp.batches():
        batch = indices.to(device)
        optimizer.zero_grad()
        criterion(dp.model(x[batch]), y[batch]).backward()
        optimizer.step()


def evaluate(model: nn.Module, x: Tensor, y: Tensor, device: torch.device) -> tuple[float, float]:
    """Return mean cross-entropy loss and accuracy on these examples."""
    return _loss_and_accuracy(_logits(model, x, device), y.to(device))


def class_accuracies(model: nn.Module, x: Tensor, y: Tensor, classes: int, device: torch.device) -> NDArray[np.float64]:
    """Return the accuracy on the examples of each class, shape (classes,); NaN for a class without any."""
    return _by_class(_logits(model, x, device), y, classes)


def evaluate_by_class(
    model: nn.Module, x: Tensor, y: Tensor, classes: int, device: torch.device
) -> tuple[float, float, NDArray[np.float64]]:
    """Return what `evaluate` and `class_accuracies` do, at the cost of one of them."""
    logits = _logits(model, x, device)
    return *_loss_and_accuracy(logits, y.to(device)), _by_class(logits, y, classes)


def _loss_and_accuracy(logits: Tensor, labels: Tensor) -> tuple[float, float]:
    return float(F.cross_entropy(logits, labels)), float((logits.argmax(dim=1) == labels).double().mean())


def _by_class(logits: Tensor, y: Tensor, classes: int) -> NDArray[np.float64]:
    labels = y.cpu().numpy()
    right = logits.argmax(dim=1).cpu().numpy() == labels
    counts = np.bincount(labels, minlength=classes)
    hits = np.bincount(labels, weights=right, minlength=classes)
    return np.where(counts > 0, hits / np.maximum(counts, 1), np.nan)


def _logits(model: nn.Module, x: Tensor, device: torch.device) -> Tensor:
    model.to(device).eval()
    with torch.inference_mode():
        return torch.cat([model(part.to(device)) for part in torch.split(x, _EVALUATION_BATCH)])
