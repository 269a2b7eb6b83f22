"""The comparison in words: who leads, at what cost, and which differences from the baseline are more than chance."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lora_bench.report import axes
from lora_bench.report.charts import Lane, Mark, draw_lanes
from lora_bench.report.html import Content, Markup, element, figure, join, pluralise, table
from lora_bench.report.tradeoffs import bounds, column_name, cost_formatter, mean_of

if TYPE_CHECKING:
    from lora_bench.analysis.significance import Finding
    from lora_bench.report.series import Block, Entry

DRAWN = 16
"""Rivals that are drawn, and named one by one in the table."""


def headline(block: Block) -> str:
    """The verdict in one sentence."""
    leader = block.entries[0].name
    if len(block.entries) == 1:
        return f"One experiment: {leader}"
    if block.baseline is None or not block.tested:
        return f"{leader} leads; whether by chance is not known"
    base = block.baseline.name
    better = [entry for entry in block.tested if _finding(entry).verdict == "better"]
    if better:
        others = f", and so are {len(better) - 1} more" if len(better) > 1 else ""
        return f"{better[0].name} is better than {base}{others}"
    verdicts = {_finding(entry).verdict for entry in block.tested}
    if verdicts == {"worse"}:
        return f"{base} is better than all its rivals"
    if verdicts == {"indistinguishable"}:
        return f"Nothing is distinguishable from {base}"
    return f"Nothing is surely better than {base}"


def summary(block: Block, margin: float) -> Markup:
    """Paragraphs, tiles, and the differences from the baseline as a chart and a table."""
    parts: list[Content] = [_paragraph(block, margin), _tiles(block)]
    if block.baseline is not None:
        parts += [_forest(block, block.baseline), _unseen(block)]
    return join(parts)


def _finding(entry: Entry) -> Finding:
    assert entry.row.finding is not None
    return entry.row.finding


def _paragraph(block: Block, margin: float) -> Markup:
    leader = block.entries[0]
    stat = leader.row.stats[block.main.name]
    low, high = bounds(stat)
    sentences: list[Content] = [
        element("strong", leader.name),
        f" has the highest {column_name(block.main)}: {stat.mean:.4f}",
    ]
    if high > low:
        sentences.append(f" (95 % interval over {stat.n} seeds {low:.4f} to {high:.4f})")
    elif stat.n == 1:
        sentences.append(", from one seed, so how far chance moved it is not known")
    sentences.append(". ")
    if block.baseline is leader:
        sentences.append("It is the baseline that the others are tested against. ")
    elif block.baseline is not None:
        lead = stat.mean - mean_of(block.baseline, block.main)
        sentences += [f"That is {format_points(lead)} above the baseline ", element("strong", block.baseline.name)]
        sentences.append(f"{_sure(_finding(leader), margin)}. ")
    if len(block.entries) > 1:
        sentences.append(_price(block))
    if len(block.entries) > 1 and block.baseline is None:
        sentences.append(" No tests were made; name a row to compare with by --baseline.")
    return element("p", *sentences, class_="lead")


def _sure(finding: Finding, margin: float) -> str:
    if finding.p_holm is None:
        return f" ({finding.verdict}: {finding.why})" if finding.why else f" ({finding.verdict})"
    p = f"p {_small(finding.p_holm)}, seeds and examples both counted as chance, Holm over the rivals"
    if finding.verdict in ("better", "worse"):
        return f", a difference larger than chance explains ({p})"
    if finding.verdict == "indistinguishable":
        return f", a difference that surely lies within {format_points(margin)}: indistinguishable"
    return f", a difference that chance alone may explain ({p})"


def _small(p: float) -> str:
    return f"= {p:.3f}" if p >= 0.001 else "< 0.001"


def _price(block: Block) -> str:
    """What the leader costs beside the cheapest row."""
    leader, told = block.entries[0], []
    for column in block.costs:
        mine = leader.stat(column)
        others = [(stat.mean, entry) for entry in block.entries[1:] if (stat := entry.stat(column))]
        if mine is None or not others or column.name not in ("cost.train_seconds", "params.adapter"):
            continue
        cost, cheapest = min(others, key=lambda pair: pair[0])
        show = cost_formatter(column)
        what = "of training" if column.format == "seconds" else "adapter parameters"
        if cost < mine.mean:
            behind = format_points(mean_of(leader, block.main) - mean_of(cheapest, block.main))
            told.append(f"{show(mine.mean)} {what}, against {show(cost)} for {cheapest.name}, which is {behind} behind")
        else:
            told.append(f"{show(mine.mean)} {what}, the least of all")
    return f"It costs {'; and '.join(told)}." if told else ""


def format_points(difference: float) -> str:
    """A difference of MCC in hundredths."""
    size = abs(100 * difference)
    return f"{size:.1f} {'point' if f'{size:.1f}' == '1.0' else 'points'}" if size >= 0.05 else "less than 0.1 points"


def _tiles(block: Block) -> Markup:
    leader = block.entries[0]
    stat = leader.row.stats[block.main.name]
    low, high = bounds(stat)
    spread = f"{low:.4f} to {high:.4f}" if high > low else pluralise(stat.n, "seed")
    tiles = [(f"highest {column_name(block.main)}", f"{stat.mean:.4f}", spread)]
    other = block.baseline if block.baseline not in (None, leader) else next(iter(block.entries[1:]), None)
    if other is not None:
        lead = 100 * (stat.mean - mean_of(other, block.main))
        tiles.append(("lead in points", f"{lead:+.1f}".replace("-", "−"), f"over {other.name}"))
    if block.tested:
        better = sum(_finding(entry).verdict == "better" for entry in block.tested)
        tiles.append(("better than the baseline", f"{better} of {len(block.tested)}", "p ≤ 0.05 after Holm"))
    seen = [value for entry in block.tested if (value := _finding(entry).detectable) is not None]
    if seen:
        tiles.append(("could have missed", format_points(max(seen)), "80 % chance to find more"))
    shown = [
        element("div", element("dt", name), element("dd", element("b", value), element("span", more)), class_="tile")
        for name, value, more in tiles
    ]
    return element("dl", *shown, class_="tiles")


def _unseen(block: Block) -> Content:
    findings = [_finding(entry) for entry in block.tested]
    seen = [finding.detectable for finding in findings if finding.detectable is not None]
    if not seen:
        return ""
    least, most = format_points(min(seen)), format_points(max(seen))
    sizes = most if least == most else f"{least} to {most} (by rival)"
    seeds, examples = min(finding.paired_seeds or 1 for finding in findings), findings[0].examples
    return element(
        "p",
        f"What this comparison could not have seen: with {pluralise(seeds, 'paired seed')} and {examples:,} examples a "
        f"true difference has to be as large as {sizes} to be found four times in five. Smaller ones may be there.",
        class_="note",
    )


def _forest(block: Block, baseline: Entry) -> Markup:
    """Each rival's difference from the baseline with its 95 % interval, and what else the tests say."""
    rivals = [entry for entry in block.entries if entry is not baseline and entry.row.finding is not None]
    drawn = [Lane(entry.name, [mark]) for entry in rivals if (mark := _mark(entry, _finding(entry))) is not None][
        :DRAWN
    ]
    title = f"Differences from the baseline {baseline.name}"
    numbers = _tests(title, rivals)
    if not drawn:
        return numbers
    values = [value for lane in drawn for mark in lane.marks for value in (mark.value, *(mark.interval or ()), 0.0)]
    x = axes.linear(values, "points above the baseline →")
    said = (
        f"Difference of {column_name(block.main)} with its 95 % interval, not adjusted for the number of rivals; one that "
        "crosses 0 leaves open who is ahead. "
    )
    several_seeds = any((_finding(entry).paired_seeds or 0) > 1 for entry in rivals)
    said += (
        f"{'Seeds and examples are both' if several_seeds else 'Of one seed, examples alone are'} counted as chance."
    )
    if len(drawn) < len(rivals):
        said += f" {len(drawn)} of {len(rivals)} are drawn."
    return join([figure(draw_lanes(x, drawn, f"{title}. {said}"), said, title=title, class_="wide"), numbers])


def _mark(entry: Entry, finding: Finding) -> Mark | None:
    if finding.difference is None or finding.difference_low is None or finding.difference_high is None:
        return None
    low, middle, high = (100 * v for v in (finding.difference_low, finding.difference, finding.difference_high))
    tip = f"{entry.name}: {middle:+.2f}, 95 % interval {low:+.2f} to {high:+.2f} points, {finding.verdict}"
    return Mark(middle, entry.series, tip, entry.number, (low, high))


def _tests(title: str, rivals: list[Entry]) -> Markup:
    rows: list[list[Content]] = []
    usual: list[list[Content]] = []
    noted = any(_finding(entry).why for entry in rivals)
    for entry in rivals[: 4 * DRAWN]:
        finding = _finding(entry)
        verdict = element("span", finding.verdict, class_=f"verdict {finding.verdict}")
        between = f"{_signed(finding.difference_low)} to {_signed(finding.difference_high)}"
        numbers: list[Content] = [
            _signed(finding.difference),
            between if finding.difference_low is not None else "",
            _p(finding.p_holm),
            _signed(finding.effect_size, 2),
            "" if finding.detectable is None else f"{finding.detectable:.4f}",
            finding.paired_seeds,
        ]
        rows.append([entry.name, verdict, *numbers, *([finding.why] if noted else [])])
        if finding.difference is not None:
            by_seed = [" ".join(map(_p, values or [])) for values in (finding.p_bootstrap, finding.p_mcnemar)]
            usual.append([entry.name, _p(finding.p), _p(finding.p_seeds), *by_seed])
    names = ["experiment", "verdict", "difference", "95 % interval", "p (Holm)", "effect size", "found at 80 %"]
    made = table(title, [*names, "seeds", *(["note"] if noted else [])], rows)
    if not usual:
        return made
    titles = ["experiment", "p, not adjusted", "t test over seeds", "bootstrap, by seed", "McNemar mid-p, by seed"]
    folded = table("Other p values: the t test takes the examples for granted, the last two the models", titles, usual)
    return join([made, element("details", element("summary", "What the usual tests say"), folded)])


def _signed(value: float | None, digits: int = 4) -> str:
    return "" if value is None else f"{value:+.{digits}f}".replace("-", "−")


def _p(p: float | None) -> str:
    return "" if p is None else f"{p:.3f}" if p >= 0.001 else "<0.001"
