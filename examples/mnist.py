"""A CNN that reads digits, after pytorch/examples' mnist; the digits are scikit-learn's."""

from __future__ import annotations

import argparse

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn, optim
from torch.utils.data import DataLoader, TensorDataset

import tracker


class Net(nn.Module):
    """Two convolutions and two linear layers, for pictures (N, 1, 8, 8)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 32, 3, padding=1)
        self.conv2 = nn.Conv2d(32, 64, 3, padding=1)
        self.dropout = nn.Dropout(0.25)
        self.fc1 = nn.Linear(64 * 4 * 4, 128)
        self.fc2 = nn.Linear(128, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logarithms of the classes' probabilities, (N, 10)."""
        x = F.relu(self.conv2(F.relu(self.conv1(x))))
        x = self.dropout(F.max_pool2d(x, 2).flatten(1))
        return F.log_softmax(self.fc2(F.relu(self.fc1(x))), dim=1)


def train(model: nn.Module, loader: DataLoader, optimizer: optim.Optimizer, epoch: int) -> None:
    """Train for an epoch."""
    model.train()
    for batch, (data, target) in enumerate(loader):
        optimizer.zero_grad()
        loss = F.nll_loss(model(data), target)
        loss.backward()
        optimizer.step()
        tracker.log_metric("batch_loss", loss, (epoch - 1) * len(loader) + batch)


def test(model: nn.Module, loader: DataLoader, epoch: int) -> None:
    """Measure the mean loss and the accuracy."""
    model.eval()
    loss, correct, samples = 0.0, 0, 0
    with torch.no_grad():
        for data, target in loader:
            output = model(data)
            loss += F.nll_loss(output, target, reduction="sum").item()
            correct += int(output.argmax(1).eq(target).sum())
            samples += len(target)
    tracker.log_metrics({"test_loss": loss / samples, "accuracy": correct / samples}, epoch)


def main() -> None:
    """Train and test."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--lr", type=float, default=1.0)
    parser.add_argument("--gamma", type=float, default=0.7, help="decay of the learning rate")
    args = parser.parse_args()

    digits = load_digits()
    images = torch.tensor(digits.images / 16).float().unsqueeze(1)
    data = TensorDataset(images, torch.tensor(digits.target))
    train_set, test_set = torch.utils.data.random_split(data, [0.8, 0.2])
    train_loader = DataLoader(train_set, args.batch_size, shuffle=True)
    test_loader = DataLoader(test_set, 1000)
    model = Net()
    optimizer = optim.Adadelta(model.parameters(), lr=args.lr)
    scheduler = optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=args.gamma)

    with tracker.start_run(params=args, experiment="mnist"):
        for epoch in range(1, args.epochs + 1):
            train(model, train_loader, optimizer, epoch)
            test(model, test_loader, epoch)
            scheduler.step()
        tracker.log_model(model, images[:4])


if __name__ == "__main__":
    main()
