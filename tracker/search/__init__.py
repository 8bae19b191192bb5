"""Studies: searches for hyperparameters, on Optuna."""

from tracker.errors import MissingError
from tracker.extras import install

try:
    import optuna as _  # noqa: F401 - every module here needs it
except ModuleNotFoundError as error:
    raise MissingError(f"Studies need the package {error.name}; {install('search')}") from error
