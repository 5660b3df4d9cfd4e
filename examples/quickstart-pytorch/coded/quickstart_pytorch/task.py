"""Model, data, training and test."""

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


class Net(nn.Module):
    """A network with one hidden layer."""

    def __init__(self):
        super().__init__()
        self.fc1 = nn.Linear(64, 32)
        self.fc2 = nn.Linear(32, 10)

    def forward(self, x):
        return self.fc2(F.relu(self.fc1(x)))


def load_images():
    """The digits that come with scikit-learn: 1,797 images of 8 x 8 pixels, each fifth of them for the test."""
    digits = load_digits()
    x = torch.tensor(digits.data / 16, dtype=torch.float32)
    y = torch.tensor(digits.target)
    test = torch.arange(len(y)) % 5 == 0
    return TensorDataset(x[~test], y[~test]), TensorDataset(x[test], y[test])


def load_data(partition_id, num_partitions, batch_size):
    """The training data of one partition, which lacks about half of the digits."""
    trainset, _ = load_images()
    places = torch.argsort(torch.argsort(trainset.tensors[1], stable=True))  # of the images, sorted by digit
    owners = (places * num_partitions // len(places) + places % 3) % num_partitions
    return DataLoader(TensorDataset(*trainset[owners == partition_id]), batch_size=batch_size)


def train(net, trainloader, epochs, lr):
    """Train the network; returns the mean loss."""
    optimizer = torch.optim.SGD(net.parameters(), lr=lr)
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
    """The network's loss and accuracy on the test images."""
    _, testset = load_images()
    images, labels = testset.tensors
    net.eval()
    with torch.no_grad():
        outputs = net(images)
    return F.cross_entropy(outputs, labels).item(), (outputs.argmax(dim=1) == labels).float().mean().item()
