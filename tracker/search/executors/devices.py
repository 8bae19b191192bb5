"""Which GPUs each worker sees."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import cycle, islice
from numbers import Integral, Real
from typing import Any

from tracker.errors import ArgumentError

VARIABLE = "CUDA_VISIBLE_DEVICES"


def place(workers: int, devices: Any = None, gpus_per_trial: Any = None) -> list[str | None]:
    """Return what CUDA_VISIBLE_DEVICES is for each worker; None leaves it as it is.

    Args:
        workers: The number of workers.
        devices: The names of GPUs as a sequence or a text with commas, "auto" for all that this
            process may use, "all" to let every worker see all; None: "auto" if there are several
            workers and several GPUs, or `gpus_per_trial` is given.
        gpus_per_trial: How many GPUs a worker gets, or which part of one; None: one, which workers
            share if there are more of them.

    Raises:
        ArgumentError: An argument is not allowed, or there are more workers than places.
    """
    _check_number(gpus_per_trial)
    if devices is None:
        is_needless = gpus_per_trial is None and (workers == 1 or len(visible()) < 2)
        devices = "all" if is_needless else "auto"
    if devices == "all":
        if gpus_per_trial is not None:
            raise ArgumentError(f"gpus_per_trial={gpus_per_trial} needs devices other than 'all'.")
        return [None] * workers
    names = visible() if devices == "auto" else _checked(devices)
    if gpus_per_trial is None:
        return list(islice(cycle(names or [None]), workers))
    if not names:
        raise ArgumentError(f"gpus_per_trial={gpus_per_trial} needs a GPU; {_shown(names)}.")
    if gpus_per_trial < 1:
        places = names * int(1 / gpus_per_trial + 1e-9)  # 1 / 0.1 is 10, if only just
    else:
        size = int(gpus_per_trial)
        starts = range(0, len(names) - size + 1, size)
        places = [",".join(names[start : start + size]) for start in starts]
    if workers > len(places):
        raise ArgumentError(
            f"workers={workers} is not allowed: gpus_per_trial={gpus_per_trial} makes "
            f"{len(places)} places on the devices {', '.join(names)}."
        )
    return list(places[:workers])


def visible() -> list[str]:
    """Return the GPUs in CUDA_VISIBLE_DEVICES if it is set, or all GPUs of this machine."""
    return [names[0] for names in _known()]


@contextmanager
def environment_for(devices: str) -> Iterator[None]:
    """Set CUDA_VISIBLE_DEVICES for the processes that are started in this block."""
    before = os.environ.get(VARIABLE)
    os.environ[VARIABLE] = devices
    try:
        yield
    finally:
        del os.environ[VARIABLE]
        if before is not None:
            os.environ[VARIABLE] = before


def _check_number(gpus_per_trial: Any) -> None:
    if gpus_per_trial is None:
        return
    is_number = isinstance(gpus_per_trial, Real) and not isinstance(gpus_per_trial, bool)
    if not is_number or not (0 < gpus_per_trial <= 1 or gpus_per_trial in range(1, 1000)):
        raise ArgumentError(
            f"gpus_per_trial={gpus_per_trial!r} is not allowed; it must be a whole number from 1, "
            "or a part of a GPU such as 0.5."
        )


def _checked(devices: Any) -> list[str]:
    """Return the names of devices that were given as a sequence or a text with commas."""
    several = devices.split(",") if isinstance(devices, str) else devices
    if not isinstance(several, Sequence) or not several:
        raise ArgumentError(
            f"devices={devices!r} is not allowed; it must be 'auto', 'all', or a list of GPUs."
        )
    names = [
        str(int(each)) if isinstance(each, Integral) else str(each).strip() for each in several
    ]
    known = _known()
    for name in names:
        is_known = any(name in each for each in known)
        if not is_known or names.count(name) > 1:
            why = "twice" if is_known else "but " + _shown([each[0] for each in known])
            raise ArgumentError(f"devices={devices!r} is not allowed: it names {name!r} {why}.")
    return names


def _shown(names: Sequence[str]) -> str:
    listed = ", ".join(names) or "no GPU"
    setting = os.environ.get(VARIABLE)
    return f"this machine has {listed}" if setting is None else f"{VARIABLE}={setting} has {listed}"


def _known() -> list[list[str]]:
    """Return the names of each GPU that this process may use."""
    setting = os.environ.get(VARIABLE)
    if setting is None:
        return list(_installed())
    names: list[str] = []
    for name in map(str.strip, setting.split(",")):
        if not name.isdecimal() and not name.startswith(("GPU-", "MIG-")):
            break  # CUDA ignores the rest
        names.append(name)
    return [[name] for name in names] if len(set(names)) == len(names) else []  # as CUDA does


def _installed() -> Iterator[list[str]]:
    """Yield the names of each GPU, or of the instances that it is divided into."""
    try:
        import pynvml

        pynvml.nvmlInit()
    except Exception:  # noqa: BLE001 - there is no driver
        return
    try:
        for index in range(pynvml.nvmlDeviceGetCount()):
            gpu = pynvml.nvmlDeviceGetHandleByIndex(index)
            parts: list[list[str]] = []
            with suppress(pynvml.NVMLError):  # it cannot be divided
                for part in range(pynvml.nvmlDeviceGetMaxMigDeviceCount(gpu)):
                    with suppress(pynvml.NVMLError):  # unused
                        instance = pynvml.nvmlDeviceGetMigDeviceHandleByIndex(gpu, part)
                        parts.append([pynvml.nvmlDeviceGetUUID(instance)])
            yield from parts or [[str(index), pynvml.nvmlDeviceGetUUID(gpu)]]
    finally:
        pynvml.nvmlShutdown()
