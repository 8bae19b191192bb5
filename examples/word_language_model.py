"""An LSTM that continues text word by word, after pytorch/examples' word_language_model.

Without a file it reads the source of two of Python's own modules.
"""

from __future__ import annotations

import argparse
import inspect
import math
import random
import re
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn, optim

import tracker

State = tuple[Tensor, Tensor]


class Model(nn.Module):
    """Predicts the next word at each place of texts (length, N)."""

    def __init__(self, words: int, size: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(words, size)
        self.lstm = nn.LSTM(size, size, num_layers=2, dropout=0.2)
        self.decoder = nn.Linear(size, words)

    def forward(self, text: Tensor, state: State) -> tuple[Tensor, State]:
        """Return scores (length, N, words) and the LSTM's next state."""
        output, state = self.lstm(self.embedding(text), state)
        return self.decoder(output), state

    def first_state(self, samples: int) -> State:
        """Return the state before a text: two tensors (2, N, size)."""
        zeros = torch.zeros(2, samples, self.lstm.hidden_size)
        return zeros, zeros.clone()


def main() -> None:
    """Train, with the state carried from one piece of the text to the next."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--text", type=Path, help="a file to learn from")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--bptt", type=int, default=20, help="words in a piece")
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--lr", type=float, default=1e-2)
    args = parser.parse_args()

    if args.text:
        text = args.text.read_text()
    else:
        text = inspect.getsource(argparse) + inspect.getsource(random)
    words = re.findall(r"\w+|[^\w\s]", text)
    vocabulary = sorted(set(words))
    numbers = {word: number for number, word in enumerate(vocabulary)}
    length = len(words) // args.batch_size
    tokens = torch.tensor([numbers[word] for word in words[: length * args.batch_size]])
    tokens = tokens.view(args.batch_size, length).t().contiguous()
    model = Model(len(vocabulary), args.size)
    optimizer = optim.Adam(model.parameters(), lr=args.lr)

    with tracker.start_run(params=args, experiment="word language model"):
        for epoch in range(1, args.epochs + 1):
            state, losses = model.first_state(args.batch_size), []
            for start in range(0, length - args.bptt - 1, args.bptt):
                piece = tokens[start : start + args.bptt]
                target = tokens[start + 1 : start + args.bptt + 1]
                optimizer.zero_grad()
                output, state = model(piece, (state[0].detach(), state[1].detach()))
                loss = F.cross_entropy(output.flatten(0, 1), target.flatten())
                loss.backward()
                nn.utils.clip_grad_norm_(model.parameters(), 0.25)
                optimizer.step()
                losses.append(loss.item())
            mean = sum(losses) / len(losses)
            tracker.log_metrics({"loss": mean, "perplexity": math.exp(mean)}, epoch)
        tracker.log_model(model, (piece, state), files={"words.txt": "\n".join(vocabulary)})


if __name__ == "__main__":
    main()
