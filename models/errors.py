"""Errors of `models`.

ModelsError              an unusable name, number or folder (also a ValueError)

Every message names the argument, its value and what is allowed or what to do.
"""


class ModelsError(ValueError):
    """An argument, or the data it points to, is not usable."""


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or its type's name if the message is empty."""
    return next(iter(str(error).splitlines()), type(error).__name__)
