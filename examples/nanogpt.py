"""A small GPT that continues text letter by letter, after karpathy/nanoGPT.

Without a file it reads the source of one of Python's own modules.
"""

from __future__ import annotations

import argparse
import inspect
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn, optim

import tracker


class Block(nn.Module):
    """Attention and a feed-forward network, each added to its input (N, length, size)."""

    def __init__(self, size: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(size), nn.LayerNorm(size)
        self.attention = nn.Linear(size, 3 * size)
        self.projection = nn.Linear(size, size)
        self.mlp = nn.Sequential(nn.Linear(size, 4 * size), nn.GELU(), nn.Linear(4 * size, size))

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's output, of the shape of its input."""
        parts = self.attention(self.norm1(x)).chunk(3, dim=-1)
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in parts)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.projection(attended.transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))


class GPT(nn.Module):
    """Predicts the next letter at each place of texts (N, length)."""

    def __init__(self, letters: int, length: int, size: int, layers: int) -> None:
        super().__init__()
        self.letters = nn.Embedding(letters, size)
        self.places = nn.Embedding(length, size)
        self.blocks = nn.Sequential(*(Block(size, heads=4) for _ in range(layers)))
        self.norm = nn.LayerNorm(size)
        self.head = nn.Linear(size, letters, bias=False)

    def forward(self, idx: Tensor, targets: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Return scores (N, length, letters), and the loss if there are targets (N, length)."""
        places = torch.arange(idx.size(1), device=idx.device)
        logits = self.head(self.norm(self.blocks(self.letters(idx) + self.places(places))))
        if targets is None:
            return logits, None
        return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def main() -> None:
    """Train on pieces of the text that are drawn at random."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--text", type=Path, help="a file to learn from")
    parser.add_argument("--batch-size", type=int, default=12)
    parser.add_argument("--block-size", type=int, default=64, help="letters in a piece")
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--lr", type=float, default=1e-3)
    args = parser.parse_args()

    text = args.text.read_text() if args.text else inspect.getsource(argparse)
    letters = sorted(set(text))
    numbers = {letter: number for number, letter in enumerate(letters)}
    data = torch.tensor([numbers[letter] for letter in text])
    model = GPT(len(letters), args.block_size, args.size, args.layers)
    optimizer = optim.AdamW(model.parameters(), lr=args.lr)

    with tracker.start_run(params=args, experiment="nanogpt"):
        for step in range(1, args.steps + 1):
            starts = torch.randint(len(data) - args.block_size - 1, (args.batch_size, 1))
            piece = data[starts + torch.arange(args.block_size + 1)]
            _, loss = model(piece[:, :-1], piece[:, 1:])
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            tracker.log_metric("loss", loss, step)
        tracker.log_model(model, piece[:, :-1], files={"letters.txt": "".join(letters)})


if __name__ == "__main__":
    main()
