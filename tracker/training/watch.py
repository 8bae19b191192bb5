"""What an epoch shows of its loop: learning rates, samples per second, waiting for data, memory.

Waiting is measured in `__next__` of torch's loaders, replaced once per process: a loop over any
DataLoader is seen, and no object of the user's is changed. Wrapping the loader would miss loops
that keep the original one, and a thread that samples the loop costs CPU and misses short waits.
"""

from __future__ import annotations

import functools
import os
import re
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import count
from threading import get_ident
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook
from torch.utils.data import DataLoader, dataloader
from torch.utils.hooks import RemovableHandle

from tracker.training.device import device_of, is_sharded, unwrap
from tracker.training.meters import EpochMeter

_MOST_RATES = 32  # curves; a group for each parameter has only the lowest and the highest rate

# -- waiting for data -----------------------------------------------------------------------------


class _Thread:
    """A thread with open epochs."""

    def __init__(self) -> None:
        self.epochs = 0
        self.drawn: dict[int, int] = {}  # batches, by the id of their loader's sampler
        self.seconds = 0.0
        self.is_waiting = False

    @property
    def batches(self) -> int:
        """All batches that were drawn."""
        return sum(self.drawn.values())


_threads: dict[int, _Thread] = {}


def _timed(draw: Callable[[Any], Any], iterator: Any) -> Any:
    """Return `draw(iterator)`; its time counts if the thread has an open epoch, and once only."""
    thread = _threads.get(get_ident()) if _threads else None
    if thread is None or thread.is_waiting:  # a data set may use its own loader
        return draw(iterator)
    thread.is_waiting = True
    started = perf_counter()
    try:
        batch = draw(iterator)
        sampler = id(getattr(iterator, "_index_sampler", None))
        thread.drawn[sampler] = thread.drawn.get(sampler, 0) + 1
        return batch
    finally:
        thread.seconds += perf_counter() - started
        thread.is_waiting = False


os.register_at_fork(after_in_child=_threads.clear)


def _time_loaders() -> None:
    base: Any = getattr(dataloader, "_BaseDataLoaderIter", None)  # private: it may go
    plain = getattr(base, "__next__", None)
    if plain is None or hasattr(plain, "is_timed"):
        return

    @functools.wraps(plain)
    def timed(self: Any) -> Any:
        return _timed(plain, self) if _threads else plain(self)

    timed.is_timed = True  # type: ignore[attr-defined]
    base.__next__ = timed


def waited(loader: Iterable[Any]) -> Iterator[Any]:
    """Yield the batches of any loader; the time that each one takes counts as waiting."""
    iterator = iter(loader)
    while True:
        try:
            batch = _timed(next, iterator)
        except StopIteration:
            return
        yield batch


# -- learning rates -------------------------------------------------------------------------------


class _Seen:
    """An optimizer that took a step."""

    def __init__(self, optimizer: Optimizer, is_watched: bool) -> None:
        self.optimizer = weakref.ref(optimizer)
        self.is_watched = is_watched
        self.rates: list[Any] = []  # of its last step in this epoch
        self.names: dict[int, str] = {}  # of its groups, behind `train/lr`
        self.part: str | None = None  # which of several networks it trains


class _Rates:
    """The learning rates of a network's optimizers; without a network, of the thread's."""

    def __init__(self, network: nn.Module | None) -> None:
        self._thread = get_ident()
        self._seen: dict[int, _Seen] = {}
        self.watch(network)

    def watch(self, network: nn.Module | None) -> None:
        """Watch the optimizers of another network, too."""
        self._network = None if network is None else weakref.ref(network)
        self._forget_others()

    def begin(self) -> None:
        """Forget the last epoch, and look again at the optimizers that were others'."""
        self._thread = get_ident()
        self._forget_others()
        for seen in self._seen.values():
            seen.rates = []

    def _forget_others(self) -> None:
        self._seen = {
            key: seen
            for key, seen in self._seen.items()
            if seen.is_watched and seen.optimizer() is not None
        }

    def stepped(self, optimizer: Optimizer) -> None:
        """Keep the rates of a step, before a scheduler changes them."""
        seen = self._seen.get(id(optimizer))
        if seen is None or seen.optimizer() is not optimizer:
            seen = self._seen[id(optimizer)] = _Seen(optimizer, self._is_watched(optimizer))
            seen.part = self._part(optimizer)
        if seen.is_watched:
            seen.rates = [group.get("lr") for group in optimizer.param_groups]

    def _is_watched(self, optimizer: Optimizer) -> bool:
        if self._network is None:
            return get_ident() == self._thread
        if (network := self._network()) is None:
            return False
        return _trains(optimizer, network)

    def _part(self, optimizer: Optimizer) -> str | None:
        network = None if self._network is None else self._network()
        parts = getattr(network, "parts", {})
        return next((name for name, part in parts.items() if _trains(optimizer, part)), None)

    def read(self) -> dict[str, float]:
        """Return the rates of the last steps by the names of their metrics.

        A group keeps its name, also if its optimizer takes no step in an epoch.
        """
        rates: dict[tuple[int, int], float] = {}  # by optimizer and group
        wanted: dict[tuple[int, int], Any] = {}
        for key, seen in self._seen.items():
            optimizer = seen.optimizer()
            groups = [{}] * len(seen.rates) if optimizer is None else optimizer.param_groups
            for place, (group, rate) in enumerate(zip(groups, seen.rates, strict=False)):
                if isinstance(rate, (int, float, Tensor)):  # Adafactor's may be None
                    wanted[key, place] = group.get("name") or seen.part
                    # A tensor on a GPU may be that of the next step.
                    rates[key, place] = float(rate)
        if len(rates) > _MOST_RATES:
            return {
                "train/lr_lowest": min(rates.values()),
                "train/lr_highest": max(rates.values()),
            }
        self._name(wanted)
        return {
            f"train/lr{self._seen[key].names[place]}": rate for (key, place), rate in rates.items()
        }

    def _name(self, wanted: Mapping[tuple[int, int], Any]) -> None:
        """Name new groups: alone, by their own names or those of the networks, or by 0, 1, …"""
        taken = {name for seen in self._seen.values() for name in seen.names.values()}
        new = [(key, place) for key, place in wanted if place not in self._seen[key].names]
        given = [f"_{wanted[each]}" for each in new]
        numbers = (f"_{n}" for n in count("" in taken) if f"_{n}" not in taken)
        if len(new) == 1 and not taken:
            names = [""]
        elif len({*given, *taken}) == len(given) + len(taken) and all(_is_name(n) for n in given):
            names = given
        else:
            names = [next(numbers) for _ in new]
        for (key, place), name in zip(new, names, strict=True):
            self._seen[key].names[place] = name


def _trains(optimizer: Optimizer, network: nn.Module) -> bool:
    ours = set(map(id, network.parameters()))
    return any(id(p) in ours for group in optimizer.param_groups for p in group["params"])


def _is_name(name: str) -> bool:
    return re.fullmatch(r"_(?!None$)[\w\-. ]{1,100}", name, re.ASCII) is not None


_watched: list[_Rates] = []
_hook: RemovableHandle | None = None


def _stepped(optimizer: Optimizer, arguments: Any, keywords: Any) -> None:
    if torch.compiler.is_compiling():  # a compiled step would be compiled again for each rate
        return
    try:
        for rates in tuple(_watched):
            rates.stepped(optimizer)
    except Exception:  # noqa: BLE001 - training must go on, whatever an optimizer is
        return


def _watch(rates: _Rates) -> None:
    global _hook
    _watched.append(rates)
    if _hook is None:
        _hook = register_optimizer_step_post_hook(_stepped)


def _unwatch(rates: _Rates) -> None:
    global _hook
    if rates in _watched:
        _watched.remove(rates)
    if not _watched and _hook is not None:
        _hook.remove()
        _hook = None


# -- an epoch -------------------------------------------------------------------------------------


class _Open:
    """An epoch that is being watched, on the thread that began it."""

    def __init__(self, first: int, loader: Any) -> None:
        self.first = first  # steps before this one were of an interrupted process
        self._sampler = id(getattr(loader, "_index_sampler", None))
        self._key = get_ident()
        self._thread = _threads.setdefault(self._key, _Thread())
        self._thread.epochs += 1
        self._before = self._thread.batches, self._thread.seconds
        self._drawn_before = self._thread.drawn.get(self._sampler, 0)
        self._started = perf_counter()

    @property
    def drawn(self) -> int:
        """Batches that were drawn from the loader."""
        return self._thread.drawn.get(self._sampler, 0) - self._drawn_before

    def end(self) -> tuple[float, int, float]:
        """Return the seconds since the beginning, the batches drawn, and the seconds waited."""
        self._thread.epochs -= 1
        if not self._thread.epochs and _threads.get(self._key) is self._thread:
            del _threads[self._key]
        batches, seconds = self._before
        drawn, waited = self._thread.batches - batches, self._thread.seconds - seconds
        return perf_counter() - self._started, drawn, waited


class LoopWatch:
    """Watches the loop of a run; values are those of this rank."""

    def __init__(self, network: nn.Module | None, loader: Any = None, is_on: bool = True) -> None:
        """Watch nothing yet.

        Args:
            network: Its optimizers are watched; without one, those that the loop's thread steps.
            loader: What the loop draws from. If it is not a DataLoader, waiting is measured only if
                each step has drawn a batch from some DataLoader.
            is_on: Whether to watch at all.
        """
        self._is_on = is_on
        self._loader, self._is_torch = loader, isinstance(loader, DataLoader)
        self._network = None if network is None else weakref.ref(network)
        self._rates = _Rates(network)
        self._open: list[_Open] = []  # one at most; the finalizer shares the list
        self.close = weakref.finalize(self, _close, self._rates, self._open)
        """Stop watching; an open epoch is forgotten."""
        self.close.atexit = False

    def watch(self, network: nn.Module | None) -> None:
        """Watch another network from now on; its loop has replaced the old one."""
        self._network = None if network is None else weakref.ref(network)
        self._rates.watch(network)

    def begin(self, first: int = 0) -> None:
        """Begin an epoch in this thread.

        Args:
            first: Number of the epoch's steps that an interrupted process had done.
        """
        if not self._is_on:
            return
        _time_loaders()
        if self._rates not in _watched:
            _watch(self._rates)
        self._rates.begin()
        self._open[:] = [_Open(first, self._loader)]

    @property
    def drawn(self) -> int | None:
        """Batches of the epoch that were drawn from the run's DataLoader; None if unknown."""
        return self._open[0].drawn if self._open and self._is_torch else None

    def end(self, meter: EpochMeter) -> dict[str, float]:
        """End the epoch, and return its metrics; what is not known is left out.

        Args:
            meter: The meter of the epoch, after it has waited for the device.
        """
        if not self._open:
            return {}
        epoch = self._open.pop()
        seconds, drawn, waited = epoch.end()
        metrics = self._rates.read()
        steps = len(meter) - epoch.first
        samples = meter.samples(epoch.first)
        if samples and seconds > 0:
            metrics["system/samples_per_second"] = samples / seconds
        if drawn and (self._is_torch or drawn >= steps) and seconds > 0:
            metrics["system/data_wait"] = min(1.0, waited / seconds)
        if (peak := self._peak_memory()) is not None:
            metrics["system/torch_peak_memory_megabytes"] = peak / 1e6
        return metrics

    def _peak_memory(self) -> int | None:
        network = None if self._network is None else self._network()
        if network is None or (device := device_of(network)).type in ("cpu", "meta"):
            return None
        try:
            return torch.accelerator.max_memory_allocated(device) or None
        except Exception:  # noqa: BLE001 - not every accelerator counts its memory
            return None


def _close(rates: _Rates, epochs: list[_Open]) -> None:
    _unwatch(rates)
    while epochs:
        epochs.pop().end()


@torch.no_grad()
def gradient_norm(network: nn.Module) -> Tensor | None:
    """Return the global L2 norm of the gradients without waiting for their devices.

    Returns:
        A scalar on the device of the first gradient; None without gradients, and if each rank has a
        part of them.
    """
    try:
        if is_sharded(network):
            return None
        norms = [_norm(one.grad) for one in unwrap(network).parameters() if one.grad is not None]
        if not norms:
            return None
        total: Tensor = torch.stack([norm.to(norms[0].device) for norm in norms]).norm()
        return total
    except Exception:  # noqa: BLE001 - there are many kinds of tensors
        return None


def _norm(gradient: Tensor) -> Tensor:
    values = gradient.coalesce().values() if gradient.is_sparse else gradient
    short = values.dtype in (torch.float16, torch.bfloat16)  # in which the norm may overflow
    norm: Tensor = torch.linalg.vector_norm(values, dtype=torch.float32 if short else None)
    return norm.float()


def gradient_metrics(norm: Tensor | None, histograms: Mapping[str, Any]) -> dict[str, float]:
    """Return the metric of a gradient norm; none if all gradients were set to zero.

    Args:
        norm: What `gradient_norm` returned.
        histograms: The record of the same gradients, which has waited for the device.
    """
    kinds = (one for one in histograms.get("histograms", ()) if one["kind"] == "gradient")
    if norm is None or not any(
        any(one["bins"]) or one["nan"] or one["posinf"] or one["neginf"] for one in kinds
    ):
        return {}
    return {"train/gradient_norm": norm.item()}


def beside(observed: Mapping[str, float], metrics: Mapping[str, float]) -> dict[str, float]:
    """Return what was observed without what the user's own metrics say, or leave no room for.

    MLflow's file store cannot have both a metric `train` and `train/lr`.
    """
    return {
        name: value
        for name, value in observed.items()
        if name not in metrics and name.split("/")[0] not in metrics
    }
