"""The comparison in words: which experiment leads, at what cost, and which differences are more than chance."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lora_bench.report import axes
from lora_bench.report.charts import Lane, Mark, draw_lanes
from lora_bench.report.html import Content, Markup, element, figure, join, pluralise, table
from lora_bench.report.tradeoffs import bounds, column_name, cost_formatter, mean_of

if TYPE_CHECKING:
    from lora_bench.analysis.significance import Finding
    from lora_bench.report.series import Block, Entry

MAX_DRAWN = 16
"""Rivals that are drawn."""


def headline(block: Block) -> str:
    """Return the verdict in one sentence."""
    leader = block.entries[0].name
    if len(block.entries) == 1:
        return f"One experiment: {leader}"
    if block.baseline is None or not block.tested:
        return f"{leader} leads; whether by chance is not known"
    base = block.baseline.name
    better = [entry for entry in block.tested if _finding(entry).verdict == "better"]
    if better:
        rest_note = f", and so are {len(better) - 1} more" if len(better) > 1 else ""
        return f"{better[0].name} is better than {base}{rest_note}"
    verdicts = {_finding(entry).verdict for entry in block.tested}
    if verdicts == {"worse"}:
        return f"{base} is better than all its rivals"
    if verdicts == {"equivalent"}:
        return f"All rivals are equivalent to {base}"
    return f"Nothing is surely better than {base}"


def summary(block: Block, margin: float) -> Markup:
    """Return a paragraph, tiles, and the differences from the baseline as a chart and a table."""
    contents: list[Content] = [_paragraph(block, margin), _tiles(block)]
    if block.baseline is not None:
        contents += [_forest(block, block.baseline), _detectable_note(block)]
    return join(contents)


def _finding(entry: Entry) -> Finding:
    """Return the finding of an entry, which has one."""
    assert entry.row.finding is not None
    return entry.row.finding


def _paragraph(block: Block, margin: float) -> Markup:
    """Return a paragraph about the leader: its score, its lead over the baseline and its cost."""
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
        sentences.append(f"{_confidence(_finding(leader), margin)}. ")
    if len(block.entries) > 1:
        sentences.append(_cost_sentence(block))
    if len(block.entries) > 1 and block.baseline is None:
        sentences.append(" No tests were made; name a row to compare with by --baseline.")
    return element("p", *sentences, class_="lead")


def _confidence(finding: Finding, margin: float) -> str:
    """Return the end of the sentence about the leader's difference from the baseline."""
    if finding.p_holm is None:
        return f" ({finding.verdict}: {finding.why})" if finding.why else f" ({finding.verdict})"
    p = f"p {_p_in_text(finding.p_holm)}, seeds and examples both counted as chance, Holm over the rivals"
    if finding.verdict in ("better", "worse"):
        return f", a difference larger than chance explains ({p})"
    if finding.verdict == "equivalent":
        return f", a difference that is significantly within {format_points(margin)}: equivalent"
    return f", a difference that chance alone may explain ({p}): inconclusive"


def _p_in_text(p: float) -> str:
    """Return a p value as it stands in a sentence."""
    return f"= {p:.3f}" if p >= 0.001 else "< 0.001"


def _cost_sentence(block: Block) -> str:
    """Return a sentence that compares the leader's training time and adapter parameters with the cheapest rival's."""
    leader, clauses = block.entries[0], []
    for column in block.costs:
        leader_stat = leader.stat(column)
        rival_costs = [(stat.mean, entry) for entry in block.entries[1:] if (stat := entry.stat(column))]
        if leader_stat is None or not rival_costs or column.name not in ("cost.train_seconds", "params.adapter"):
            continue
        lowest, cheapest = min(rival_costs, key=lambda pair: pair[0])
        format_cost = cost_formatter(column)
        noun = "of training" if column.format == "seconds" else "adapter parameters"
        if lowest < leader_stat.mean:
            behind = format_points(mean_of(leader, block.main) - mean_of(cheapest, block.main))
            clauses.append(
                f"{format_cost(leader_stat.mean)} {noun}, against {format_cost(lowest)} for {cheapest.name}, "
                f"which is {behind} behind"
            )
        else:
            clauses.append(f"{format_cost(leader_stat.mean)} {noun}, the least of all")
    return f"It costs {'; and '.join(clauses)}." if clauses else ""


def format_points(difference: float) -> str:
    """Return the size of a difference of MCC in hundredths."""
    size = abs(100 * difference)
    return f"{size:.1f} {'point' if f'{size:.1f}' == '1.0' else 'points'}" if size >= 0.05 else "less than 0.1 points"


def _tiles(block: Block) -> Markup:
    """Return the key results as tiles."""
    leader = block.entries[0]
    stat = leader.row.stats[block.main.name]
    low, high = bounds(stat)
    spread = f"{low:.4f} to {high:.4f}" if high > low else pluralise(stat.n, "seed")
    tiles = [(f"highest {column_name(block.main)}", f"{stat.mean:.4f}", spread)]
    rival = block.baseline if block.baseline not in (None, leader) else next(iter(block.entries[1:]), None)
    if rival is not None:
        lead = 100 * (stat.mean - mean_of(rival, block.main))
        tiles.append(("lead in points", f"{lead:+.1f}".replace("-", "−"), f"over {rival.name}"))
    if block.tested:
        better = sum(_finding(entry).verdict == "better" for entry in block.tested)
        tiles.append(("better than the baseline", f"{better} of {len(block.tested)}", "p ≤ 0.05 after Holm"))
    detectables = [value for entry in block.tested if (value := _finding(entry).detectable) is not None]
    if detectables:
        tiles.append(("could have missed", format_points(max(detectables)), "80 % chance to find more"))
    elements = [
        element("div", element("dt", name), element("dd", element("b", value), element("span", detail)), class_="tile")
        for name, value, detail in tiles
    ]
    return element("dl", *elements, class_="tiles")


def _detectable_note(block: Block) -> Content:
    """Return a note about the differences that this comparison cannot detect; empty if nothing was tested."""
    findings = [_finding(entry) for entry in block.tested]
    detectables = [finding.detectable for finding in findings if finding.detectable is not None]
    if not detectables:
        return ""
    least, most = format_points(min(detectables)), format_points(max(detectables))
    sizes = most if least == most else f"{least} to {most} (by rival)"
    seeds, examples = min(finding.paired_seeds or 1 for finding in findings), findings[0].examples
    return element(
        "p",
        f"With {pluralise(seeds, 'paired seed')} and {examples:,} examples this comparison detects a true difference "
        f"of {sizes} with a probability of 80 %. It may miss smaller ones.",
        class_="note",
    )


def _forest(block: Block, baseline: Entry) -> Markup:
    """Return each rival's difference from the baseline with its 95 % interval, and the tables of tests."""
    rivals = [entry for entry in block.entries if entry is not baseline and entry.row.finding is not None]
    drawn_lanes = [Lane(entry.name, [mark]) for entry in rivals if (mark := _mark(entry, _finding(entry))) is not None][
        :MAX_DRAWN
    ]
    title = f"Differences from the baseline {baseline.name}"
    numbers = _tables_of_tests(title, rivals)
    if not drawn_lanes:
        return numbers
    values = [
        value for lane in drawn_lanes for mark in lane.marks for value in (mark.value, *(mark.interval or ()), 0.0)
    ]
    x = axes.linear(values, "points above the baseline →")
    caption = (
        f"Difference of {column_name(block.main)} with its 95 % interval, not adjusted for the number of rivals. "
        "If it contains 0, either may be better. "
    )
    several_seeds = any((_finding(entry).paired_seeds or 0) > 1 for entry in rivals)
    caption += (
        f"{'Seeds and examples are both' if several_seeds else 'Of one seed, examples alone are'} counted as chance."
    )
    if len(drawn_lanes) < len(rivals):
        caption += f" {len(drawn_lanes)} of {len(rivals)} are drawn."
    return join(
        [figure(draw_lanes(x, drawn_lanes, f"{title}. {caption}"), caption, title=title, class_="wide"), numbers]
    )


def _mark(entry: Entry, finding: Finding) -> Mark | None:
    """Return the mark of a finding; None if it has no difference."""
    if finding.difference is None or finding.difference_low is None or finding.difference_high is None:
        return None
    low, middle, high = (100 * v for v in (finding.difference_low, finding.difference, finding.difference_high))
    tip = f"{entry.name}: {middle:+.2f}, 95 % interval {low:+.2f} to {high:+.2f} points, {finding.verdict}"
    return Mark(middle, entry.series, tip, entry.number, (low, high))


def _tables_of_tests(title: str, rivals: list[Entry]) -> Markup:
    """Return the table of tests, and the table of the customary tests folded away."""
    rows: list[list[Content]] = []
    other_tests: list[list[Content]] = []
    has_notes = any(_finding(entry).why for entry in rivals)
    for entry in rivals[: 4 * MAX_DRAWN]:
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
        rows.append([entry.name, verdict, *numbers, *([finding.why] if has_notes else [])])
        if finding.difference is not None:
            by_seed = [" ".join(map(_p, values or [])) for values in (finding.p_bootstrap, finding.p_mcnemar)]
            other_tests.append([entry.name, _p(finding.p), _p(finding.p_seeds), *by_seed])
    names = ["experiment", "verdict", "difference", "95 % interval", "p (Holm)", "effect size", "detected at 80 %"]
    main_table = table(title, [*names, "seeds", *(["note"] if has_notes else [])], rows)
    if not other_tests:
        return main_table
    titles = ["experiment", "p, not adjusted", "t test over seeds", "bootstrap, by seed", "McNemar mid-p, by seed"]
    other_table = table(
        "Other p values: the t test takes the examples for granted, the last two the models", titles, other_tests
    )
    return join([main_table, element("details", element("summary", "What the usual tests say"), other_table)])


def _signed(value: float | None, digits: int = 4) -> str:
    """Return a number with its sign; empty if it is None."""
    return "" if value is None else f"{value:+.{digits}f}".replace("-", "−")


def _p(p: float | None) -> str:
    """Return a p value as it stands in a table; empty if it is None."""
    return "" if p is None else f"{p:.3f}" if p >= 0.001 else "<0.001"
