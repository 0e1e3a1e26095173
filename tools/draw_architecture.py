#!/usr/bin/env python
"""Draw the wings of the package and the imports between them: docs/architecture.svg.

    python tools/draw_architecture.py [FILE.svg]

Every wing stands above all that it imports. What several wings import is one river that they flow
into, in the colour of the imported wing; its width counts imports. The wings that are below
everything have no rivers.
"""

import argparse
import colorsys
import textwrap
from collections import Counter, defaultdict
from pathlib import Path
from random import Random

from walls import GROUND, PLACE, WINGS, arrows, lines

OUTPUT = Path(__file__).resolve().parent.parent / "docs" / "architecture.svg"
WIDTH, HEIGHT, STEP = 196.0, 82.0, 150.0  # of a box; from row to row
GAP, MARGIN = 22.0, 24.0
STARTS = 40  # tries
ENTRIES = ("__main__", "train")  # a line or two that start `commands`: no wings to look at
FONT = "Helvetica, Arial, 'DejaVu Sans', sans-serif"
NOTE = "Nearly everything imports these three: no rivers lead to them."

Node = tuple[str, int]  # a wing and a row: its box in its own row, its river above
Flow = Counter[tuple[Node, Node]]  # from a node to one in the row below: imports


def rows_of(drawn: Counter[tuple[str, str]]) -> dict[str, int]:
    """The row of each wing, from 0 at the bottom: one above the highest that it imports."""
    row: dict[str, int] = {}
    for wing in WINGS:
        if wing.name not in (*GROUND, *ENTRIES):
            below = [row[target] for name, target in drawn if name == wing.name]
            row[wing.name] = max(below, default=-1) + 1
    return row


def flow_of(drawn: Counter[tuple[str, str]], row: dict[str, int]) -> Flow:
    """What flows from row to row; imports of one wing flow together."""
    flow: Flow = Counter()
    for (wing, target), count in drawn.items():
        here = (wing, row[wing])
        for level in range(row[wing] - 1, row[target] - 1, -1):
            flow[here, (target, level)] += count
            here = (target, level)
    return flow


def place(flow: Flow, row: dict[str, int]) -> dict[Node, float]:
    """x of every node: near those that it is joined to, none over another."""
    found = [arrange(flow, row, Random(start)) for start in range(STARTS)]
    ways = [sum(abs(x[a] - x[b]) * n**0.5 for (a, b), n in flow.items()) for x in found]
    x = found[ways.index(min(ways))]  # of some tries the one with the shortest ways
    left = min(at - room(node, row) for node, at in x.items())
    return {node: at - left + MARGIN for node, at in x.items()}


def arrange(flow: Flow, row: dict[str, int], chance: Random) -> dict[Node, float]:
    """One try of `place`, from an order by chance."""
    near: dict[Node, list[tuple[Node, float]]] = defaultdict(list)
    for (above, below), count in flow.items():
        near[above].append((below, count**0.5))
        near[below].append((above, count**0.5))
    levels: dict[int, list[Node]] = defaultdict(list)
    for node in sorted({*near, *row.items()}):
        levels[node[1]].append(node)
    x = {node: 1000 * chance.random() for node in sorted({*near, *row.items()})}
    for sweep in range(80):
        upward, ordering = sweep % 2 == 1, sweep < 60
        for level in sorted(levels, reverse=not upward):
            wish = {}
            for node in levels[level]:
                # First the order, by the neighbours of one side at a time; then by all of them.
                side = [n for n in near[node] if not ordering or (n[0][1] < level) == upward]
                total = sum(weight for _, weight in side)
                wish[node] = sum(x[n] * w for n, w in side) / total if side else x[node]
            if ordering:
                levels[level].sort(key=lambda node: (wish[node], node))  # noqa: B023
            x.update(spread(levels[level], [wish[node] for node in levels[level]], row))
    return x


def room(node: Node, row: dict[str, int]) -> float:
    """Half of the width that a node needs."""
    return WIDTH / 2 if row[node[0]] == node[1] else 4.0


def spread(nodes: list[Node], wish: list[float], row: dict[str, int]) -> dict[Node, float]:
    """Positions in this order, far enough apart, with the least squares to the wished ones."""
    offsets = [0.0]
    for one, other in zip(nodes, nodes[1:], strict=False):
        offsets.append(offsets[-1] + room(one, row) + room(other, row) + GAP)
    blocks: list[tuple[float, int]] = []  # (mean, size), pooled where neighbours would overlap
    for wanted, offset in zip(wish, offsets, strict=True):
        blocks.append((wanted - offset, 1))
        while len(blocks) > 1 and blocks[-2][0] > blocks[-1][0]:
            (mean, size), (last, count) = blocks[-2], blocks[-1]
            blocks[-2:] = [((mean * size + last * count) / (size + count), size + count)]
    means = [mean for mean, size in blocks for _ in range(size)]
    return {n: mean + offset for n, mean, offset in zip(nodes, means, offsets, strict=True)}


def colour(wing: str, light: float) -> str:
    """A hue of its own for each wing, far from those of its neighbours."""
    rgb = colorsys.hls_to_rgb(PLACE[wing] * 0.381966 % 1, light, 0.5)
    return "#" + "".join(f"{round(part * 255):02x}" for part in rgb)


def thickness(count: int) -> float:
    """Width of a river."""
    return 0.5 + 0.5 * count


def rivers(flow: Flow, x: dict[Node, float], row: dict[str, int], y: dict[int, float]) -> list[str]:
    """The imports: widest first, so that thin ones lie on top."""
    ways: dict[tuple[Node, Node], float] = {}  # x at the upper end: side by side under a box
    for node in x:
        out = sorted((below for above, below in flow if above == node), key=lambda below: x[below])
        total = sum(thickness(flow[node, below]) + 2 for below in out)
        at = x[node] - total / 2
        for below in out:
            wide = thickness(flow[node, below]) + 2
            ways[node, below] = at + wide / 2 if row[node[0]] == node[1] else x[node]
            at += wide
    parts = []
    for (above, below), count in sorted(flow.items(), key=lambda item: -item[1]):
        ends = row[below[0]] == below[1]
        start, end = y[above[1]] + HEIGHT, y[below[1]] - (7 if ends else 0)
        from_x, to_x, middle = ways[above, below], x[below], (start + end) / 2
        hue, wide = colour(below[0], 0.62), thickness(count)
        parts.append(
            f'<path d="M{from_x:.1f},{start:.1f} C{from_x:.1f},{middle:.1f} {to_x:.1f},'
            f'{middle:.1f} {to_x:.1f},{end:.1f}" fill="none" stroke="{hue}" '
            f'stroke-width="{wide:.1f}" stroke-linecap="round"/>'
        )
        if ends:
            half = wide / 2 + 4
            shape = f"M{to_x - half:.1f},{end - 1:.1f} h{2 * half:.1f} l{-half:.1f},8 z"
        else:  # straight down past the boxes of this row
            wide = thickness(sum(n for (_, to), n in flow.items() if to == below))
            shape = f"M{to_x - wide / 2:.1f},{end:.1f} h{wide:.1f} v{HEIGHT} h{-wide:.1f} z"
        parts.append(f'<path d="{shape}" fill="{hue}"/>')
    return parts


def box(wing: str, line: str, count: int, x: float, y: float, width: float = WIDTH) -> list[str]:
    """A wing: its name, its lines of code, what it is for."""
    said = textwrap.wrap(line.replace("`", ""), round(width / 6.4))
    return [
        f'<rect x="{x - width / 2:.1f}" y="{y:.1f}" width="{width:.1f}" height="{HEIGHT}" rx="7" '
        f'fill="{colour(wing, 0.95)}" stroke="{colour(wing, 0.45)}" stroke-width="1.2"/>',
        f'<text x="{x:.1f}" y="{y + 21:.1f}" font-size="15" font-weight="bold">{wing}</text>',
        f'<text x="{x:.1f}" y="{y + 37:.1f}" font-size="11" fill="#555">{count:,} lines</text>',
        *(
            f'<text x="{x:.1f}" y="{y + 55 + 14 * at:.1f}" font-size="11">{words}</text>'
            for at, words in enumerate(said)
        ),
    ]


def said(drawn: Counter[tuple[str, str]]) -> list[str]:
    """The imports in words: what the picture shows, for those who cannot see it, and for tests."""
    targets: dict[str, list[str]] = defaultdict(list)
    for wing, target in sorted(drawn, key=lambda pair: (PLACE[pair[0]], PLACE[pair[1]])):
        targets[wing].append(target)
    return [f"{wing} imports {', '.join(names)}" for wing, names in targets.items()]


def draw() -> str:
    """The picture, as SVG."""
    hidden = (*GROUND, *ENTRIES)
    found = arrows()
    drawn = Counter({pair: n for pair, n in found.items() if not {*pair} & {*hidden}})
    row, count = rows_of(drawn), lines()
    flow = flow_of(drawn, row)
    x = place(flow, row)
    top = max(row.values())
    y = {level: MARGIN + (top - level) * STEP for level in range(-1, top + 1)}
    width = max(at + room(node, row) for node, at in x.items()) + MARGIN
    parts = rivers(flow, x, row, y)
    each = (width - 2 * MARGIN - (len(GROUND) - 1) * GAP) / len(GROUND)
    for wing, line in WINGS:
        if wing in row:
            parts += box(wing, line, count[wing], x[wing, row[wing]], y[row[wing]])
        elif wing in GROUND:
            middle = MARGIN + each / 2 + GROUND.index(wing) * (each + GAP)
            parts += box(wing, line, count[wing], middle, y[-1], each)
    height = y[-1] + HEIGHT + 2 * MARGIN
    parts.append(
        f'<text x="{width / 2:.1f}" y="{height - 18:.1f}" font-size="12" fill="#555">{NOTE}</text>'
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height:.0f}" '
        f'font-family="{FONT}" text-anchor="middle" fill="#111">\n'
        "<title>The wings of megatron_infifpo and the imports between them</title>\n"
        "<desc>" + "\n".join(said(found)) + "</desc>\n"
        f'<rect width="{width:.0f}" height="{height:.0f}" fill="#fff"/>\n'
        + "\n".join(parts)
        + "\n</svg>\n"
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("output", nargs="?", type=Path, default=OUTPUT, metavar="FILE.svg")
    output = parser.parse_args().output
    output.write_text(draw(), encoding="utf-8")
    print(output)
