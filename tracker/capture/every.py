"""Every: which histograms a manager logs, and when."""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal

from tracker.errors import ArgumentError


@dataclass(frozen=True, kw_only=True)
class Every:
    """When a manager logs histograms, and of which tensors; by default of all, in each epoch.

    Raises:
        ArgumentError: A value is not allowed.
    """

    steps: int | None = None
    """Log at every so many calls of `track_loss`, or steps of `fit`, not by epoch."""
    epochs: int | None = None
    """Log at the end of every so many epochs."""
    only: str = "*"
    """A pattern of tensors' (`layer4.0.weight`) and modules' names: `layer4.*`, as in `fnmatch`."""
    weights: bool = True
    """Whether to log weights."""
    gradients: bool = True
    """Whether to log gradients."""
    activations: bool = False
    """Whether a manager logs the outputs of leaf modules: of the step, or an epoch's last batch."""

    def __post_init__(self) -> None:
        for name in ("steps", "epochs"):
            value = getattr(self, name)
            if value is not None and (type(value) is not int or value < 1):
                raise ArgumentError(
                    f"{name}={value!r} is not allowed; it must be an integer from 1."
                )
        if self.steps is not None and self.epochs is not None:
            raise ArgumentError(f"steps={self.steps} and epochs={self.epochs} exclude each other.")
        if not isinstance(self.only, str) or not self.only:
            raise ArgumentError(
                f"only={self.only!r} is not allowed; it must be a pattern of names."
            )

    def is_due(self, *, epoch: int) -> bool:
        """Return whether histograms are logged at the end of `epoch`."""
        return self.steps is None and epoch % (self.epochs or 1) == 0

    def takes(self, name: str, kind: Literal["weight", "gradient", "activation"]) -> bool:
        """Return whether the histogram of this tensor, or of this module's outputs, is logged."""
        are_taken: bool = getattr(self, f"{kind}s")
        names = (name, f"{name}.") if kind == "activation" else (name,)  # `fc.*` takes `fc` too
        return are_taken and any(fnmatchcase(each, self.only) for each in names)


def checked_every(histograms: bool | Every) -> Every | None:
    """Return what the argument `histograms` of a manager means; None for no histograms."""
    if isinstance(histograms, Every):
        return histograms
    if isinstance(histograms, bool):
        return Every() if histograms else None
    raise ArgumentError(
        f"histograms={histograms!r} is not allowed; it must be True, False or Every(…)."
    )
