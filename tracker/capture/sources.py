"""The source code that a network's classes need, as files that are saved with a model."""

from __future__ import annotations

import ast
import builtins
import dis
import inspect
import math
import os
import shutil
import sys
import sysconfig
from argparse import Namespace
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import fields, is_dataclass
from pathlib import Path
from types import CodeType, ModuleType, SimpleNamespace
from typing import Any

from torch import nn

_HARMLESS = {
    *(f"builtins.{name}" for name in ("abs", "len", "max", "min", "pow", "round", "sorted", "sum")),
    *("collections.OrderedDict", "collections.namedtuple", "pathlib.Path", "re.compile"),
    *("dataclasses.dataclass", "dataclasses.field", "functools.cache", "functools.lru_cache"),
    *("functools.partial", "functools.wraps"),
    *("typing.NamedTuple", "typing.TypeVar", "logging.getLogger", "enum.auto"),
    *("torch.device", "torch.Size", "torch.finfo", "torch.iinfo", "torch.cuda.is_available"),
    *("torch.autograd.grad_mode.no_grad", "torch.autograd.grad_mode.inference_mode"),
}
"""What a definition may call where it stands: the result is the same wherever it is loaded."""
_PURE = ("math.", "None.str.", "None.dict.", "torch._VariableFunctionsClass.")

_BUILDER = """

import pickle as _pickle
from importlib import import_module as _module


class Unpickler(_pickle.Unpickler):
    # Named in pickle_module_info.txt: mlflow.pytorch reads a state dict with it.

    def load(self):
        state = super().load()
        network = {network}
        network.load_state_dict(state)
        return network
"""


def builder(network: nn.Module) -> tuple[str, str]:
    """Return the source of a module that makes a network from its weights, and what it calls.

    The arguments of the class are those that the network keeps as attributes of the same name, or
    defaults, so the result must be compared with the network. Of the program itself (`__main__`)
    only the definitions that the class needs are part of the source.

    Raises:
        ValueError: The class cannot be found by its name, or an argument is not known.
    """
    needed: set[str] = set()
    called = _Writer(needed).network(network)
    source = _definitions(needed) if needed else ""
    return source + _BUILDER.format(network=called), called


class _Writer:
    """Writes values as Python expressions."""

    def __init__(self, needed: set[str]) -> None:
        self._needed = needed  # names of the program

    def network(self, network: nn.Module) -> str:
        kind = type(network)
        parts = [part for part in network._modules.values() if part is not None]
        if kind is nn.Sequential and list(network._modules) == [*map(str, range(len(parts)))]:
            return f"{self.name(kind)}({', '.join(map(self.network, parts))})"
        are_there = {name: each is not None for name, each in network._parameters.items()}
        kept = {**vars(network), **network._modules, **are_there}  # bias=False
        arguments = {}
        for name, each in list(inspect.signature(kind.__init__).parameters.items())[1:]:
            if each.kind in (each.VAR_POSITIONAL, each.VAR_KEYWORD):
                continue
            try:
                held = next(kept[key] for key in (name, f"_{name}") if key in kept)
                arguments[name] = self.value(held)
            except (StopIteration, ValueError):
                if each.default is each.empty:
                    raise ValueError(
                        f"{kind.__name__} keeps its argument {name} in no attribute of plain values"
                    ) from None
        return self.call(kind, arguments)

    def call(self, kind: type, arguments: dict[str, str]) -> str:
        return f"{self.name(kind)}({', '.join(f'{k}={v}' for k, v in arguments.items())})"

    def name(self, kind: type) -> str:
        if "<locals>" in kind.__qualname__:
            raise ValueError(f"{kind.__name__} is defined in a function")
        if kind.__module__ == "__main__":
            self._needed.add(kind.__qualname__.partition(".")[0])
            return kind.__qualname__
        return f"_module({kind.__module__!r}).{kind.__qualname__}"

    def value(self, value: Any) -> str:
        if type(value) is float and not math.isfinite(value):
            return f"float({str(value)!r})"
        if value is None or type(value) in (bool, int, float, str):
            return repr(value)
        if type(value) in (list, tuple):
            items = ", ".join(map(self.value, value))
            return f"[{items}]" if type(value) is list else f"({items}{',' * bool(value)})"
        if type(value) is dict:
            pairs = (f"{self.value(key)}: {self.value(item)}" for key, item in value.items())
            return f"{{{', '.join(pairs)}}}"
        if isinstance(value, type):
            return self.name(value)
        if isinstance(value, nn.Module):
            return self.network(value)
        if is_dataclass(value):
            names = [field.name for field in fields(value) if field.init]
        elif isinstance(value, (SimpleNamespace, Namespace)):
            names = list(vars(value))
        else:
            raise ValueError(f"a {type(value).__name__} has no expression")
        return self.call(type(value), {name: self.value(getattr(value, name)) for name in names})


def _definitions(names: set[str]) -> str:
    """The statements of the program, or of a notebook, that define `names` and what these need."""
    program = sys.modules["__main__"]
    file = getattr(program, "__file__", None)
    cells = [Path(file).read_text("utf-8")] if file else list(getattr(program, "In", ()))
    body: list[ast.stmt] = []
    for cell in cells:
        with suppress(SyntaxError):  # a notebook's magic
            body += ast.parse(cell).body
    defined: dict[str, list[ast.stmt]] = {}
    for statement in body:
        for name in _defined(statement):
            defined.setdefault(name, []).append(statement)
    pending, kept = set(names), set[int]()
    while pending:
        for statement in defined.get(pending.pop(), ()):
            if id(statement) in kept:
                continue
            kept.add(id(statement))
            _check_runs(statement, program)
            used = (node.id for node in ast.walk(statement) if isinstance(node, ast.Name))
            pending.update(used)
    unknown = {
        name
        for each in body
        if id(each) in kept
        for name in _globals_of(each)
        if name not in defined and not name.startswith("__")
    }
    values = [line for name in sorted(unknown) if (line := _as_statement(name, program))]
    if values:
        values.insert(0, "from importlib import import_module as _module")
    future = [
        each for each in body if isinstance(each, ast.ImportFrom) and each.module == "__future__"
    ]
    chosen = [*future, *(each for each in body if id(each) in kept)]
    definitions = [ast.unparse(each) for each in chosen]
    return "\n\n".join([*definitions[: len(future)], *values, *definitions[len(future) :]])


def _globals_of(statement: ast.stmt) -> set[str]:
    """The global names that a statement and the functions in it read."""
    pending = [compile(ast.Module([statement], []), "", "exec", dont_inherit=True)]
    names = set()
    while pending:
        code = pending.pop()
        pending += [each for each in code.co_consts if isinstance(each, CodeType)]
        names |= {
            each.argval
            for each in dis.get_instructions(code)
            if each.opname in ("LOAD_GLOBAL", "LOAD_NAME")
        }
    return names


def _as_statement(name: str, program: ModuleType) -> str | None:
    """Define a global that `import *`, or a statement inside `if` or `try`, has set."""
    value = getattr(program, name, None)
    if isinstance(value, ModuleType):
        return f"import {value.__name__} as {name}" if value is not program else None
    module = getattr(value, "__module__", None)
    if module != "__main__" and getattr(sys.modules.get(module or ""), name, None) is value:
        return f"from {module} import {name}" if value is not None else None
    try:
        return f"{name} = {_Writer(set()).value(value)}" if value is not None else None
    except ValueError:
        return None


def _defined(statement: ast.stmt) -> Iterator[str]:
    if isinstance(statement, (ast.FunctionDef, ast.ClassDef)):
        yield statement.name
    elif isinstance(statement, ast.Import):
        yield from ((each.asname or each.name).partition(".")[0] for each in statement.names)
    elif isinstance(statement, ast.ImportFrom) and statement.module != "__future__":
        yield from (each.asname or each.name for each in statement.names)
    elif isinstance(statement, (ast.Assign, ast.AnnAssign)):
        targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
        yield from (n.id for t in targets for n in ast.walk(t) if isinstance(n, ast.Name))


def _check_runs(statement: ast.stmt, program: ModuleType) -> None:
    """Raise ValueError for a definition that calls more than what gives the same value anywhere.

    A program may parse its arguments, read files or train; loading a model must do none of that.
    """
    for node in _run_at_once(statement):
        if isinstance(node, ast.Call):
            called = _held(node.func, program)
        elif isinstance(node, ast.Attribute) and _held(node, program) in (sys.argv, os.environ):
            called = None
        else:
            continue
        if not _is_harmless(called):
            raise ValueError(f"it needs `{ast.unparse(statement):.60}`, which the program runs")


def _run_at_once(statement: ast.stmt) -> Iterator[ast.AST]:
    """The nodes that run where the statement stands: not the bodies of functions."""
    pending: list[ast.AST] = [statement]
    while pending:
        node = pending.pop()
        yield node
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            pending += [*node.decorator_list, node.args]
        elif isinstance(node, ast.Lambda):
            pending.append(node.args)
        else:
            pending += ast.iter_child_nodes(node)


def _held(name: ast.expr, program: ModuleType) -> Any:
    """The object that a dotted name has in the program; None for any other expression."""
    if isinstance(name, ast.Attribute):
        return getattr(_held(name.value, program), name.attr, None)
    if isinstance(name, ast.Name):
        return getattr(program, name.id, getattr(builtins, name.id, None))
    return name.value if isinstance(name, ast.Constant) else None


def _is_harmless(called: Any) -> bool:
    if getattr(called, "__module__", "") == "__main__":  # a configuration, without own code
        is_plain = is_dataclass(called) or getattr(called, "__init__", None) is object.__init__
        return isinstance(called, type) and (is_plain or issubclass(called, tuple))
    if isinstance(called, type) and (
        called.__module__ == "builtins" or issubclass(called, nn.Module)
    ):
        return True
    name = f"{getattr(called, '__module__', '')}.{getattr(called, '__qualname__', '')}"
    return name in _HARMLESS or (name.startswith(_PURE) and not name.endswith(".from_file"))


def copy_sources(network: nn.Module, folder: Path, source: str = "") -> list[str]:
    """Copy the Python files of the user's own modules that `network` needs to `folder`.

    These are the modules of its classes, and those that they import: files or whole packages that
    are not installed. The program itself (`__main__`) is left out, since importing it would run it.

    Args:
        network: The network.
        folder: Where the files are copied to.
        source: More code, whose imports are needed too.

    Returns:
        The files and folders, each to be found by `import` where `folder` is in `sys.path`.
    """
    classes = {kind for module in network.modules() for kind in type(module).__mro__}
    pending = {kind.__module__.partition(".")[0] for kind in classes}
    pending.update(_imported(source))
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
