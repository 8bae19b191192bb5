"""The version, in the one place that the wheel and the run's tags read it from."""

__version__ = "0.1.0"
