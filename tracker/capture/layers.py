"""A traced network as a table of its layers and a picture of its graph."""

from __future__ import annotations

import pandas as pd
from torch import nn

from tracker.capture.graph_layout import Box
from tracker.capture.graph_svg import draw
from tracker.capture.trace import (
    Call,
    Shape,
    Trace,
    class_name,
    count_parameters,
    is_leaf,
    modules_outside_leaves,
)
from tracker.texts import visible
from tracker.training.device import unwrap

_HEADING = 100  # characters of a name in the graph


def layer_table(network: nn.Module, trace: Trace | None) -> pd.DataFrame:
    """Return one row per call of a leaf module, then one per layer that was not called.

    A module with both children and its own parameters has a row before its children. The last row,
    `total`, counts each parameter once. Lazy parameters count 0.

    Args:
        network: The traced network.
        trace: Provides order and shapes; without it, layers have no shapes.

    Returns:
        Columns: layer, type, input shape, output shape, parameters, trainable. Shapes are text,
        such as `Nx6x24x24` with N for the batch; empty for layers that were not called.
    """
    network = unwrap(network)
    modules = modules_outside_leaves(network)
    leaves = {path for path, module in modules.items() if is_leaf(module)}
    batch = trace.batch if trace else None

    order: list[tuple[str, Call | None]] = []
    owners = [  # modules with children and their own parameters, until they have a row
        path
        for path, module in modules.items()
        if path not in leaves and next(module.parameters(recurse=False), None) is not None
    ]
    for call in trace.calls if trace else ():
        if call.name in leaves and not call.is_terminal:
            above = [path for path in owners if call.name.startswith(f"{path}." if path else "")]
            owners = [path for path in owners if path not in above]
            order += [*((path, None) for path in above), (call.name, call)]
    rest = leaves.difference(path for path, _ in order).union(owners)
    order += [(path, None) for path in modules if path in rest]

    rows = [
        (
            path or "(network)",
            class_name(modules[path]),
            _text(call.input_shape, batch) if call else "",
            _text(call.shape, batch) if call else "",
            *count_parameters(modules[path].parameters(recurse=path in leaves)),
        )
        for path, call in order
    ]
    rows.append(("total", "", "", "", *count_parameters(network.parameters())))
    columns = ["layer", "type", "input shape", "output shape", "parameters", "trainable"]
    return pd.DataFrame(rows, columns=columns)


def graph_svg(trace: Trace, title: str) -> str:
    """Draw the graph of a trace as a self-contained SVG document.

    Functions whose result reaches neither a layer nor the output are left out.

    Args:
        trace: The calls to draw, from the inputs at the top to the output.
        title: The heading of the picture.
    """
    needed = {i for i, call in enumerate(trace.calls) if call.name or call.is_terminal}
    for index in reversed(range(len(trace.calls))):
        if index in needed:
            needed.update(trace.calls[index].inputs)
    position = {index: place for place, index in enumerate(sorted(needed))}
    boxes = [
        _box(trace.calls[index], tuple(position[i] for i in trace.calls[index].inputs), trace.batch)
        for index in position
    ]
    return draw(
        boxes, visible(title, _HEADING), "N = batch size" if trace.batch is not None else ""
    )


def _text(shape: Shape | None, batch: int | None) -> str:
    """`Nx6x24x24`, with multiplication signs, for (2, 6, 24, 24) in a batch of 2."""
    if shape is None:
        return ""
    sizes = [str(size) for size in shape]
    if sizes and shape[0] == batch:
        sizes[0] = "N"
    return "\N{MULTIPLICATION SIGN}".join(sizes) or "scalar"


def _box(call: Call, inputs: tuple[int, ...], batch: int | None) -> Box:
    details = [call.kind] if call.name else []
    if call.parameters:
        details.append(f"{call.parameters:,} param{'s' if call.parameters > 1 else ''}")
        if not call.trainable:
            details.append("frozen")
    return Box(
        heading=visible(call.name or call.kind, _HEADING),
        shape=_text(call.shape, batch),
        detail=" · ".join(details),
        role="terminal" if call.is_terminal else "layer" if call.parameters else "function",
        inputs=inputs,
    )
