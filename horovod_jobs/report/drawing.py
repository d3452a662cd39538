"""The job graph as an inline SVG: layers from left to right, long edges led around the boxes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

BOX_W, BOX_H, GAP_X, GAP_Y, LANE_H, MARGIN = 174, 50, 38, 16, 14, 8

# Status -> fill, border, dash of the border: told apart without colour by the word in the box and the dash.
STATUS = {
    "ran": ("#e8f4ee", "#009e73", ""),
    "reused": ("#e6f1f8", "#0072b2", ""),
    "running": ("#fdf6dd", "#8a6d00", ""),
    "pending": ("#ffffff", "#777777", "4 3"),
    "skipped": ("#f4f4f4", "#999999", "2 3"),
    "failed": ("#fbe9e0", "#d55e00", ""),
}


@dataclass(frozen=True)
class Box:
    """A stage to draw: name, second line, status, and the names of the boxes it needs."""

    name: str
    note: str
    status: str
    needs: Sequence[str]


def layers(needs: Mapping[str, Sequence[str]]) -> dict[str, int]:
    """The length of the longest way to each node. Needs that are no node themselves do not count."""
    depth: dict[str, int] = {}

    def visit(name: str, open_: frozenset[str]) -> int:
        if name not in depth:
            # A cycle cannot run; should a damaged manifest hold one, it is cut rather than followed for ever.
            sources = [source for source in needs[name] if source in needs and source not in open_]
            depth[name] = 1 + max((visit(source, open_ | {name}) for source in sources), default=-1)
        return depth[name]

    for name in needs:
        visit(name, frozenset({name}))
    return depth


def draw_graph(boxes: Sequence[Box]) -> str:
    """An ``<svg>`` element of all boxes and the edges between them; empty text without boxes."""
    if not boxes:
        return ""
    depth = layers({box.name: list(box.needs) for box in boxes})
    chains = _chains(boxes, depth)
    columns = _columns(boxes, depth, chains)
    place, width, height = _places(columns)
    edges = [_edge([place[node] for node in chain]) for chain in chains]
    shapes = [_box(box, *place[box.name]) for box in boxes]
    label = "Job graph: " + "; ".join(
        f"{box.name} ({box.status}) needs {', '.join(box.needs) or 'nothing'}" for box in boxes
    )
    return (
        f'<svg class="graph" xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" '
        f'height="{height}" role="img" aria-label="{escape(label)}">'
        '<defs><marker id="graph-arrow" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" '
        'orient="auto">'
        '<path d="M0 0.8 L7.5 4 L0 7.2 z" fill="#555"/></marker></defs>' + "".join(edges) + "".join(shapes) + "</svg>"
    )


def _chains(boxes: Sequence[Box], depth: Mapping[str, int]) -> list[list[str]]:
    """Each edge as a chain of nodes: its ends and, in every layer between, a lane of its own."""
    chains = []
    for box in boxes:
        for source in dict.fromkeys(box.needs):
            if source in depth and depth[source] < depth[box.name]:
                lanes = [f"\0{source}\0{box.name}\0{d}" for d in range(depth[source] + 1, depth[box.name])]
                chains.append([source, *lanes, box.name])
    return chains


def _columns(boxes: Sequence[Box], depth: Mapping[str, int], chains: list[list[str]]) -> list[list[str]]:
    """Nodes by layer, ordered so that edges cross little (barycentre sweeps, Sugiyama et al. 1981)."""
    columns: list[list[str]] = [[] for _ in range(max(depth.values()) + 1)]
    for box in boxes:
        columns[depth[box.name]].append(box.name)
    before, after = defaultdict(list), defaultdict(list)
    for chain in chains:
        for i, node in enumerate(chain):
            if node not in depth:
                columns[depth[chain[0]] + i].append(node)
            if i:
                before[node].append(chain[i - 1])
                after[chain[i - 1]].append(node)
    for sweep in range(6):
        neighbours = after if sweep % 2 else before
        position = {node: i for column in columns for i, node in enumerate(column)}
        for column in reversed(columns) if sweep % 2 else columns:
            own = {node: i for i, node in enumerate(column)}
            key = {
                n: sum(position[m] for m in neighbours[n]) / len(neighbours[n]) if neighbours[n] else own[n]
                for n in column
            }
            column.sort(key=lambda node, key=key, own=own: (key[node], own[node]))  # type: ignore[misc]
            position.update({node: i for i, node in enumerate(column)})
    return columns


def _places(columns: list[list[str]]) -> tuple[dict[str, tuple[float, float]], int, int]:
    """Top left corner of each box (of a lane: its left end and middle), and the drawing's size."""

    def extent(node: str) -> int:
        return LANE_H if node.startswith("\0") else BOX_H

    heights = [sum(extent(node) for node in column) + GAP_Y * (len(column) - 1) for column in columns]
    place: dict[str, tuple[float, float]] = {}
    for i, column in enumerate(columns):
        x, y = MARGIN + i * (BOX_W + GAP_X), MARGIN + (max(heights) - heights[i]) / 2
        for node in column:
            place[node] = (x, y + (LANE_H / 2 if node.startswith("\0") else 0))
            y += extent(node) + GAP_Y
    return place, 2 * MARGIN + len(columns) * (BOX_W + GAP_X) - GAP_X, 2 * MARGIN + max(heights)


def _edge(chain: list[tuple[float, float]]) -> str:
    (x0, y0), *lanes, (x1, y1) = chain
    x, y = x0 + BOX_W, y0 + BOX_H / 2
    path = f"M{x:g} {y:g}"
    for lane_x, lane_y in [*lanes, (x1 - 2, y1 + BOX_H / 2)]:
        middle = (x + lane_x) / 2
        path += f" C{middle:g} {y:g} {middle:g} {lane_y:g} {lane_x:g} {lane_y:g}"
        x, y = lane_x, lane_y
        if (lane_x, lane_y) in lanes:
            x += BOX_W
            path += f" L{x:g} {y:g}"
    return f'<path d="{path}" fill="none" stroke="#555" stroke-width="1.2" marker-end="url(#graph-arrow)"/>'


def _box(box: Box, x: float, y: float) -> str:
    fill, border, dash = STATUS.get(box.status, STATUS["pending"])
    dashes = f' stroke-dasharray="{dash}"' if dash else ""
    name = box.name if len(box.name) <= 20 else box.name[:19] + "…"
    middle = f'x="{x + BOX_W / 2:g}" text-anchor="middle"'
    return (
        f"<g><title>{escape(box.name)}: {escape(box.note)}</title>"
        f'<rect x="{x:g}" y="{y:g}" width="{BOX_W}" height="{BOX_H}" '
        f'rx="5" fill="{fill}" stroke="{border}" stroke-width="1.5"{dashes}/>'
        f'<text {middle} y="{y + 21:g}" font-size="14" font-weight="600">{escape(name)}</text>'
        f'<text {middle} y="{y + 39:g}" font-size="11.5" fill="#333">{escape(box.note)}</text></g>'
    )
