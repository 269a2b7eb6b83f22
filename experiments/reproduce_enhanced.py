#!/usr/bin/env python3
"""Reproduce every result about the enhanced method. Finished work is not repeated: start the script again to resume.

    LORA_BENCH_BACKBONES=DIR experiments/reproduce_enhanced.py DATA OUTPUT [STAGE …] [KEY=VALUE …] [--records DIR]
    experiments/reproduce_enhanced.py --toy OUTPUT [STAGE …] [--records DIR]

DATA is a folder with QQP's train.tsv and validation.tsv; PAWS-QQP's test.tsv is in ../paws_qqp beside it. With --toy
the whole protocol takes minutes: random networks, generated pairs. All stages run unless some are named:

    methods     the enhanced method and seven rivals on MiniLM: learning rates chosen from the same four values on the
                selection split (2,000 pairs, seed 0); then 8,000 pairs, 2 epochs, seeds 0-4
    backbones   enhanced, LoRA and full fine-tuning, these two also with the recipe, on roberta_mini, t5_mini and
                MiniLM: learning rates chosen in the same way on each; then 4,000 pairs, 2 epochs, seeds 0-2
    large       enhanced, LoRA and full fine-tuning on 50,000 pairs, 1 epoch, seeds 0-2, at the learning rates that
                `methods` chose
    target      full fine-tuning, then enhanced, LoRA, full fine-tuning with the recipe, and the enhanced method on the
                upper four layers in one epoch, on MiniLM and roberta_mini; 8,000 pairs, otherwise 2 epochs, seeds 0-4,
                an evaluation every 25 steps: the cost of reaching the final selection MCC of full fine-tuning, where
                the others stop. At the learning rates that `backbones` chose. A method with records is not run again
    robust      the runs of `methods` of these three on PAWS-QQP, on the strict subset of validation (n_q_in_train is
                0), and on validation perturbed
    ablation    sweep=ablation: each part turned off in turn, 8,000 pairs, 2 epochs, seeds 0-4
    ranks       the enhanced method of rank 1 to 128 at all four learning rates, 2,000 pairs, 3 epochs, seeds 0-2: the
                cost of one learning rate for all ranks

The table of each stage is in its folder below OUTPUT; `lora-bench compare` prints it again. The rivals are tested
against the enhanced method. With --records the reported runs of a finished stage are kept there too, without weights
and texts, and `large`, `target` and `ranks` find there the learning rates that an earlier start has chosen. All stages
take about twelve hours on two cores that multiply bf16 fast (estimated, not measured). KEY=VALUE is added to every new
sweep: pack.workers=12 runs so many processes at a time on one large GPU, best under NVIDIA's multi-process service
(nvidia-cuda-mps-control -d). The seconds of a run are then not its own.
"""

from __future__ import annotations

import argparse
import csv
import sys
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING, Any

from keep_records import keep
from kept_sweep import is_kept, start_or_resume
from result_tables import runs_of
from target_table import Costs, final_score

from lora_bench.cli import main as lora_bench
from lora_bench.records import run_folder

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

ENHANCED, LORA, FULL = THREE = ("experiment=enhanced", "adapter=lora", "adapter=full")
RECIPES = ("experiment=recipe adapter=lora", "experiment=recipe adapter=full")
FIVE = (*THREE, *RECIPES)
METHODS = (*FIVE, "adapter=dora", "adapter=milora", "adapter=rslora")
SINGLE_RUNS = ("pack.size=1",)
"""One run after another, so that seconds are each run's own."""


@dataclass(frozen=True)
class Scale:
    """The size of the protocol: the published one, or a small one for tests."""

    data: Path | None
    """The folder with QQP's files; None: generated pairs."""
    overrides: tuple[str, ...]
    """Overrides of every sweep: the data and the selection split."""
    evaluation_overrides: tuple[str, ...]
    """Overrides of the data of an evaluation."""
    rates: tuple[str, ...]
    """Learning rates to choose from."""
    methods: tuple[str, ...] = METHODS
    methods_of_backbones: tuple[str, ...] = FIVE
    seeds: str = "0,1,2,3,4"
    fewer_seeds: str = "0,1,2"
    ranks: str = "1,2,4,8,16,32,64,128"
    upper_layers: str = "top:4"
    main_model: str = "minilm"
    backbones: tuple[str, ...] = ("t5_mini", "roberta_mini", "minilm")
    targets: tuple[tuple[str, str], ...] = (("minilm", "backbones/minilm"), ("roberta_mini", "backbones/roberta_mini"))
    """The backbones of the stage `target`, each with the stage that chose its learning rates."""
    divisor: int = 1
    """Numbers of pairs are divided by it."""
    single_runs: tuple[str, ...] = SINGLE_RUNS

    @classmethod
    def published(cls, data: Path) -> Scale:
        pairs = ("data=pairs", f"data.path={data}")
        rates = ("1e-4", "4e-4", "1.5e-3", "6e-3")
        return cls(data, (*pairs, "data.selection_size=2000", "trainer.precision=bf16"), pairs, rates)

    @classmethod
    def toy(cls) -> Scale:
        pairs = ("data=toy", "data.train_rows=600", "data.validation_rows=40")
        short = ("trainer.precision=fp32", "trainer.device=cpu", "trainer.max_steps=3", "trainer.batch_size=8")
        return cls(
            data=None,
            overrides=(*pairs, "data.selection_size=40", *short),
            evaluation_overrides=pairs,
            rates=("1e-3", "6e-3"),
            methods=(*THREE, RECIPES[-1]),  # which other stages need
            seeds="0",
            fewer_seeds="0",
            ranks="1,4",
            upper_layers="top:1",
            main_model="tiny_bert",
            methods_of_backbones=THREE,
            backbones=("tiny_roberta",),
            targets=(("tiny_bert", "methods"),),
            divisor=100,
            single_runs=(),
        )

    def size(self, pairs: int, epochs: int) -> list[str]:
        return [f"data.train_size={pairs // self.divisor}", f"trainer.epochs={epochs}"]

    def tuning(self) -> str:
        """Return the override that sets the tuning stage of a sweep."""
        pairs, epochs = (text.split("=")[1] for text in self.size(2000, 3))
        data, trainer = f"{{train_size: {pairs}, report: false}}", f"{{epochs: {epochs}, eval_every: null}}"
        return f"++hydra.sweeper.tune={{seed: 0, data: {data}, trainer: {trainer}}}"


class Protocol:
    """The protocol of the results about the enhanced method; each stage is a method.

    Args:
        scale: sizes and data.
        output: where each stage has a folder.
        overrides: further overrides of every sweep.
        records: where the reported runs of finished stages are kept; None: nowhere.
    """

    def __init__(self, scale: Scale, output: Path, overrides: Sequence[str] = (), records: Path | None = None) -> None:
        self.scale, self.output, self.overrides, self.records = scale, output, overrides, records
        self.exit_code = 0

    def methods(self) -> None:
        self._sweep_tuned("methods", self.scale.main_model, self.scale.methods, 8000, self.scale.seeds)

    def backbones(self) -> None:
        for model in self.scale.backbones:
            methods = self.scale.methods_of_backbones
            self._sweep_tuned(f"backbones/{model}", model, methods, 4000, self.scale.fewer_seeds)

    def large(self) -> None:
        grid = [f"model={self.scale.main_model}", *self.scale.size(50000, 1), f"seed={self.scale.fewer_seeds}"]
        self._sweep_at_chosen_rates("large", "methods", {method: method for method in THREE}, *grid)

    def target(self) -> None:
        pairs, two_epochs = self.scale.size(8000, 2)
        upper = [f"adapter.layers={self.scale.upper_layers}", self.scale.size(8000, 1)[1]]
        variants = {
            "full": (FULL, two_epochs),
            "enhanced": (ENHANCED, two_epochs),
            "recipe-full": (RECIPES[-1], two_epochs),
            "enhanced-upper": (ENHANCED, *upper),
            "lora": (LORA, two_epochs),
        }
        grid = [pairs, f"trainer.eval_every={max(1, 25 // self.scale.divisor)}", f"seed={self.scale.seeds}"]
        for model, tuned in self.scale.targets:
            for name, (method, *overrides) in variants.items():
                stage = f"target/{model}/{name}"
                if self.records is not None and is_kept(self.records / stage, len(self.scale.seeds.split(","))):
                    continue
                end = self._stop_at_final_score(f"target/{model}/full") if name != "full" else []
                variant = {" ".join([method, *overrides, *end]): method}
                self._sweep_at_chosen_rates(stage, tuned, variant, f"model={model}", *grid)
            self._call("compare", str((self.records or self.output) / "target" / model))

    def robust(self) -> None:
        for name, data in self._evaluation_data().items():
            for run in (run for method in THREE for run in self._reported_runs(method)):
                if not (run / "evaluations" / f"{name}.json").exists():
                    self._call("eval", f"run={run}", f"name={name}", *data)
        self._keep("methods/report")
        self._call("compare", str(self.output / "methods"), "--baseline", str(self._reported_runs(ENHANCED)[0]))

    def ablation(self) -> None:
        rates = f"optimizer.lr={','.join(self.scale.rates)}"
        grid = [f"model={self.scale.main_model}", *self.scale.size(8000, 2), self.scale.tuning()]
        self._sweep("ablation", "sweep=ablation", *grid, rates, f"seed={self.scale.seeds}")
        self._keep("ablation/report")

    def ranks(self) -> None:
        """Sweep ranks and learning rates; write the MCC at the chosen and at the best learning rate of each rank."""
        chosen = self._chosen_rate(ENHANCED)
        rates = f"optimizer.lr={','.join(self.scale.rates)}"
        grid = [f"adapter.rank={self.scale.ranks}", rates, f"seed={self.scale.fewer_seeds}"]
        self._sweep("ranks", ENHANCED, f"model={self.scale.main_model}", *self.scale.size(2000, 3), *grid)
        runs = [run for _, run in run_folder.find_runs([self.output / "ranks"])[0] if run["status"] == "done"]
        text = format_ranks(runs, chosen)
        (self.output / "ranks" / "one_rate.md").write_text(text + "\n", encoding="utf-8")
        print(text)

    # -- what stages consist of --

    def _sweep_tuned(self, stage: str, model: str, methods: Sequence[str], pairs: int, seeds: str) -> None:
        """Choose the learning rate of each method, then report each at its own: one sweep of two stages."""
        scale = self.scale
        grid = [f"optimizer.lr={','.join(scale.rates)}", f"seed={seeds}", variants_override(methods)]
        tuning = ["hydra/sweeper=tuned", scale.tuning()]
        self._sweep(stage, f"model={model}", *scale.size(pairs, 2), *scale.single_runs, *tuning, *grid)
        self._keep(f"{stage}/report")

    def _sweep_at_chosen_rates(self, stage: str, tuned: str, methods: Mapping[str, str], *overrides: str) -> None:
        """Sweep variants, each at the learning rate that a stage chose for the method it maps to."""
        rates = {method: self._chosen_rate(method, tuned) for method in methods.values()}
        variants = [f"{variant} optimizer.lr={rates[method]}" for variant, method in methods.items()]
        self._sweep(stage, *self.scale.single_runs, variants_override(variants), *overrides)
        self._keep(stage)

    def _reported_runs(self, method: str) -> list[Path]:
        """Return the folders of the reported runs of a method in the stage `methods`, which have their weights."""
        runs = [run for run, _ in runs_of(method, self.output / "methods" / "report")]
        return runs or sys.exit(f"the stage methods has no reported runs of {method} yet: run it first")

    def _chosen_rate(self, method: str, stage: str = "methods") -> float:
        """Return the learning rate that a stage chose for a method, here or before, in the kept records."""
        folders = [self.output / stage / "report"] + ([self.records / stage] if self.records else [])
        for folder in folders:
            for _, record in runs_of(method, folder):
                return float(record["config"]["optimizer"]["lr"])
        stage = stage.partition("/")[0]
        sys.exit(f"the stage {stage} has not chosen a learning rate for {method} yet: run it first")

    def _stop_at_final_score(self, stage: str) -> list[str]:
        """Return the override that stops a run at the final selection MCC of a stage's worst run, if it is above 0."""
        folders = [self.output / stage] + ([self.records / stage] if self.records else [])
        full = next((costs for costs in map(Costs.read, folders) if costs.runs), None)
        if full is None:
            sys.exit(f"no run of {stage} has finished, so that the others have no score to stop at")
        worst = final_score(full)
        return [f"trainer.stop_at={worst}"] if worst > 0 else []

    def _evaluation_data(self) -> dict[str, list[str]]:
        """Return the overrides of the data on which finished runs are evaluated, by name."""
        perturbed = [*self.scale.evaluation_overrides, "data.perturb_seeds=1"]
        if self.scale.data is None:
            return {"perturbed": [*perturbed, "data.perturb=[typo,order]"]}
        strict = self.output / "strict"
        strict.mkdir(parents=True, exist_ok=True)
        write_strict_subset(self.scale.data / "validation.tsv", strict / "validation.tsv")
        return {
            "paws_qqp": ["data=paws_qqp", f"data.path={self.scale.data.parent / 'paws_qqp'}"],
            "strict": ["data=pairs", f"data.path={strict}"],
            "perturbed": [*perturbed, "data.perturb=all"],
        }

    def _sweep(self, stage: str, *arguments: str) -> None:
        """Start the sweep of a stage, or resume it; a finished one prints its table again."""
        print(f"\n{stage}", flush=True)
        folder = self.output / stage
        command = ["train", "-m", *arguments, *self.scale.overrides, *self.overrides]
        self._note(start_or_resume(command, folder))

    def _keep(self, folder: str) -> None:
        """Keep the records of the finished runs of a folder below the output."""
        if self.records is not None:
            keep(self.output / folder, self.records / folder.removesuffix("/report"))

    def _call(self, *arguments: str) -> None:
        self._note(lora_bench(list(arguments)))

    def _note(self, code: int) -> None:
        """Keep the worst exit code, and exit at one that ends the protocol."""
        if code not in (0, 1):  # refused or interrupted; after a failed run (1) the others still count
            sys.exit(code)
        self.exit_code = max(self.exit_code, code)


STAGES: dict[str, Callable[[Protocol], None]] = {
    name: stage for name, stage in vars(Protocol).items() if not name.startswith("_")
}


def variants_override(methods: Sequence[str]) -> str:
    return f"hydra.sweeper.variants=[{','.join(map(repr, methods))}]"


def write_strict_subset(source: Path, target: Path) -> None:
    """Copy the pairs of which no question is in train (`n_q_in_train` is 0)."""
    with source.open(encoding="utf-8", newline="") as file:
        header, *rows = csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
    column = header.index("n_q_in_train")
    strict = [header, *(row for row in rows if row[column] == "0")]
    target.write_text("".join("\t".join(row) + "\n" for row in strict), encoding="utf-8")


def format_ranks(runs: Sequence[dict[str, Any]], chosen: float) -> str:
    """Return a table in Markdown: MCC of each rank at the chosen learning rate and at its best one."""

    def rank_of(run: dict[str, Any]) -> int:
        return int(run["config"]["adapter"]["rank"])

    def rate_of(run: dict[str, Any]) -> float:
        return float(run["config"]["optimizer"]["lr"])

    def mean_mcc(runs: Sequence[dict[str, Any]], split: str) -> float:
        return mean(float(run["metrics"][f"{split}/mcc"]) for run in runs)

    lines = ["| adapter.rank | mcc | at its own best rate | optimizer.lr |", "| ---: | ---: | ---: | ---: |"]
    for rank, of_rank in groupby(sorted(runs, key=rank_of), rank_of):
        by_rate = {rate: list(group) for rate, group in groupby(sorted(of_rank, key=rate_of), rate_of)}
        selection_mcc = {rate: mean_mcc(group, "selection") for rate, group in by_rate.items()}
        best = max(selection_mcc, key=selection_mcc.__getitem__)
        mcc = {rate: f"{mean_mcc(group, 'validation'):.4f}" for rate, group in by_rate.items()}
        lines.append(f"| {rank} | {mcc.get(chosen, '')} | {mcc[best]} | {best:g} |")
    note = f"mcc: validation, at optimizer.lr={chosen:g} for every rank; the best by selection."
    return "\n".join([*lines, "", note])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--toy", action="store_true", help="the whole protocol in small; DATA is left out")
    parser.add_argument("--records", type=Path, help="folder in which records of the reported runs are kept")
    parser.add_argument("arguments", nargs="+", metavar="DATA OUTPUT STAGE KEY=VALUE")
    options = parser.parse_args()
    overrides = [text for text in options.arguments if "=" in text]
    positional = [text for text in options.arguments if "=" not in text]
    if not options.toy and not positional:
        parser.error("DATA is missing")
    scale = Scale.toy() if options.toy else Scale.published(Path(positional.pop(0)).absolute())
    if not positional:
        parser.error("OUTPUT is missing")
    output, *stages = positional
    if unknown := set(stages) - STAGES.keys():
        parser.error(f"no such stage: {', '.join(sorted(unknown))}")
    protocol = Protocol(scale, Path(output), overrides, options.records)
    for stage in stages or STAGES:
        STAGES[stage](protocol)
    return protocol.exit_code


if __name__ == "__main__":
    sys.exit(main())
