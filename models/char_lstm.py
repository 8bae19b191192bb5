"""An LSTM that predicts a text, character by character."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TypeAlias

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
    """An LSTM on one-hot or embedded characters, and a linear layer on its outputs.

    Source: A. Karpathy, "The Unreasonable Effectiveness of Recurrent Neural Networks", 2015;
    Udacity, "Intro to Deep Learning with PyTorch", part 7, "Character-Level RNN".
    """

    def __init__(
        self, symbols: int, *, hidden: int, layers: int, dropout: float, embedding: int
    ) -> None:
        """Take the number of `symbols`; an `embedding` of 0 is one-hot."""
        super().__init__()
        self.symbols = symbols
        self.embedding = nn.Embedding(symbols, embedding) if embedding else None
        self.lstm = nn.LSTM(
            embedding or symbols,
            hidden,
            layers,
            dropout=dropout if layers > 1 else 0.0,  # torch's is between layers
            batch_first=True,
        )
        self.dropout = nn.Dropout(dropout)
        self.out = nn.Linear(hidden, symbols)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits (N, T, symbols) of what follows each of `tokens` int64 (N, T), from no state."""
        return self.advance(tokens)[0]

    def advance(self, tokens: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """Logits as `forward` has them, from `state`, and the state after the last character."""
        if self.embedding is None:
            inputs = F.one_hot(tokens, self.symbols).to(self.out.weight.dtype)
        else:
            inputs = self.embedding(tokens)
        outputs, state = self.lstm(inputs, state)
        logits: Tensor = self.out(self.dropout(outputs))
        return logits, state


class TruncatedLoop:
    """Truncated back-propagation through time.

    Gradients stop at the beginning of a window; the state goes on to the stream's next window, and
    is zero at the beginning of each epoch.
    """

    optimizer: Optimizer
    loader: DataLoader[tuple[Tensor, Tensor]]

    def __init__(self, network: CharLSTM, data: TextData, params: Params) -> None:
        """Take the network where it is to be trained, and all of the recipe's parameters."""
        self._network = network
        self._data = data
        self._params = params
        self.optimizer = Adam(network.parameters(), lr=params["lr"])
        self.loader = DataLoader(data.train, data.train.streams)

    def train(self, epoch: int) -> Iterator[Step]:
        """Train for one epoch; the loss is in nats per character, a sample is a character."""
        network, device = self._network, self._network.out.weight.device
        state = None
        for inputs, targets in self.loader:
            logits, (hidden, cell) = network.advance(inputs.to(device), state)
            loss = F.cross_entropy(logits.flatten(0, 1), targets.to(device).flatten())
            self.optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(network.parameters(), self._params["clip"])
            self.optimizer.step()
            state = hidden.detach(), cell.detach()
            yield Step(loss, targets.numel())

    def validate(self) -> Mapping[str, float]:
        """`val_loss`, nats per character, and `val_perplexity`, e to the power of that."""
        return self._metrics("val", self._data.validation)

    def test(self) -> Mapping[str, float]:
        """`test_loss` and `test_perplexity`, as `validate` has them."""
        assert self._data.test is not None
        return self._metrics("test", self._data.test)

    def _metrics(self, name: str, part: Windows) -> Mapping[str, float]:
        loss = evaluate(self._network, part)
        # Not math.exp: a training that diverged has a perplexity of inf, not an OverflowError.
        perplexity = torch.tensor(loss, dtype=torch.float64).exp().item()
        return {f"{name}_perplexity": perplexity, f"{name}_loss": loss}

    def show(self, epoch: int) -> Iterable[Picture | Text]:
        """A sample of text, the same under the same weights, seed and epoch."""
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
        except ModelsError as error:  # a training that diverged is logged as such, not ended here
            _LOGGER.warning("There is no sample after epoch %d: %s", epoch, error)
            return
        yield Text(f"samples/epoch-{epoch:04}.txt", prime + text)


@torch.no_grad()
def evaluate(network: CharLSTM, part: Windows) -> float:
    """The mean loss of `network` on `part`, nats per character; its modes stay as they are."""
    device = network.out.weight.device
    total = torch.zeros((), dtype=torch.float64, device=device)
    state = None
    with _evaluation_mode(network):
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
    """`length` characters that go on from `prime`, drawn with `generator`, of the CPU.

    Logits are divided by `temperature`, above 0; only the `top_k` likeliest characters are drawn,
    with 0 all of them. Without a prime it begins as after the end of a line. The network's modes
    and the global generators stay as they are.

    Raises ModelsError for a prime with characters that are not in the vocabulary, and for a
    network whose outputs are not finite.
    """
    check_prime(prime, vocabulary)
    begin = prime or ("\n" if "\n" in vocabulary.characters else vocabulary.characters[0])
    device = network.out.weight.device
    tokens = vocabulary.encode(begin).long()
    drawn: list[str] = []
    state = None
    with _evaluation_mode(network):
        while len(drawn) < length:
            logits, state = network.advance(tokens[None].to(device), state)
            tokens = draw(logits[0, -1], temperature=temperature, top_k=top_k, generator=generator)
            drawn.append(vocabulary.characters[int(tokens)])
    return "".join(drawn)


def draw(logits: Tensor, *, temperature: float, top_k: int, generator: torch.Generator) -> Tensor:
    """A character's number, int64 (1,) on the CPU, by `logits` (symbols,); never the unknown one.

    Raises ModelsError for logits that are not finite.
    """
    known = logits[:-1].double().cpu()
    if not known.isfinite().all():
        raise ModelsError("the network's outputs are not finite; it must be trained again.")
    if 0 < top_k < len(known):
        likeliest = known.topk(top_k).indices
        known = torch.full_like(known, -torch.inf).scatter(0, likeliest, known[likeliest])
    # The maximum goes first, so that no temperature makes an infinity of it.
    probabilities = ((known - known.max()) / temperature).softmax(0)
    return probabilities.multinomial(1, generator=generator)


def check_prime(prime: str, vocabulary: Vocabulary) -> None:
    """Raise ModelsError for characters in `prime` that are not in the vocabulary."""
    if missing := vocabulary.missing(prime):
        raise ModelsError(
            f"prime={prime!r} has {', '.join(map(repr, missing))}; "
            "allowed: the characters of the text that the network is trained on."
        )


@contextmanager
def _evaluation_mode(network: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in network.modules()]
    network.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


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


RECIPE = Recipe(
    name="char-lstm",
    summary="predicts a text, character by character",
    load=_load,
    build=_build,
    parameters={
        "lr": Parameter(
            default=0.004,
            help="Adam's learning rate",
            search=Range(low=5e-4, high=2e-2, log=True),
            grid=(0.002, 0.004),
        ),
        "batch_size": Parameter(
            default=64, most=1_000_000, help="streams that the text is cut into"
        ),
        "length": Parameter(
            default=100, most=1_000_000, help="characters that gradients go back, at most"
        ),
        "hidden": Parameter(
            default=256, help="units in a layer", most=16384, search=(128, 256), grid=(128, 256)
        ),
        "layers": Parameter(default=1, help="LSTM layers", most=16, search=(1, 2)),
        "dropout": Parameter(
            default=0.0,
            help="share of a layer's outputs",
            least=0,
            most=0.9,
            search=Range(low=0.0, high=0.5),
        ),
        "embedding": Parameter(
            default=0, help="numbers that stand for a character; 0: one-hot", least=0, most=16384
        ),
        "clip": Parameter(default=5.0, help="the gradients' norm, at most"),
        "temperature": Parameter(default=0.8, help="of samples: below 1 is more of the likely"),
        "top_k": Parameter(
            default=0, help="likeliest characters that samples draw from; 0: all", least=0
        ),
        "sample_length": Parameter(
            default=400, help="characters of each epoch's sample; 0: none", least=0
        ),
        "prime": Parameter(default="", help="the text that samples go on from"),
    },
    epochs=4,
    datasets="a text file; auto: DATA_DIR/text/anna.txt, else the help texts of Python",
    metrics={
        "val_perplexity": "minimize",
        "val_loss": "minimize",
        "loss": "minimize",
        "epoch_duration": "minimize",
    },
    scores=None,
    loop=_loop,
)
