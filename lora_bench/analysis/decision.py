"""From verdicts to advice: which setting to use on each data set and why, and what to run next.

Everything is chosen on the selection split; the reported split only decides which differences are established:

1. If methods are better than the baseline, use the one of them that is best on selection.
2. Else, if methods are equivalent to the baseline and cost less, use the cheapest of them.
3. Else, if the difference between some methods and the baseline is inconclusive, use the one of them and the baseline
   that is best on selection, and say that it may be chance.
4. Else use the baseline.

Settings that learned nothing are never advised.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from lora_bench.analysis.baseline import seeds_range
from lora_bench.analysis.settings import mean_selection_score
from lora_bench.analysis.significance import BASELINE
from lora_bench.config.metric_names import display_name
from lora_bench.config.recorded_task import main_metric
from lora_bench.console.format import format_p

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lora_bench.analysis.significance import Finding
    from lora_bench.analysis.table import Row, Table

BETTER, EQUIVALENT, BEST_KNOWN, INCONCLUSIVE, UNTESTED, ONLY, UNLEARNED, UNCHOSEN = (
    *("better", "equivalent", "baseline", "inconclusive", "not tested", "only", "none", "not chosen"),
)
"""Reasons of a decision."""
SAVING = 0.95
"""Share of the baseline's cost below which a setting is cheaper."""


@dataclass(frozen=True)
class Decision:
    """The setting to use on one data set."""

    data: str | None
    """The identity of the data (`Row.data`)."""
    reason: str
    """One of the reasons above."""
    headline: str
    """The decision in one clause, without a period."""
    sentences: list[str]
    """The setting to use and the reason; then, if tests were made or are missing, what is detectable or what to run."""
    recommended: Row | None = None
    """None if no setting learned anything, or none that did is chosen."""
    baseline: Row | None = None
    """The row that the others were tested against, if any was."""


def add_decisions(table: Table, margin: float) -> Table:
    """Return the table with a decision for each data set, and its recommended rows marked.

    Args:
        table: rows of all settings with their findings and costs.
        margin: the largest difference that counts as equivalent.
    """
    decisions, rows = [], list(table.rows)
    blocks: dict[str | None, list[int]] = {}
    for i, row in enumerate(rows):
        blocks.setdefault(row.data, []).append(i)
    for data, row_numbers in blocks.items():
        chosen = [i for i in row_numbers if rows[i].chosen or rows[i].is_baseline]
        number, reason = _recommend(table, {i: rows[i] for i in chosen})
        if number is None and any(rows[i].learned for i in row_numbers):
            reason = UNCHOSEN
        if number is not None:
            rows[number] = replace(rows[number], recommended=True)
        block = [rows[i] for i in chosen]
        recommended = None if number is None else rows[number]
        baseline = next((row for row in block if row.is_baseline), None)
        without_choice = {rows[i].method for i in row_numbers} - {rows[i].method for i in chosen}
        writer = _Writer(table, block, len(row_numbers), len(without_choice), recommended, baseline, reason, margin)
        prefix = f"{block_label(table, rows[row_numbers[0]])}: " if len(blocks) > 1 else ""
        headline, sentences = writer.headline(), writer.sentences()
        decisions.append(
            Decision(data, reason, prefix + headline, [prefix + text for text in sentences], recommended, baseline)
        )
    return replace(table, rows=rows, decisions=decisions)


def block_label(table: Table, row: Row) -> str:
    """Return the name of a row's data: its key columns of group `data`, else the chosen data set.

    The main metric is added if the table's rows differ in it and not in the data alone.
    """

    def label(other: Row) -> str:
        return table.label(other, "data") or f"data={table.records[other.folders[0]]['choices'].get('data')}"

    def metric(other: Row) -> str:
        return main_metric(table.records[other.folders[0]])

    rows = table.settings or table.rows
    is_ambiguous = any(label(other) == label(row) and metric(other) != metric(row) for other in rows)
    return f"{label(row)}, {display_name(metric(row))}" if is_ambiguous else label(row)


# -- which row --


def _recommend(table: Table, rows: dict[int, Row]) -> tuple[int | None, str]:
    """Return the number of the row to use on one data set, and the reason.

    Args:
        table: with the records of the runs.
        rows: chosen settings and the baseline, by number.
    """
    learned = {i: row for i, row in rows.items() if row.learned}
    scores = {i: mean_selection_score([table.records[folder] for folder in rows[i].folders]) for i in learned}

    def best(numbers: Sequence[int]) -> int:
        """Return the best of some rows on selection; without such scores the first one, the best of the table."""
        return max(sorted(numbers), key=lambda i: scores[i])

    if not learned:
        return None, UNLEARNED
    if len(rows) == 1:
        return best(list(learned)), ONLY
    by_verdict: dict[str, list[int]] = {}
    for i, row in learned.items():
        by_verdict.setdefault(row.finding.verdict if row.finding else "", []).append(i)
    tested = any(row.finding is not None and row.finding.p_holm is not None for row in rows.values())
    baseline = next(iter(by_verdict.get(BASELINE, [])), None)
    if not tested:
        return best(list(learned)), UNTESTED
    if better := by_verdict.get("better"):
        return best(better), BETTER
    if baseline is None:
        return best(list(learned)), INCONCLUSIVE
    cheaper = [i for i in by_verdict.get("equivalent", []) if _relative_cost(rows[i], rows[baseline]) < SAVING]
    if cheaper:
        return min(cheaper, key=lambda i: _relative_cost(rows[i], rows[baseline])), EQUIVALENT
    if open_rivals := by_verdict.get("inconclusive"):
        return best([baseline, *open_rivals]), INCONCLUSIVE
    return baseline, BEST_KNOWN


COSTS = {"cost.train_flops": "FLOPs", "params.adapter": "adapter parameters"}
"""Costs that decide between equivalent settings, the first that is known, with their names."""


def _relative_cost(row: Row, baseline: Row) -> float:
    """Return a row's cost as a share of the baseline's: FLOPs of training, else adapter parameters; 1 if unknown."""
    return next((share for _, share in _cost_shares(row, baseline)), 1.0)


def _cost_shares(row: Row, other: Row) -> list[tuple[str, float]]:
    """Return the names of the known costs, and a row's cost as a share of another one's."""
    shares = []
    for column, name in COSTS.items():
        ours, theirs = row.stats.get(column), other.stats.get(column)
        if ours and theirs and ours.mean > 0 and theirs.mean > 0:
            shares.append((name, ours.mean / theirs.mean))
    return shares


# -- in words --


@dataclass(frozen=True)
class _Writer:
    """Writes the sentences of a decision."""

    table: Table
    rows: Sequence[Row]
    """Chosen settings and the baseline."""
    n_settings: int
    n_without_choice: int
    """Number of methods of which no setting is chosen."""
    recommended: Row | None
    baseline: Row | None
    reason: str
    margin: float

    def headline(self) -> str:
        """Return the decision in one clause."""
        if self.reason == UNLEARNED:
            return "No setting learned the task"
        if self.recommended is None:
            return "No chosen setting learned the task" if self.rows else "No setting is chosen"
        name, baseline = self._name(self.recommended), self._name(self.baseline)
        if self.reason == BETTER:
            return f"{name} is better than {baseline}"
        if self.reason == EQUIVALENT:
            return f"{name} is equivalent to {baseline} and costs less"
        if self.reason == BEST_KNOWN:
            if self._n_without_verdict:
                return f"No tested rival is better than {name}"
            worse = all(row.finding is not None and row.finding.verdict == "worse" for row in self._rivals)
            return f"{name} is better than all rivals" if worse else f"No rival is better than {name}"
        has_score = self._selection_score(self.recommended) > -math.inf
        lead = f"{name} is ahead on the selection split" if has_score else f"{name} has the highest {self._metric}"
        if self.reason == INCONCLUSIVE:
            among = self._among(self.recommended)
            return f"{lead}{' among ' * bool(among)}{among}, but no method is shown to be the best"
        if self.reason == UNTESTED:
            return f"{lead}; the difference is not tested"
        if self.n_without_choice:
            return f"{name} is the only chosen setting"
        return f"{name} is the best of {self.n_settings} settings" if self.n_settings > 1 else f"One setting: {name}"

    def sentences(self) -> list[str]:
        """Return what to use and why, and what to run next."""
        if self.reason == UNLEARNED:
            return [
                "No setting learned the task, so none can be advised.",
                "Try a higher learning rate (optimizer.lr), more steps (trainer.epochs), or more data.",
            ]
        if self.recommended is None:
            return [
                "No setting that was chosen on the selection split learned the task, so none can be advised."
                if self.rows
                else "No setting is chosen, for lack of scores of the selection split, so none can be advised.",
                "Compare by a key in which the settings differ (--by KEY), or show all of them (--all).",
            ]
        return [self._use(self.recommended), *self._next_step()]

    @property
    def _rivals(self) -> list[Row]:
        return [row for row in self.rows if row is not self.baseline]

    @property
    def _n_without_verdict(self) -> int:
        """The number of rivals that were not tested, or whose test gave no verdict, methods without choice included."""
        findings = [row.finding for row in self._rivals]
        return self.n_without_choice + sum(finding is None or finding.p_holm is None for finding in findings)

    def _name(self, row: Row | None) -> str:
        return "" if row is None else self.table.label(row)

    def _use(self, row: Row) -> str:
        """Return the sentence about what to use and why."""
        finding, baseline = row.finding, self._name(self.baseline)
        prefix = f"Use {self._name(row)}: "
        if self.reason == BETTER and finding is not None:
            return (
                f"{prefix}its {self._metric} of {self._score(row)} is {self._points(finding)} above {baseline} "
                f"({self._interval(finding)}){self._cost_note(row)}."
            )
        if self.reason == EQUIVALENT and finding is not None:
            return (
                f"{prefix}its {self._metric} of {self._score(row)} is within {100 * self.margin:.3g} points of "
                f"{baseline} ({self._interval(finding)}){self._cost_note(row)}."
            )
        if self.reason == BEST_KNOWN:
            tested = "tested " * bool(self._n_without_verdict)
            rest = f"; {self._n_without_verdict} without a verdict" if self._n_without_verdict else ""
            return f"{prefix}no {tested}rival is better by more than chance, or equivalent at lower cost{rest}."
        selection = self._selection_score(row)
        metric = display_name(main_metric(self.table.records[row.folders[0]]))
        how = f" ({metric} {selection:.3f})" if selection > -math.inf else ""
        among = self._among(row)
        best = f"it is the best on the selection split{how}" if how else f"it has the highest {self._metric} here"
        best = f"of {among}, {best}" if among and how else best
        if self.reason == INCONCLUSIVE:
            undecided = [other for other in self._rivals if other.finding and other.finding.verdict == "inconclusive"]
            subject = self._name(self.baseline) if row is not self.baseline else self._name(undecided[0])
            more = " and others" if row is self.baseline and len(undecided) > 1 else ""
            return f"{prefix}{best}, but its difference from {subject}{more} may be chance{self._cost_note(row)}."
        if self.reason == UNTESTED:
            return f"{prefix}{best}, but no test shows whether that is chance."
        if self.n_without_choice:
            others = f"{self.n_without_choice} other method{'s' * (self.n_without_choice > 1)}"
            return (
                f"{prefix}it is the only chosen setting, with a {self._metric} of {self._score(row)}; "
                f"{others} lack scores of the selection split."
            )
        if self.n_settings > 1:
            return f"{prefix}{best}, of {self.n_settings} settings; its {self._metric} is {self._score(row)}."
        return f"{prefix}it is the only setting here; its {self._metric} is {self._score(row)}."

    def _next_step(self) -> list[str]:
        """Return the sentence about what the comparison detects and what to run; empty if there is nothing to say."""
        findings = [row.finding for row in self._rivals if row.finding is not None and row.finding.p_holm is not None]
        if not findings:
            seeds = max(row.n for row in self.rows)
            if self.reason == UNTESTED and seeds == 1:
                return ["Run at least three seeds of each method ('seed=range(3)'), so that differences can be tested."]
            if self.reason == ONLY and seeds == 1:
                return ["Run at least three seeds ('seed=range(3)') to learn how much the result varies."]
            return []
        from lora_bench.analysis.statistics import (  # late: numpy, which tests have loaded
            MAX_SEEDS,
            deciding_difference,
        )

        undecided = self._undecided
        detectable = undecided.detectable if undecided else max(finding.detectable or 0.0 for finding in findings)
        if not detectable:
            return []
        n_seeds = seeds_range(findings)
        seeds_text = f"{n_seeds} seed{'s' * (n_seeds != '1')}"
        sentence = (
            f"With {seeds_text} and {findings[0].examples:,} examples this comparison detects differences of "
            f"{100 * detectable:.1f} points or more"
        )
        if undecided is None:
            return [f"{sentence}."]
        difference = abs(undecided.difference or 0.0)
        points = f"{100 * deciding_difference(difference, self.margin):.1f} points"
        points = f"this difference of {points}" if difference >= self.margin else points
        if undecided.seeds_needed:
            command = f"'seed=range({undecided.seeds_needed})'"
            return [f"{sentence}; to detect {points}, run {undecided.seeds_needed} seeds ({command})."]
        if undecided.examples_needed:
            more_seeds = f"run {MAX_SEEDS} seeds and " if 1 < (undecided.paired_seeds or 0) < MAX_SEEDS else ""
            examples = f"{more_seeds}score about {undecided.examples_needed:,} examples"
            return [f"{sentence}; to detect {points}, {examples}."]
        seeds = max(MAX_SEEDS, undecided.paired_seeds or 0)
        return [f"{sentence}; {points} would need more than {seeds} seeds."]

    def _among(self, row: Row) -> str:
        """Return the methods that a row is ahead of on the selection split, as a phrase; empty if it is all of them."""
        best = max(self._selection_score(other) for other in self.rows if other.learned)
        return "" if self._selection_score(row) >= best else "the methods that are not ruled out"

    def _selection_score(self, row: Row) -> float:
        return mean_selection_score([self.table.records[folder] for folder in row.folders])

    @property
    def _undecided(self) -> Finding | None:
        """The inconclusive test that the advice is about: the recommended row's, else that of the first such rival."""
        rows = [self.recommended, *self._rivals]
        tests = [row.finding for row in rows if row is not None and row.finding is not None]
        return next((finding for finding in tests if finding.verdict == "inconclusive"), None)

    @property
    def _metric(self) -> str:
        return display_name(self.rows[0].measure)

    def _score(self, row: Row) -> str:
        stat = row.stats.get(f"{row.split}/{row.measure}", row.stats.get(row.measure))
        return "unknown" if stat is None else f"{stat.mean:.3f}"

    def _points(self, finding: Finding) -> str:
        return f"{100 * (finding.difference or 0.0):.1f} points"

    def _interval(self, finding: Finding) -> str:
        low, high = (100 * (bound or 0.0) for bound in (finding.difference_low, finding.difference_high))
        p = finding.p_holm if self.reason == BETTER else finding.p_margin
        return f"95 % interval {low:.1f} to {high:.1f}, {format_p(p)}"

    def _cost_note(self, row: Row) -> str:
        """Return the row's cost as a share of the baseline's, as a clause; empty if it is about the same or unknown."""
        if self.baseline is None or row is self.baseline:
            return ""
        shares = [(name, share) for name, share in _cost_shares(row, self.baseline)[:1] if abs(share - 1) >= 0.05]
        return "".join(f", at {share:.0%} of its {name}" for name, share in shares)
