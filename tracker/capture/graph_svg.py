"""Drawing of a directed graph in ranks from top to bottom, as SVG.

The steps follow Sugiyama, Tagawa and Toda (1981): ranks by longest path, a point in each rank that
an edge passes, order within the ranks by barycentres, then horizontal positions. One longest path,
the trunk, is drawn as a straight line, and everything else beside it.
"""

from __future__ import annotations

import re
from bisect import bisect_right, insort
from collections.abc import Sequence
from dataclasses import dataclass
from graphlib import TopologicalSorter
from itertools import pairwise
from statistics import fmean
from typing import Literal
from xml.sax.saxutils import escape


@dataclass(frozen=True)
class Box:
    """A node of the graph with its text."""

    heading: str
    shape: str
    """To the right of the heading."""
    detail: str
    """Second line; omitted if empty."""
    role: Literal["terminal", "layer", "function"]
    inputs: tuple[int, ...]
    """Indices of the boxes with an edge to this one, all smaller than its own."""


@dataclass(frozen=True)
class _Graph:
    """Nodes in ranks: first the boxes, then the points through which long edges pass."""

    rows: list[list[int]]  # the nodes of each rank from left to right
    parents: list[list[int]]  # of each node, one rank above
    children: list[list[int]]  # of each node, one rank below
    trunk: set[int]  # one box per rank
    boxes: int
    omitted: int  # edges

    def is_point(self, node: int) -> bool:
        return node >= self.boxes


@dataclass(frozen=True)
class _Layout:
    """Positions of the nodes in pixels: x of a box is its middle; a point has no width."""

    x: list[float]
    tops: list[float]
    bottoms: list[float]
    box_width: float


# Lengths are in pixels.
_MARGIN = 20.0
_TITLE = 44.0  # height of title and note
_RANK_GAP = 26.0
_COLUMN_GAP = 26.0
_POINT_GAP = 14.0  # on either side of an edge that passes a box or another edge
_PADDING = 10.0
_LINE = 17.0
_HEADING_CHARACTER = 7.4  # monospaced at 12 px: 0.6 em, with some room for wider fonts
_SMALL_CHARACTER = 6.8  # at 11 px
_TITLE_CHARACTER = 9.3  # at 15 px

_MAX_POINTS = 50_000  # a loop that keeps its thousand states would need half a million

_STYLE = """
text { font: 12px ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace }
.title { font-size: 15px; font-weight: bold; fill: #1f2933 }
.heading { font-weight: bold; fill: #1f2933 }
.small { font-size: 11px; fill: #52606d }
.terminal rect { fill: #e4e7eb; stroke: #7b8794 }
.layer rect { fill: #e1effe; stroke: #3f83c8 }
.function rect { fill: #fdf4dc; stroke: #cda43c }
.edge { fill: none; stroke: #7b8794; stroke-width: 1.25; stroke-linecap: round }
.arrow { fill: #7b8794 }
"""


def draw(boxes: Sequence[Box], title: str, note: str) -> str:
    """Draw a graph as an SVG document that also works in an <img> element.

    Args:
        boxes: The nodes, each after those it has edges from.
        title: Heading of the picture.
        note: A small line below the title.
    """
    graph = _ranked(boxes)
    _sort_rows(graph)
    if graph.omitted:
        note = f"{note} · {graph.omitted:,} of the longest edges are omitted".removeprefix(" · ")
    layout = _placed(graph, boxes)
    half = layout.box_width / 2
    middles, points = layout.x[: len(boxes)], layout.x[len(boxes) :]
    left = min([*(x - half for x in middles), *points], default=0.0)
    right = max([*(x + half for x in middles), *points], default=0.0)
    width = max(right - left, len(title) * _TITLE_CHARACTER) + 2 * _MARGIN
    height = _TITLE + max(layout.bottoms, default=0.0) + 2 * _MARGIN
    x, y = left - _MARGIN, -_TITLE - _MARGIN
    size = f'width="{width:.0f}" height="{height:.0f}"'
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" role="img" {size} '
            f'viewBox="{x:.0f} {y:.0f} {width:.0f} {height:.0f}">',
            f"<title>{_escaped(title)}</title>",
            f"<style>{_STYLE}</style>",
            f'<rect x="{x:.0f}" y="{y:.0f}" {size} fill="#ffffff"/>',
            _text("title", left, 14 - _TITLE, title),
            _text("small", left, 31 - _TITLE, note),
            *_edges(graph, layout),
            *(_drawn(box, layout, node) for node, box in enumerate(boxes)),
            "</svg>\n",
        ]
    )


def _ranked(boxes: Sequence[Box]) -> _Graph:
    """Put each box below its inputs, and a point in each rank that an edge passes.

    The edges that leave a box share their points, so they are drawn as one edge that branches.
    """
    rank, trunk = _ranks(boxes)
    rows: list[list[int]] = [[] for _ in range(max(rank, default=-1) + 1)]
    readers: list[list[int]] = [[] for _ in boxes]
    for node, box in enumerate(boxes):
        rows[rank[node]].append(node)
        for source in box.inputs:
            readers[source].append(node)
    edges = sum(map(len, readers))
    readers = _short_edges(readers, rank)

    parents: list[list[int]] = [[] for _ in boxes]
    children: list[list[int]] = [[] for _ in boxes]
    for node in range(len(boxes)):
        above = node
        last = max((rank[reader] for reader in readers[node]), default=0)
        for level in range(rank[node] + 1, last + 1):
            below = [reader for reader in readers[node] if rank[reader] == level]
            if level < last:
                below.append(len(parents))
                rows[level].append(len(parents))
                parents.append([])
                children.append([])
            for target in below:
                parents[target].append(above)
                children[above].append(target)
            above = below[-1]
    return _Graph(rows, parents, children, trunk, len(boxes), edges - sum(map(len, readers)))


def _ranks(boxes: Sequence[Box]) -> tuple[list[int], set[int]]:
    """Return the rank of each box, and the boxes of one longest path."""
    depth = [0] * len(boxes)
    constant = [False] * len(boxes)  # does not depend on a terminal
    first_reader: dict[int, int] = {}  # its rank
    for node, box in enumerate(boxes):
        depth[node] = max((depth[source] + 1 for source in box.inputs), default=0)
        constant[node] = box.role != "terminal" and all(constant[source] for source in box.inputs)
    rank = list(depth)
    for node in reversed(range(len(boxes))):
        if constant[node] and node in first_reader:  # not at the top, but just above its reader
            rank[node] = first_reader[node] - 1
        for source in boxes[node].inputs:
            first_reader[source] = min(rank[node], first_reader.get(source, rank[node]))

    trunk: set[int] = set()
    end = rank.index(max(rank)) if rank else None
    while end is not None:
        trunk.add(end)
        above = rank[end] - 1
        end = next((node for node in boxes[end].inputs if depth[node] == rank[node] == above), None)
    return rank, trunk


def _short_edges(readers: list[list[int]], rank: list[int]) -> list[list[int]]:
    """Return the readers of each box, without the farthest if they need too many points."""

    def within(longest: int) -> list[list[int]]:
        return [[r for r in row if rank[r] - rank[n] <= longest] for n, row in enumerate(readers)]

    def points(kept: list[list[int]]) -> int:
        return sum(max(rank[r] for r in row) - rank[n] - 1 for n, row in enumerate(kept) if row)

    longest = len(rank)
    while points(within(longest)) > _MAX_POINTS:
        longest //= 2
    return within(longest)


def _sort_rows(graph: _Graph, sweeps: int = 8) -> None:
    """Order each row by its neighbours' mean position; keep the order with fewest crossings."""
    place = {node: i for row in graph.rows for i, node in enumerate(row)}

    def crossings() -> int:
        total = 0
        for row in graph.rows:
            ends: list[int] = []
            for node in row:
                targets = [place[child] for child in graph.children[node]]
                total += sum(len(ends) - bisect_right(ends, target) for target in targets)
                for target in targets:
                    insort(ends, target)
        return total

    fewest, best = crossings(), [list(row) for row in graph.rows]
    for sweep in range(sweeps):
        if fewest == 0:
            break
        down = sweep % 2 == 0
        neighbours = graph.parents if down else graph.children
        for row in graph.rows if down else reversed(graph.rows):
            means = {node: fmean(place[n] for n in neighbours[node] or [node]) for node in row}
            row.sort(key=means.__getitem__)
            place.update((node, i) for i, node in enumerate(row))
        crossed = crossings()
        if crossed < fewest:
            fewest, best = crossed, [list(row) for row in graph.rows]
    graph.rows[:] = best


def _horizontal_positions(graph: _Graph, box_width: float) -> list[float]:
    """Return the x of each node: the trunk at 0, and each column as close to it as possible."""
    column = _columns(graph)
    side = dict.fromkeys(column, 1)
    # For each column, its neighbours on the trunk's side and the least distance to each of them.
    inner: dict[int, dict[int, float]] = {head: {} for head in column}
    for row in graph.rows:
        middle = next(place for place, node in enumerate(row) if node in graph.trunk)
        for sign, outwards in ((1, row[middle:]), (-1, row[middle::-1])):
            for near, far in pairwise(outwards):
                points = graph.is_point(near) + graph.is_point(far)
                distance = box_width * (2 - points) / 2 + (_POINT_GAP if points else _COLUMN_GAP)
                known = inner[column[far]].get(column[near], 0.0)
                inner[column[far]][column[near]] = max(known, distance)
                side[column[far]] = sign
    reach: dict[int, float] = {}
    for head in TopologicalSorter(inner).static_order():
        reach[head] = max((reach[near] + gap for near, gap in inner[head].items()), default=0.0)
    return [side[head] * reach[head] for head in column]


def _columns(graph: _Graph) -> list[int]:
    """Return for each node the top node of its column: the nodes straight above and below it.

    A column follows edges that do not cross those of another column, so that columns can be placed
    side by side: first the trunk's, then those of long edges, then those between boxes (Brandes
    and Köpf, 2001).
    """
    place = {node: i for row in graph.rows for i, node in enumerate(row)}
    column = list(range(len(place)))
    for row in graph.rows:
        edges = [(node, child) for node in row for child in graph.children[node]]
        edges.sort(
            key=lambda edge: (
                not graph.trunk.issuperset(edge),
                not (graph.is_point(edge[0]) and graph.is_point(edge[1])),
                graph.is_point(edge[0]) or graph.is_point(edge[1]),
            )
        )
        kept: list[tuple[int, int]] = []
        for node, child in edges:
            ends = (place[node], place[child])
            if all((ends[0] - a) * (ends[1] - b) > 0 for a, b in kept):
                kept.append(ends)
                column[child] = column[node]
    return column


def _placed(graph: _Graph, boxes: Sequence[Box]) -> _Layout:
    """Place each rank below the previous one, with more room above it for wide curves."""
    box_width = max((_box_width(box) for box in boxes), default=0.0)
    x = _horizontal_positions(graph, box_width)
    tops, bottoms = [0.0] * len(x), [0.0] * len(x)
    y = 0.0
    for rank, row in enumerate(graph.rows):
        if rank > 0:
            reach = max(abs(x[p] - x[node]) for node in row for p in [*graph.parents[node], node])
            y += _RANK_GAP + min(0.05 * reach, _RANK_GAP)
        heights = {node: _box_height(boxes[node]) for node in row if not graph.is_point(node)}
        height = max(heights.values())
        for node in row:
            margin = (height - heights.get(node, height)) / 2
            tops[node], bottoms[node] = y + margin, y + height - margin
        y += height
    return _Layout(x, tops, bottoms, box_width)


def _edges(graph: _Graph, layout: _Layout) -> list[str]:
    """Return a path for each edge, in one piece through its points, with an arrow at its end."""
    drawn: list[str] = []
    begun: dict[int, str] = {}  # the path as far as each point
    for node in (node for row in graph.rows for node in row):
        x, top, bottom = layout.x[node], layout.tops[node], layout.bottoms[node]
        for parent in graph.parents[node]:
            start, above = layout.x[parent], layout.bottoms[parent]
            path = begun.pop(parent, f"M{start:.1f} {above:.1f}") + _curve(start, above, x, top)
            if graph.is_point(node):
                begun[node] = f"{path}V{bottom:.1f}"
            else:
                drawn.append(f'<path class="edge" d="{path}"/>')
                drawn.append(f'<path class="arrow" d="M{x:.1f} {top:.1f}l-3.5 -7h7z"/>')
    return drawn


def _curve(x0: float, y0: float, x1: float, y1: float) -> str:
    """Continue a path from (x0, y0) to (x1, y1), vertical at both ends."""
    if abs(x0 - x1) < 0.1:
        return f"V{y1:.1f}"
    middle = (y0 + y1) / 2
    return f"C{x0:.1f} {middle:.1f} {x1:.1f} {middle:.1f} {x1:.1f} {y1:.1f}"


def _box_width(box: Box) -> float:
    first = len(box.heading) * _HEADING_CHARACTER
    if box.shape:
        first += (len(box.shape) + 2) * _SMALL_CHARACTER
    return max(first, len(box.detail) * _SMALL_CHARACTER) + 2 * _PADDING


def _box_height(box: Box) -> float:
    return _LINE * (2 if box.detail else 1) + 0.8 * _PADDING


def _drawn(box: Box, layout: _Layout, node: int) -> str:
    left, top = layout.x[node] - layout.box_width / 2, layout.tops[node]
    right, baseline = left + layout.box_width, top + 0.4 * _PADDING + 0.75 * _LINE
    return "".join(
        [
            f'<g class="{box.role}">',
            f'<rect x="{left:.1f}" y="{top:.1f}" width="{layout.box_width:.1f}" '
            f'height="{layout.bottoms[node] - top:.1f}" rx="5"/>',
            _text("heading", left + _PADDING, baseline, box.heading),
            _text("small", right - _PADDING, baseline, box.shape, 'text-anchor="end"'),
            _text("small", left + _PADDING, baseline + _LINE, box.detail),
            "</g>",
        ]
    )


def _text(style: str, x: float, y: float, text: str, attributes: str = "") -> str:
    if not text:
        return ""
    return f'<text class="{style}" x="{x:.1f}" y="{y:.1f}" {attributes}>{_escaped(text)}</text>'


def _escaped(text: str) -> str:
    """Return `text` as XML, with characters that XML does not allow replaced."""
    return escape(re.sub(r"[^\t\n\r\x20-\uD7FF\uE000-\uFFFD\U00010000-\U0010FFFF]", "\ufffd", text))
