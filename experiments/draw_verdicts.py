#!/usr/bin/env python3
"""Draw docs/img/verdicts.svg: how an interval, zero and the margin give a verdict.

    experiments/draw_verdicts.py

The drawing has its own background, so that it reads the same on a light and on a dark page.
"""

from __future__ import annotations

import argparse
from pathlib import Path

FILE = Path(__file__).parent.parent / "docs" / "img" / "verdicts.svg"
MARGIN = 1.0
"""Points of MCC."""
ROWS = (
    ("better", 0.8, 4.2, "above zero"),
    ("worse", -4.4, -0.6, "below zero"),
    ("equivalent", -0.6, 0.7, "within the margin"),
    ("inconclusive", -1.6, 3.8, "across zero and the margin"),
)
"""Verdict, bounds of the interval in points, and where it lies."""
WIDTH, LEFT, RIGHT, TOP, STEP = 720, 130, 480, 62, 46
LOW, HIGH = -5.0, 5.0
STYLE = """
  svg { font: 14px system-ui, sans-serif }
  .card { fill: #ffffff; stroke: #d0d7de } .ink { fill: #1f2328 } .soft { fill: #59636e }
  .grid { stroke: #d0d7de } .zero { stroke: #1f2328; stroke-dasharray: 4 3 } .margin { fill: #dfe4ea }
  .better { --c: #1a7f37 } .worse { --c: #b3261e } .equivalent { --c: #0550ae } .inconclusive { --c: #6e5494 }
  .interval { stroke: var(--c); stroke-width: 3 } .mean { fill: var(--c) }
  @media (prefers-color-scheme: dark) {
    .card { fill: #161b22; stroke: #3d444d } .ink { fill: #f0f6fc } .soft { fill: #a9b4c0 }
    .grid { stroke: #3d444d } .zero { stroke: #f0f6fc } .margin { fill: #2b323b }
    .better { --c: #56d364 } .worse { --c: #ff938a } .equivalent { --c: #79c0ff } .inconclusive { --c: #d2a8ff }
  }"""


def x_at(points: float) -> float:
    """Return the horizontal position of a difference in points."""
    return LEFT + (points - LOW) / (HIGH - LOW) * (RIGHT - LEFT)


def line(css: str, x1: float, y1: float, x2: float, y2: float) -> str:
    """Return a line of the drawing."""
    return f'<line class="{css}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'


def label(css: str, x: float, y: float, text: str, anchor: str = "start") -> str:
    """Return a text of the drawing."""
    return f'<text class="{css}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{text}</text>'


def draw() -> str:
    """Return the drawing as SVG."""
    bottom = TOP + len(ROWS) * STEP
    height = bottom + 62
    band = x_at(MARGIN) - x_at(-MARGIN)
    parts = [
        f'<rect class="card" x="0.5" y="0.5" width="{WIDTH - 1}" height="{height - 1}" rx="8"/>',
        f'<rect class="margin" x="{x_at(-MARGIN):.1f}" y="{TOP - 8}" width="{band:.1f}" height="{bottom - TOP + 8}"/>',
        label("soft", x_at(0), 28, "margin", "middle"),
        label("soft", x_at(0), 46, "−1 to +1 points", "middle"),
        label("soft", RIGHT + 24, 46, "95 % interval lies"),
        *(line("grid", x_at(tick), bottom, x_at(tick), bottom + 6) for tick in range(-4, 5, 2)),
        line("grid", LEFT, bottom, RIGHT, bottom),
        line("zero", x_at(0), TOP - 8, x_at(0), bottom),
    ]
    for tick in range(-4, 5, 2):
        sign = "−" if tick < 0 else "+" if tick > 0 else ""
        parts.append(label("soft", x_at(tick), bottom + 24, f"{sign}{abs(tick)}", "middle"))
    parts.append(label("soft", x_at(0), bottom + 46, "MCC of the row minus MCC of the baseline, in points", "middle"))
    for i, (verdict, low, high, where) in enumerate(ROWS):
        y = TOP + (i + 0.5) * STEP
        ends = [line("interval", x_at(end), y - 7, x_at(end), y + 7) for end in (low, high)]
        mean = f'<circle class="mean" cx="{x_at((low + high) / 2):.1f}" cy="{y:.1f}" r="6"/>'
        parts.append(f'<g class="{verdict}">{line("interval", x_at(low), y, x_at(high), y)}{"".join(ends)}{mean}</g>')
        parts += [label("ink", 20, y + 5, verdict), label("soft", RIGHT + 24, y + 5, where)]
    title = "Four 95 % intervals of a difference in MCC, and the verdict that each gives"
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{title}">',
            f"<title>{title}</title>",
            f"<style>{STYLE}\n</style>",
            *parts,
            "</svg>\n",
        ]
    )


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    FILE.write_text(draw(), encoding="utf-8")
