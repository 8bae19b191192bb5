"""The source code that a network's classes need, as files that are saved with a model."""

from __future__ import annotations

import ast
import shutil
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

from torch import nn


def copy_sources(network: nn.Module, folder: Path) -> list[str]:
    """Copy the Python files of the user's own modules that `network` needs to `folder`.

    These are the modules of its classes, and those that they import: files or whole packages that
    are not installed. The program itself (`__main__`) is left out, since importing it would run it.

    Returns:
        The files and folders, each to be found by `import` where `folder` is in `sys.path`.
    """
    classes = {kind for module in network.modules() for kind in type(module).__mro__}
    pending = {kind.__module__.partition(".")[0] for kind in classes}
    copied: dict[str, Path] = {}
    while pending:
        name = pending.pop()
        path = _own_path(sys.modules.get(name))
        if name in copied or path is None:
            continue
        target = copied[name] = folder / path.name
        files = sorted(path.rglob("*.py")) if path.is_dir() else [path]
        for file in files:
            into = target / file.relative_to(path) if path.is_dir() else target
            into.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, into)
            pending.update(_imported(file.read_text("utf-8", errors="replace")))
    return sorted(map(str, copied.values()))


def _own_path(module: ModuleType | None) -> Path | None:
    """The file or the folder of a top-level module, unless it is installed or the program."""
    file = getattr(module, "__file__", None) or next(iter(getattr(module, "__path__", ())), None)
    if file is None or module is None or module.__name__ == "__main__":
        return None
    path = Path(file).resolve()
    path = path.parent if path.name == "__init__.py" else path
    installed = [
        Path(sysconfig.get_path(kind)).resolve() for kind in ("stdlib", "purelib", "platlib")
    ]
    if any(folder in path.parents for folder in installed) or "site-packages" in path.parts:
        return None
    return path if path.is_dir() or path.suffix == ".py" else None


def _imported(source: str) -> Iterator[str]:
    """The top-level names of the modules that a file imports."""
    try:
        nodes = list(ast.walk(ast.parse(source)))
    except (SyntaxError, ValueError):
        return
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module.partition(".")[0]
