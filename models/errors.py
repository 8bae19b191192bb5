"""What can go wrong in `models`.

ModelsError              a name, number or folder is not usable (also a ValueError)

Every message is one sentence that names the argument, its value and what is allowed.
"""


class ModelsError(ValueError):
    """An argument, or the data that it points to, is not usable."""
