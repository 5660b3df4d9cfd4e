"""The frozen base, data, training and test."""

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from .lora import with_lora

WIDTH, HEADS = 32, 4


class Block(nn.Module):
    """A block of a transformer."""

    def __init__(self):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.query, self.key, self.value, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x):
        y = self.norm1(x)
        q, k, v = (part(y).unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in (self.query, self.key, self.value))
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Base(nn.Module):
    """A small transformer that reads an image row by row."""

    def __init__(self):
        super().__init__()
        self.rows = nn.Linear(8, WIDTH)
        self.places = nn.Parameter(torch.randn(8, WIDTH))
        self.blocks = nn.Sequential(Block(), Block())
        self.head = nn.Linear(WIDTH, 10)

    def forward(self, x):
        return self.head(self.blocks(self.rows(x) + self.places).mean(dim=1))


def create_model():
    """The base with adapters and a trained head.

    Your app loads a checkpoint here. This one needs no download: the base has the same weights wherever it is made.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = with_lora(Base(), {"query", "value", "up", "down"})
    model.head.requires_grad_(True)
    return model


def load_images():
    """The digits that come with scikit-learn: 1,797 images of 8 x 8 pixels, each fifth of them for the test."""
    digits = load_digits()
    x = torch.tensor(digits.images / 16, dtype=torch.float32)
    y = torch.tensor(digits.target)
    test = torch.arange(len(y)) % 5 == 0
    return TensorDataset(x[~test], y[~test]), TensorDataset(x[test], y[test])


def load_data(partition_id, num_partitions, batch_size):
    """The training data of one partition."""
    trainset, _ = load_images()
    mine = torch.arange(len(trainset))[partition_id::num_partitions]
    return DataLoader(TensorDataset(*trainset[mine]), batch_size=batch_size, shuffle=True)


def train(net, trainloader, epochs, lr):
    """Train the adapters and the head; returns the mean loss."""
    optimizer = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=lr)
    net.train()
    total = 0.0
    for _ in range(epochs):
        for images, labels in trainloader:
            optimizer.zero_grad()
            loss = F.cross_entropy(net(images), labels)
            loss.backward()
            optimizer.step()
            total += loss.item()
    return total / (epochs * len(trainloader))


def test(net):
    """The model's loss and accuracy on the test images."""
    _, testset = load_images()
    images, labels = testset.tensors
    net.eval()
    with torch.no_grad():
        outputs = net(images)
    return F.cross_entropy(outputs, labels).item(), (outputs.argmax(dim=1) == labels).float().mean().item()
