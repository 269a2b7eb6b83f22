"""The comparison in words: who leads, by how much, at what cost, and whether the difference could be chance."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from lora_bench import stats
from lora_bench.report import axes, folders
from lora_bench.report.charts import picture, series_class
from lora_bench.report.html import Content, Markup, el, figure, join, several, table
from lora_bench.report.tradeoffs import bounds, header, mean_of, shown_as

if TYPE_CHECKING:
    from lora_bench.report.cast import Block, Entry
    from lora_bench.stats import Comparison

RIVALS = 8
"""Rows that are tested against the leader."""
ALPHA = 0.05
MARGIN = 0.01
"""A difference of the main metric up to this is of no account: one point of MCC."""


@dataclass(frozen=True)
class Rival:
    entry: Entry
    test: Comparison
    """Of the leader's minus the rival's."""
    p: float
    """Adjusted for the number of rivals (Holm)."""
    verdict: str
    """Of the leader: `better`, `worse`, `indistinguishable` or `unresolved`."""
    detectable: float
    """The smallest true difference found with a chance of 80 %."""
    seeds: int
    examples: int


def rivals(block: Block, split: str) -> list[Rival]:
    """The leader against the next rows: seeds paired, examples the same, both counted as chance; p by Holm."""
    metric = block.main.name.rsplit("/", 1)[-1]
    leader, *others = block.entries
    seen = _seen(leader, split)
    tested = []
    for entry in others[:RIVALS]:
        other = _seen(entry, split)
        pairs = [(seen[seed], other[seed]) for seed in seen if seed in other and _same(seen[seed], other[seed])]
        pairs = [pair for pair in pairs if _same(pair[0], pairs[0][0])]
        if pairs:
            ours = np.stack([a.scores >= 0.5 for a, _ in pairs])  # (S, N)
            theirs = np.stack([b.scores >= 0.5 for _, b in pairs])
            tested.append((entry, stats.crossed_test(pairs[0][0].labels, ours, theirs, metric), pairs))
    adjusted = stats.holm([test.p for _, test, _ in tested])
    return [
        Rival(entry, test, p, stats.verdict(test, MARGIN, p), stats.detectable(test), len(pairs), len(pairs[0][0].ids))
        for (entry, test, pairs), p in zip(tested, adjusted, strict=True)
    ]


def _seen(entry: Entry, split: str) -> dict[object, folders.Predictions]:
    found = {record["config"].get("seed"): folders.predictions(folder, split) for folder, record in entry.runs}
    return {seed: seen for seed, seen in found.items() if seen is not None}


def _same(one: folders.Predictions, other: folders.Predictions) -> bool:
    return np.array_equal(one.ids, other.ids) and np.array_equal(one.labels, other.labels)


# -- in words --


def headline(block: Block, tested: list[Rival]) -> str:
    """The verdict in one sentence."""
    leader = block.entries[0].name
    if len(block.entries) == 1:
        return f"One experiment: {leader}"
    beaten = [rival for rival in tested if rival.verdict == "better"]
    if not tested:
        return f"{leader} leads; whether by chance cannot be told"
    if tested[0].entry is block.entries[1] and len(beaten) == len(tested):
        return f"{leader} wins"
    if not beaten:
        return f"{leader} leads, but not beyond chance"
    first_unbeaten = next((rival.entry.name for rival in tested if rival.verdict != "better"), "")
    same = next((rival for rival in tested if rival.verdict == "indistinguishable"), None)
    if same is not None and same.entry.name == first_unbeaten:
        return f"{leader} leads, indistinguishable from {first_unbeaten}"
    return f"{leader} leads, not clearly ahead of {first_unbeaten}" if first_unbeaten else f"{leader} leads"


def summary(block: Block, tested: list[Rival]) -> Markup:
    """Paragraphs, tiles, and the differences as a chart and a table."""
    parts = [_paragraph(block, tested), _tiles(block, tested)]
    if tested:
        parts += [_forest(block, tested), el("p", _unseen(tested), class_="note")]
    return join(parts)


def _paragraph(block: Block, tested: list[Rival]) -> Markup:
    leader = block.entries[0]
    stat = leader.row.stats[block.main.name]
    low, high = bounds(stat)
    sentences: list[Content] = [el("strong", leader.name), f" has the highest {header(block.main)}: {stat.mean:.4f}"]
    if high > low:
        sentences.append(f" (95 % interval over {stat.n} seeds {low:.4f} to {high:.4f})")
    elif stat.n == 1:
        sentences.append(", from one seed, so how far chance moved it is not known")
    if len(block.entries) > 1:
        second = block.entries[1]
        lead = stat.mean - mean_of(second, block.main)
        sentences += [f". That is {points(lead)} above ", el("strong", second.name)]
        rival = next((rival for rival in tested if rival.entry is second), None)
        if rival is not None:
            sentences.append(f", a difference that is {_sure(rival)}")
        sentences.append(". ")
        sentences.append(_price(block))
    else:
        sentences.append(".")
    if not tested and len(block.entries) > 1:
        sentences.append(
            " No two of the best experiments have predictions of the same examples with the same seed, "
            "so no paired test was made."
        )
    return el("p", *sentences, class_="lead")


def _sure(rival: Rival) -> str:
    p = f"p = {rival.p:.3g}" if rival.p >= 0.001 else "p < 0.001"
    if rival.verdict == "better":
        return f"larger than chance explains ({p}, seeds and examples both counted, Holm over the rivals)"
    if rival.verdict == "indistinguishable":
        return f"within {points(MARGIN)}: the two are equivalent for practical purposes ({p})"
    return f"within what chance produces ({p}, seeds and examples both counted, Holm over the rivals)"


def _price(block: Block) -> str:
    """What the leader costs beside the cheapest row that is not far behind."""
    leader, told = block.entries[0], []
    for column in block.costs:
        mine = leader.stat(column)
        others = [(stat.mean, entry) for entry in block.entries[1:] if (stat := entry.stat(column))]
        if mine is None or not others or column.name not in ("cost.train_seconds", "params.adapter"):
            continue
        cost, cheapest = min(others, key=lambda pair: pair[0])
        show = shown_as(column)
        what = "of training" if column.kind == "seconds" else "adapter parameters"
        if cost < mine.mean:
            behind = points(mean_of(leader, block.main) - mean_of(cheapest, block.main))
            told.append(f"{show(mine.mean)} {what}, against {show(cost)} for {cheapest.name}, which is {behind} behind")
        else:
            told.append(f"{show(mine.mean)} {what}, the least of all")
    return f"It costs {'; and '.join(told)}." if told else ""


def points(difference: float) -> str:
    """A difference of MCC in hundredths."""
    size = abs(100 * difference)
    return f"{size:.1f} {'point' if f'{size:.1f}' == '1.0' else 'points'}" if size >= 0.05 else "less than 0.1 points"


def _tiles(block: Block, tested: list[Rival]) -> Markup:
    leader = block.entries[0]
    stat = leader.row.stats[block.main.name]
    low, high = bounds(stat)
    spread = f"{low:.4f} to {high:.4f}" if high > low else several(stat.n, "seed")
    tiles = [(f"highest {header(block.main)}", f"{stat.mean:.4f}", spread)]
    if len(block.entries) > 1:
        second = block.entries[1]
        lead = 100 * (stat.mean - mean_of(second, block.main))
        tiles.append(("lead in points", f"{lead:+.1f}".replace("-", "−"), f"over {second.name}"))
    if tested:
        better = sum(rival.verdict == "better" for rival in tested)
        tiles.append(("rivals surely behind", f"{better} of {len(tested)}", "p ≤ 0.05 after Holm"))
        seen = max(rival.detectable for rival in tested)
        tiles.append(("could have missed", points(seen), "80 % chance to find more"))
    shown = [
        el("div", el("dt", name), el("dd", el("b", value), el("span", more)), class_="tile")
        for name, value, more in tiles
    ]
    return el("dl", *shown, class_="tiles")


def _unseen(tested: list[Rival]) -> str:
    least, most = (f(rival.detectable for rival in tested) for f in (min, max))
    sizes = points(most) if points(least) == points(most) else f"{points(least)} to {points(most)} (by rival)"
    seeds, examples = min(rival.seeds for rival in tested), tested[0].examples
    return (
        f"What this comparison could not have seen: with {several(seeds, 'paired seed')} and {examples:,} examples a "
        f"true difference has to be as large as {sizes} to be found four times in five. Smaller ones may be there. "
        "The leader was named after looking at these same scores, which flatters it a little."
    )


def _forest(block: Block, tested: list[Rival]) -> Markup:
    """Each rival's difference to the leader with its 95 % interval."""
    leader = block.entries[0].name
    values = [100 * bound for rival in tested for bound in (rival.test.low, rival.test.high, 0.0)]
    x = axes.linear(values, "points")
    left, width, step, top = 150.0, 560.0, 30.0, 12.0
    bottom = top + step * len(tested)

    def px(value: float) -> float:
        return left + x.at(value) * (width - left - 14)

    grid = "".join(f"M{px(value):.1f} {top}V{bottom}" for value, _ in x.ticks)
    drawn = [el("path", d=grid, class_="grid"), el("path", d=f"M{px(0):.1f} {top}V{bottom}", class_="zero")]
    for value, words in x.ticks:
        drawn.append(el("text", words, x=px(value), y=bottom + 18, text_anchor="middle", class_="tick"))
    drawn.append(
        el("text", f"points that {leader} is ahead →", x=width - 14, y=bottom + 38, text_anchor="end", class_="axis")
    )
    rows: list[list[Content]] = []
    for i, rival in enumerate(tested):
        y, class_ = top + step * (i + 0.5), series_class(rival.entry.series)
        low, middle, high = (100 * v for v in (rival.test.low, rival.test.difference, rival.test.high))
        bar = f"M{px(low):.1f} {y}H{px(high):.1f}M{px(low):.1f} {y - 4}v8M{px(high):.1f} {y - 4}v8"
        tip = el("title", f"{rival.entry.name}: {middle:+.2f}, 95 % interval {low:+.2f} to {high:+.2f} points")
        name = rival.entry.name if len(rival.entry.name) <= 22 else rival.entry.name[:21] + "…"
        drawn += [
            el("text", name, x=left - 10, y=y + 4, text_anchor="end", class_="label"),
            el("path", d=bar, class_=f"line {class_}", data_row=rival.entry.number),
            el(
                "use",
                tip,
                href=f"#m{rival.entry.series or 0}",
                x=round(px(middle), 1),
                y=y,
                class_=class_,
                data_row=rival.entry.number,
            ),
        ]
        verdict = el("span", rival.verdict, class_=f"verdict {rival.verdict}")
        p = f"{rival.p:.3f}" if rival.p >= 0.001 else "< 0.001"
        numbers = [f"{rival.test.difference:+.4f}", f"{rival.test.low:+.4f} to {rival.test.high:+.4f}", p]
        shown = [text.replace("-", "−") for text in numbers]
        rows.append([rival.entry.name, *shown, verdict, f"{rival.detectable:.4f}", rival.seeds])
    title = f"{leader} against its rivals"
    said = (
        f"Difference of {header(block.main)} with its 95 % interval; one that crosses 0 leaves open who is ahead. "
        "Seeds and examples are both counted as chance."
    )
    names = ["against", f"difference of {leader}", "95 % interval", "p (Holm)", leader, "found at 80 %", "seeds"]
    chart = picture(join(drawn), width, bottom + 44, f"{title}. {said}")
    return join([figure(chart, said, title=title, class_="wide"), table(title, names, rows)])
