"""An LSTM that predicts text character by character."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Adam, Optimizer
from torch.utils.data import DataLoader

from models.errors import ModelsError
from models.recipe import Data, Facts, Parameter, Params, Picture, Range, Recipe, Source, Step, Text
from models.text import TextData, Vocabulary, Windows, load_text

State: TypeAlias = tuple[Tensor, Tensor]
"""Hidden and cell state, (layers, N, hidden) each."""

_LOGGER = logging.getLogger(__name__)


class CharLSTM(nn.Module):
    """An LSTM on one-hot or embedded characters, followed by a linear layer.

    Source: A. Karpathy, "The Unreasonable Effectiveness of Recurrent Neural Networks", 2015;
    Udacity, "Intro to Deep Learning with PyTorch", part 7, "Character-Level RNN".

    Args:
        symbols: Size of the vocabulary, the unknown character included.
        hidden: Units per layer.
        layers: Number of LSTM layers.
        dropout: Share of each layer's outputs dropped in training.
        embedding: Size of a character's vector; 0: one-hot.
    """

    def __init__(
        self, symbols: int, *, hidden: int, layers: int, dropout: float, embedding: int
    ) -> None:
        super().__init__()
        self.symbols = symbols
        self.embedding = nn.Embedding(symbols, embedding) if embedding else None
        self.lstm = nn.LSTM(
            embedding or symbols,
            hidden,
            layers,
            dropout=dropout if layers > 1 else 0.0,  # torch applies it between layers only
            batch_first=True,
        )
        self.dropout = nn.Dropout(dropout)
        self.out = nn.Linear(hidden, symbols)

    def forward(self, tokens: Tensor, state: State | None = None) -> Tensor | tuple[Tensor, State]:
        """Return logits (N, T, symbols) of the character after each of `tokens`, int64 (N, T).

        With a state, return what `advance` does.
        """
        logits, after = self.advance(tokens, state)
        return logits if state is None else (logits, after)

    def start(self, streams: int) -> State:
        """Return the zero state of `streams` streams."""
        zeros = self.out.weight.new_zeros(self.lstm.num_layers, streams, self.lstm.hidden_size)
        return zeros, zeros

    def advance(self, tokens: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """Continue from a state.

        Args:
            tokens: Character numbers, int64 (N, T).
            state: The state after the preceding characters; None: zero.

        Returns:
            Logits (N, T, symbols) of the character after each token, and the state after the last.
        """
        if self.embedding is None:
            inputs = F.one_hot(tokens, self.symbols).to(self.out.weight.dtype)
        else:
            inputs = self.embedding(tokens)
        outputs, state = self.lstm(inputs, state)
        logits: Tensor = self.out(self.dropout(outputs))
        return logits, state


class TruncatedLoop:
    """Truncated back-propagation through time.

    Gradients stop at the start of a window; the state carries over to the stream's next window, and
    is reset at the start of each epoch.

    Args:
        network: The network, on the device it is trained on.
        data: The text.
        params: A value for each of the recipe's parameters.
    """

    optimizer: Optimizer
    loader: DataLoader[tuple[Tensor, Tensor]]

    def __init__(self, network: CharLSTM, data: TextData, params: Params) -> None:
        self._network = network
        self._data = data
        self._params = params
        self.optimizer = Adam(network.parameters(), lr=params["lr"])
        self.loader = DataLoader(data.train, data.train.streams)

    def train(self, epoch: int) -> Iterator[Step]:
        """Train for one epoch; losses are in nats per character, and a sample is a character."""
        network, device = self._network, self._network.out.weight.device
        state = network.start(self._data.train.streams)
        for inputs, targets in self.loader:
            # Not `advance`, so that hooks and wrappers of the network see its inputs.
            logits, (hidden, cell) = network(inputs.to(device), state)
            loss = F.cross_entropy(logits.flatten(0, 1), targets.to(device).flatten())
            self.optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(network.parameters(), self._params["clip"])
            self.optimizer.step()
            state = hidden.detach(), cell.detach()
            yield Step(loss, targets.numel())

    def validate(self) -> Mapping[str, float]:
        """Return `val_loss`, in nats per character, and `val_perplexity`, its exponential."""
        return self._metrics("val", self._data.validation)

    def test(self) -> Mapping[str, float]:
        """Return `test_loss` and `test_perplexity`, defined as for `validate`."""
        assert self._data.test is not None
        return self._metrics("test", self._data.test)

    def _metrics(self, name: str, part: Windows) -> Mapping[str, float]:
        loss = evaluate(self._network, part)
        # Not math.exp, which raises OverflowError if training diverged; this gives inf.
        perplexity = torch.tensor(loss, dtype=torch.float64).exp().item()
        return {f"{name}_perplexity": perplexity, f"{name}_loss": loss}

    def show(self, epoch: int) -> Iterable[Picture | Text]:
        """Yield a sample of text, reproducible from weights, seed and epoch."""
        if not self._params["sample_length"]:
            return
        prime: str = self._params["prime"]
        try:
            text = sample(
                self._network,
                Vocabulary(self._data.facts["characters"]),
                prime=prime,
                length=self._params["sample_length"],
                temperature=self._params["temperature"],
                top_k=self._params["top_k"],
                generator=torch.Generator().manual_seed((self._data.seed + epoch) % 2**63),
            )
        except ModelsError as error:  # a diverged training is logged, not aborted
            _LOGGER.warning("No sample after epoch %d: %s", epoch, error)
            return
        yield Text(f"samples/epoch-{epoch:04}.txt", prime + text)


@torch.no_grad()
def evaluate(network: CharLSTM, part: Windows) -> float:
    """Return the mean loss of `network` on `part`, in nats per character."""
    device = network.out.weight.device
    total = torch.zeros((), dtype=torch.float64, device=device)
    state = None
    for inputs, targets in part.batches():
        logits, state = network.advance(inputs.to(device), state)
        losses = F.cross_entropy(
            logits.flatten(0, 1), targets.to(device).flatten(), reduction="none"
        )
        total += losses.double().sum()
    return total.item() / part.targets.numel()


@torch.no_grad()
def sample(
    network: CharLSTM,
    vocabulary: Vocabulary,
    *,
    prime: str,
    length: int,
    temperature: float,
    top_k: int,
    generator: torch.Generator,
) -> str:
    """Generate text.

    Args:
        network: A trained network, in evaluation mode.
        vocabulary: The characters it was trained on.
        prime: The text to continue; empty: start as after the end of a line.
        length: Characters to generate.
        temperature: Above 0; logits are divided by it.
        top_k: Draw from this many of the most likely characters only; 0: from all.
        generator: A generator on the CPU; the global generators are not used.

    Returns:
        The generated characters, without the prime.

    Raises:
        ModelsError: The vocabulary lacks a character of the prime, or the network's outputs are not
            finite.
    """
    check_prime(prime, vocabulary)
    begin = prime or ("\n" if "\n" in vocabulary.characters else vocabulary.characters[0])
    device = network.out.weight.device
    tokens = vocabulary.encode(begin).long()
    drawn: list[str] = []
    state = None
    while len(drawn) < length:
        logits, state = network.advance(tokens[None].to(device), state)
        tokens = draw(logits[0, -1], temperature=temperature, top_k=top_k, generator=generator)
        drawn.append(vocabulary.characters[int(tokens)])
    return "".join(drawn)


def draw(logits: Tensor, *, temperature: float, top_k: int, generator: torch.Generator) -> Tensor:
    """Draw a character, never the unknown one.

    Args:
        logits: Of each symbol, (symbols,); the last one is the unknown character.
        temperature: Above 0; logits are divided by it.
        top_k: Draw from this many of the most likely characters only; 0: from all.
        generator: A generator on the CPU.

    Returns:
        The character's number, int64 (1,) on the CPU.

    Raises:
        ModelsError: The logits are not finite.
    """
    known = logits[:-1].double().cpu()
    if not known.isfinite().all():
        raise ModelsError("the network's outputs are not finite; train it again.")
    if 0 < top_k < len(known):
        likeliest = known.topk(top_k).indices
        known = torch.full_like(known, -torch.inf).scatter(0, likeliest, known[likeliest])
    # Subtract the maximum first: a tiny temperature would otherwise overflow.
    probabilities = ((known - known.max()) / temperature).softmax(0)
    return probabilities.multinomial(1, generator=generator)


def check_prime(prime: str, vocabulary: Vocabulary) -> None:
    """Check that a vocabulary has every character of a prime.

    Args:
        prime: The text that samples continue.
        vocabulary: The characters that the network knows.

    Raises:
        ModelsError: A character is missing.
    """
    if missing := vocabulary.missing(prime):
        raise ModelsError(
            f"prime={prime!r} contains {', '.join(map(repr, missing))}; "
            "allowed: the characters of the text that the network is trained on."
        )


def _load(source: Source, params: Params) -> TextData:
    data = load_text(source, params["batch_size"], params["length"])
    check_prime(params["prime"], Vocabulary(data.facts["characters"]))
    return data


def _build(params: Params, facts: Facts) -> CharLSTM:
    return CharLSTM(
        len(facts["characters"]) + 1,
        hidden=params["hidden"],
        layers=params["layers"],
        dropout=params["dropout"],
        embedding=params["embedding"],
    )


def _loop(network: nn.Module, data: Data[Windows], params: Params) -> TruncatedLoop:
    assert isinstance(network, CharLSTM)
    assert isinstance(data, TextData)
    return TruncatedLoop(network, data, params)


def _example(data: Data[Any]) -> Tensor:
    """The first characters of some streams: the logged model needs no state."""
    windows = data.train
    assert isinstance(windows, Windows)
    return windows.data[:4, : windows.length].long()


RECIPE = Recipe(
    name="char-lstm",
    summary="predict a text character by character",
    load=_load,
    build=_build,
    example=_example,
    parameters={
        "lr": Parameter(
            default=0.004,
            help="Adam's learning rate",
            search=Range(low=5e-4, high=2e-2, log=True),
            grid=(0.002, 0.004),
        ),
        "batch_size": Parameter(
            default=64, most=1_000_000, help="parallel streams that the text is cut into"
        ),
        "length": Parameter(
            default=100, most=1_000_000, help="characters after which gradients are truncated"
        ),
        "hidden": Parameter(
            default=256, help="units per layer", most=16384, search=(128, 256), grid=(128, 256)
        ),
        "layers": Parameter(default=1, help="number of LSTM layers", most=16, search=(1, 2)),
        "dropout": Parameter(
            default=0.0,
            help="share of each layer's outputs dropped in training",
            least=0,
            most=0.9,
            search=Range(low=0.0, high=0.5),
        ),
        "embedding": Parameter(
            default=0, help="size of a character's embedding; 0: one-hot", least=0, most=16384
        ),
        "clip": Parameter(default=5.0, help="largest norm of the gradients"),
        "temperature": Parameter(
            default=0.8, help="temperature of samples; below 1: more predictable"
        ),
        "top_k": Parameter(
            default=0, help="sample from this many most likely characters; 0: from all", least=0
        ),
        "sample_length": Parameter(
            default=400, help="characters in the sample after each epoch; 0: no sample", least=0
        ),
        "prime": Parameter(default="", help="text that samples continue"),
    },
    epochs=4,
    datasets="a text file, or auto: DATA_DIR/text/anna.txt if it exists, else Python's help texts",
    metrics={
        "val_perplexity": "minimize",
        "val_loss": "minimize",
        "loss": "minimize",
        "epoch_duration": "minimize",
    },
    scores=None,
    loop=_loop,
)
