"""Body and heads, data, training and test.

FedRep (Collins et al., 2021), but the head is fitted anew in each round instead of being kept. So what a client trains
depends only on the message and on the data of a partition, and not on the rounds that the client took part in.
"""

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


def create_body():
    """The shared part: features of an image."""
    return nn.Sequential(nn.Linear(64, 32), nn.ReLU())


def load_data(partition_id, num_partitions):
    """Training and test data of one partition.

    Everybody means something else by the same label: it is the digit plus the number of the partition, modulo 10.
    """
    digits = load_digits()
    x = torch.tensor(digits.data / 16, dtype=torch.float32)[partition_id::num_partitions]
    y = (torch.tensor(digits.target) + partition_id)[partition_id::num_partitions] % 10
    test = torch.arange(len(y)) % 5 == 0
    return TensorDataset(x[~test], y[~test]), TensorDataset(x[test], y[test])


def fit_head(body, trainset, steps):
    """A head fitted to a body by so many steps of gradient descent from zero."""
    images, labels = trainset.tensors
    head = nn.Linear(32, 10)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    with torch.no_grad():
        features = body(images)
    optimizer = torch.optim.SGD(head.parameters(), lr=1.0)
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(head(features), labels).backward()
        optimizer.step()
    return head


def train(body, head, trainset, epochs, batch_size, lr):
    """Train the body under a head that stays as it is; returns the mean loss."""
    optimizer = torch.optim.SGD(body.parameters(), lr=lr)
    loader = DataLoader(trainset, batch_size=batch_size, shuffle=True)
    total = 0.0
    for _ in range(epochs):
        for images, labels in loader:
            optimizer.zero_grad()
            loss = F.cross_entropy(head(body(images)), labels)
            loss.backward()
            optimizer.step()
            total += loss.item()
    return total / (epochs * len(loader))


def test(body, head, testset):
    """Loss and accuracy on the test data of one partition."""
    images, labels = testset.tensors
    with torch.no_grad():
        outputs = head(body(images))
    return F.cross_entropy(outputs, labels).item(), (outputs.argmax(dim=1) == labels).float().mean().item()
