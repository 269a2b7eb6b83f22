"""Vega-Lite specifications of the page's charts.

Data is passed as values in fields with fixed names, and no expression is built from it, so that a name in a run folder
is only ever text. Colours are variables of the style sheet, so that a chart follows the page's light or dark scheme.
Labels have no limit of length; they are wrapped, so that no two of them read alike.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lora_bench.console.format import to_single_line

if TYPE_CHECKING:
    from collections.abc import Sequence

Spec = dict[str, Any]

SERIES = 8
"""Number of series with their own colour and shape."""
OTHERS = "others"
"""Name in the legend of what has no colour of its own."""
SHAPES = ("circle", "square", "triangle-up", "diamond", "cross", "triangle-down", "triangle-right", "triangle-left")
LINE_WIDTH = 26
"""Characters of a line of a label."""
LINE_HEIGHT = 15
LEGEND_WIDTH = 38
"""Characters of a line of a legend."""
TIP = {"field": "tip", "type": "nominal"}
SIGNED = {"format": "+.3~f", "labelExpr": "datum.value === 0 ? '0' : datum.label"}
"""Axis of differences: numbers with their sign, and zero without one."""


def chart(values: Sequence[dict[str, Any]], layers: Sequence[Spec], **properties: Any) -> Spec:
    """Return a specification as wide as its place on the page.

    Args:
        values: the data that layers share.
        layers: of marks, from the bottom to the top.
        properties: further properties, as `height`.
    """
    return {
        "width": "container",
        "autosize": {"type": "fit-x", "contains": "padding"},
        "data": {"values": list(values)},
        "layer": list(layers),
        **properties,
    }


def axis(title: str | None, **properties: Any) -> Spec:
    """Return an axis with a title."""
    return {"title": title, **properties}


def quantity(field: str, title: str | None, *, log: bool = False, **properties: Any) -> Spec:
    """Return the channel of a number whose axis need not begin at 0."""
    scale: Spec = {"type": "log"} if log else {"zero": False}
    scale |= {"nice": not log, "padding": 10} | properties.pop("scale", {})
    axis_properties = {"tickCount": 5, **properties.pop("axis", {})}
    return {
        "field": field,
        "type": "quantitative",
        "scale": scale,
        "axis": axis(title, **axis_properties),
        **properties,
    }


def series_channels(names: Sequence[str], *, shape: bool = True, others: bool = False) -> Spec:
    """Return the channels of colour and shape for the series in the field `series`.

    Args:
        names: of the series, at most `SERIES`.
        shape: series also differ in shape.
        others: there are points that belong to no series.
    """
    domain = [*names, *([OTHERS] if others else [])]
    colours = [f"var(--s{i})" for i in range(len(names))] + ["var(--other)"] * others
    legend = {"title": None} if len(domain) > 1 else None
    channels: Spec = {
        "color": {
            "field": "series",
            "type": "nominal",
            "scale": {"domain": domain, "range": colours},
            "legend": legend,
        }
    }
    if shape:
        shapes = [*SHAPES[: len(names)], *(["circle"] * others)]
        channels["shape"] = {
            "field": "series",
            "type": "nominal",
            "scale": {"domain": domain, "range": shapes},
            "legend": legend,
        }
    return channels


def legend_name(name: str) -> str:
    """Return a name in lines that fit into a legend on a narrow screen."""
    return "\n".join(wrap(name, LEGEND_WIDTH))


def legend_width(names: Sequence[str]) -> Spec:
    """Return the property that tells the page how wide an entry of the legend is, so that it can choose columns."""
    return {"usermeta": {"longest": max((len(line) for name in names for line in name.split("\n")), default=1)}}


# -- labels --


def wrap(text: str, width: int = LINE_WIDTH) -> list[str]:
    """Return a text as lines of at most `width` characters, broken at spaces, else after a sign or anywhere."""
    lines = [""]
    for word in to_single_line(text).split(" "):
        if lines[-1] and len(lines[-1]) + 1 + len(word) > width:
            lines.append("")
        lines[-1] += f"{' ' if lines[-1] else ''}{word}"
        while len(lines[-1]) > width:
            cut = max(lines[-1].rfind(sign, width // 2, width) for sign in "._-=/,") + 1 or width
            lines[-1:] = [lines[-1][:cut], lines[-1][cut:]]
    return lines


def labels(names: Sequence[str], parts: Sequence[Sequence[str]]) -> tuple[dict[str, str], int]:
    """Return a label of several lines for each name, and the number of lines, which is the same for all.

    Args:
        names: unique names.
        parts: the texts of each label, each of which begins a line.
    """
    lines = [[line for part in texts if part for line in wrap(part)] for texts in parts]
    height = max(map(len, lines), default=1)
    padded = {}
    for name, own in zip(names, lines, strict=True):
        before = (height - len(own)) // 2
        padded[name] = "\n".join([" "] * before + own + [" "] * (height - len(own) - before))
    return padded, height


def lanes(domain: Sequence[str], lines: int) -> Spec:
    """Return the vertical channel of the field `label`: a lane for each label, in this order."""
    return {
        "field": "label",
        "type": "nominal",
        "scale": {"domain": list(domain)},
        "axis": axis(None, labelOffset=-LINE_HEIGHT * (lines - 1) / 2, grid=False, domain=False, ticks=False),
    }


def lane_height(lines: int) -> int:
    """Return the height of a lane whose label has a number of lines."""
    return LINE_HEIGHT * lines + 17


# -- charts that several sections have --


def interval_chart(
    values: Sequence[dict[str, Any]],
    domain: Sequence[str],
    lines: int,
    title: str,
    *,
    margin: float | None = None,
    signs: bool = False,
) -> Spec:
    """Return values with their intervals, a lane for each.

    Args:
        values: with `label`, `value`, `low`, `high`, `recommended` and `tip`; bounds may be None.
        domain: the labels in order.
        lines: of each label.
        title: of the axis.
        margin: half the width of a band around 0 to shade, and 0 is marked; None: neither.
        signs: the axis has numbers with their sign.
    """
    x = quantity("value", title, axis=SIGNED if signs else {})
    y = lanes(domain, lines)
    colour = {"condition": {"test": "datum.recommended", "value": "var(--accent)"}, "value": "var(--mark)"}
    layers: list[Spec] = []
    if margin is not None:
        band = {"data": {"values": [{"low": -margin, "high": margin}]}, "mark": {"type": "rect", "fill": "var(--band)"}}
        layers.append(
            band | {"encoding": {"x": quantity("low", title), "x2": {"field": "high"}, "tooltip": {"value": None}}}
        )
        zero = {"data": {"values": [{"value": 0}]}, "mark": {"type": "rule", "stroke": "var(--soft)"}}
        layers.append(zero | {"encoding": {"x": x}})
    layers.append(
        {
            "mark": {"type": "rule", "strokeWidth": 3, "strokeCap": "round", "opacity": 0.75},
            "transform": [{"filter": "isValid(datum.low)"}],
            "encoding": {
                "x": {**x, "field": "low"},
                "x2": {"field": "high"},
                "y": y,
                "color": colour,
                "tooltip": TIP,
            },
        }
    )
    layers.append(
        {
            "mark": {"type": "point", "filled": True, "opacity": 1, "size": 120},
            "encoding": {
                "x": x,
                "y": y,
                "color": colour,
                "shape": {"condition": {"test": "datum.recommended", "value": "diamond"}, "value": "circle"},
                "size": {"condition": {"test": "datum.recommended", "value": 190}, "value": 100},
                "tooltip": TIP,
            },
        }
    )
    return chart(values, layers, height=lane_height(lines) * len(domain))


def heat_map(
    values: Sequence[dict[str, Any]],
    columns: Sequence[str],
    rows: Sequence[str],
    titles: tuple[str, str | None],
    angle: int = 0,
) -> Spec:
    """Return a heat map with the number in each cell; the darker, the larger.

    Args:
        values: with `column`, `row`, `text`, `share` (0 to 1, the darkness), `chosen` and `tip`.
        columns: from left to right.
        rows: from the top to the bottom.
        titles: of the columns and of the rows.
        angle: of the columns' labels in degrees.
    """
    x: Spec = {"field": "column", "type": "ordinal", "scale": {"domain": list(columns)}}
    x |= {"axis": axis(titles[0], labelAngle=angle, grid=False, domain=False, ticks=False)}
    y: Spec = {"field": "row", "type": "ordinal", "scale": {"domain": list(rows)}}
    y |= {"axis": axis(titles[1], grid=False, domain=False, ticks=False)}
    text_colour = {"condition": {"test": "datum.share > 0.6", "value": "var(--paper)"}, "value": "var(--ink)"}
    shade: Spec = {"field": "share", "type": "quantitative", "legend": None}
    shade |= {"scale": {"domain": [0, 1], "range": [0.06, 0.92]}}
    inset = {"type": "rect", "fill": "transparent", "stroke": "var(--ink)", "strokeWidth": 2.5}
    return chart(
        values,
        [
            {
                "mark": {"type": "rect", "fill": "var(--heat)", "stroke": "var(--paper)", "strokeWidth": 2},
                "encoding": {"x": x, "y": y, "fillOpacity": shade, "tooltip": TIP},
            },
            {"mark": inset, "transform": [{"filter": "datum.chosen"}], "encoding": {"x": x, "y": y, "tooltip": TIP}},
            {
                "mark": {"type": "text", "fontSize": 12.5},
                "encoding": {
                    "x": x,
                    "y": y,
                    "text": {"field": "text", "type": "nominal"},
                    "color": text_colour,
                    "tooltip": TIP,
                },
            },
        ],
        height=34 * len(rows),
    )
