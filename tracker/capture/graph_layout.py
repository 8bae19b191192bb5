"""Layout of a directed graph in ranks from top to bottom.

The steps follow Sugiyama, Tagawa and Toda (1981): ranks by longest path, a point in each rank that
an edge passes, order within the ranks by barycentres, then horizontal positions. One longest path,
the trunk, becomes a straight line, with everything else next to it.
"""

from __future__ import annotations

from bisect import bisect_right, insort
from collections.abc import Sequence
from dataclasses import dataclass
from graphlib import TopologicalSorter
from itertools import pairwise
from statistics import fmean
from typing import Literal

# Lengths are in pixels.
PADDING = 10.0
LINE = 17.0
_RANK_GAP = 26.0
_COLUMN_GAP = 26.0
_POINT_GAP = 14.0  # on either side of an edge that passes a box or another edge
_HEADING_CHARACTER = 7.4  # monospaced at 12 px: 0.6 em, with some room for wider fonts
_SMALL_CHARACTER = 6.8  # at 11 px

_MAX_POINTS = 50_000  # a loop that keeps its thousand states would need half a million


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
class Graph:
    """Nodes in ranks: first the boxes, then the points through which long edges pass."""

    rows: list[list[int]]
    """Nodes of each rank, from left to right."""
    parents: list[list[int]]
    """For each node, those one rank above."""
    children: list[list[int]]
    """For each node, those one rank below."""
    trunk: set[int]
    """One box per rank."""
    boxes: int
    """Number of boxes."""
    omitted: int
    """Number of omitted edges."""

    def is_point(self, node: int) -> bool:
        """Return whether the node is a point of a long edge."""
        return node >= self.boxes


@dataclass(frozen=True)
class Layout:
    """Positions of the nodes, in pixels."""

    x: list[float]
    """Middle of a box; a point has no width."""
    tops: list[float]
    bottoms: list[float]
    box_width: float


def arrange(boxes: Sequence[Box]) -> tuple[Graph, Layout]:
    """Arrange boxes, each of which comes after its inputs."""
    graph = _ranked(boxes)
    _sort_rows(graph)
    return graph, _placed(graph, boxes)


def _ranked(boxes: Sequence[Box]) -> Graph:
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
    return Graph(rows, parents, children, trunk, len(boxes), edges - sum(map(len, readers)))


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


def _sort_rows(graph: Graph, sweeps: int = 8) -> None:
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


def _horizontal_positions(graph: Graph, box_width: float) -> list[float]:
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


def _columns(graph: Graph) -> list[int]:
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


def _placed(graph: Graph, boxes: Sequence[Box]) -> Layout:
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
    return Layout(x, tops, bottoms, box_width)


def _box_width(box: Box) -> float:
    first = len(box.heading) * _HEADING_CHARACTER
    if box.shape:
        first += (len(box.shape) + 2) * _SMALL_CHARACTER
    return max(first, len(box.detail) * _SMALL_CHARACTER) + 2 * PADDING


def _box_height(box: Box) -> float:
    return LINE * (2 if box.detail else 1) + 0.8 * PADDING
