"""Drawing of a directed graph from top to bottom, as SVG."""

from __future__ import annotations

from collections.abc import Sequence
from xml.sax.saxutils import escape

from tracker.capture.graph_layout import LINE, PADDING, Box, Graph, Layout, arrange
from tracker.texts import visible

# Lengths are in pixels.
_MARGIN = 20.0
_TITLE = 44.0  # height of title and note
_TITLE_CHARACTER = 9.3  # monospaced at 15 px

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
    graph, layout = arrange(boxes)
    if graph.omitted:
        note = f"{note} · {graph.omitted:,} of the longest edges are omitted".removeprefix(" · ")
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


def _edges(graph: Graph, layout: Layout) -> list[str]:
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


def _drawn(box: Box, layout: Layout, node: int) -> str:
    left, top = layout.x[node] - layout.box_width / 2, layout.tops[node]
    right, baseline = left + layout.box_width, top + 0.4 * PADDING + 0.75 * LINE
    return "".join(
        [
            f'<g class="{box.role}">',
            f'<rect x="{left:.1f}" y="{top:.1f}" width="{layout.box_width:.1f}" '
            f'height="{layout.bottoms[node] - top:.1f}" rx="5"/>',
            _text("heading", left + PADDING, baseline, box.heading),
            _text("small", right - PADDING, baseline, box.shape, 'text-anchor="end"'),
            _text("small", left + PADDING, baseline + LINE, box.detail),
            "</g>",
        ]
    )


def _text(style: str, x: float, y: float, text: str, attributes: str = "") -> str:
    if not text:
        return ""
    return f'<text class="{style}" x="{x:.1f}" y="{y:.1f}" {attributes}>{_escaped(text)}</text>'


def _escaped(text: str) -> str:
    """Return `text` as XML; characters that XML does not allow are invisible too."""
    return escape(visible(text))
