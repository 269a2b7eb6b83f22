#!/usr/bin/env python3
"""Makes every figure about the enhanced method again. What is done is not run again: start it again to go on.

    LORA_BENCH_BACKBONES=DIR experiments/reproduce_enhanced.py DATA OUTPUT [STAGE …] [KEY=VALUE …]
    experiments/reproduce_enhanced.py --toy OUTPUT [STAGE …]     everything in minutes: random networks, toy pairs

DATA is a folder with QQP's train.tsv and validation.tsv; PAWS-QQP's test.tsv is in ../paws_qqp beside it. Stages, all
unless named:

    methods     the enhanced method and seven rivals on MiniLM: rates chosen from the same four values on the selection
                split (2,000 pairs, seed 0); then 8,000 pairs, 2 epochs, seeds 0-4
    backbones   enhanced, LoRA and full fine-tuning on roberta_mini and t5_mini: rates chosen in the same way on each;
                then 4,000 pairs, 2 epochs, seeds 0-2
    large       these three on 50,000 pairs, 1 epoch, seeds 0-2, at the rates that `methods` chose; so are the next two
    target      these three, full fine-tuning with the recipe, and the enhanced method on the upper four layers in one
                epoch, with a look every 25 steps, 8,000 pairs, otherwise 2 epochs, seeds 0-2: what it takes to reach
                the selection MCC that full fine-tuning ends with
    robust      the runs of `methods` of these three on PAWS-QQP, on the strict part of validation (n_q_in_train is 0),
                and on validation perturbed
    ablation    sweep=ablation: the parts off one by one, 8,000 pairs, 2 epochs, seeds 0-4
    ranks       the enhanced method of rank 1 to 128 at all four rates, 2,000 pairs, 3 epochs, seeds 0-2: what it costs
                that one rate serves all ranks

Each stage's table is in its folder below OUTPUT, and `lora-bench compare` shows it again. The rivals are tested against
the enhanced method. All stages take about eight hours on two cores that multiply bf16 fast (estimated, not measured).
KEY=VALUE goes to every sweep that is begun: pack.workers=12 runs so many processes at a time on one large GPU, best
under NVIDIA's multi-process service (nvidia-cuda-mps-control -d); seconds are then no run's own.
"""

from __future__ import annotations

import argparse
import csv
import sys
from itertools import groupby
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING

from lora_bench.cli import main
from lora_bench.records import run_folder, sweep_folder

if TYPE_CHECKING:
    from collections.abc import Sequence

ENHANCED, LORA, FULL = THREE = ("experiment=enhanced", "adapter=lora", "adapter=full")
RECIPES = ("experiment=recipe adapter=lora", "experiment=recipe adapter=full")
METHODS = (ENHANCED, LORA, FULL, *RECIPES, "adapter=dora", "adapter=milora", "adapter=rslora")


class Protocol:
    """The protocol; each stage is a method of that name.

    Args:
        data: the folder with QQP's files; None: the toy version.
        output: where each stage has a folder.
        overrides: of every sweep.
    """

    def __init__(self, data: Path | None, output: Path, overrides: Sequence[str] = ()) -> None:
        self.data, self.output, self.overrides = data, output, overrides
        self.worst = 0
        self.rates, self.seeds, self.fewer = ["1e-4", "4e-4", "1.5e-3", "6e-3"], "0,1,2,3,4", "0,1,2"
        self.up_to, self.upper = "1,2,4,8,16,32,64,128", "top:4"
        self.minilm, self.minis, self.share = "minilm", ("roberta_mini", "t5_mini"), 1
        self.work = ["data=pairs", f"data.path={data}"]
        self.split = ["data.selection_size=2000"]
        self.alone = ["pack.size=1"]  # times are each run's own
        if data is None:
            self.rates, self.seeds, self.fewer = ["1e-3", "6e-3"], "0", "0"
            self.up_to, self.upper = "1,4", "top:1"
            self.minilm, self.minis, self.share = "tiny_bert", ("tiny_roberta", "tiny_t5"), 100
            self.work, self.alone = ["data=toy", "data.train_rows=600", "data.validation_rows=40"], []
            self.split = [
                "data.selection_size=40",
                "trainer.precision=fp32",
                "trainer.device=cpu",
                "trainer.max_steps=3",
                "trainer.batch_size=8",
            ]

    def methods(self) -> None:
        self._tuned("methods", self.minilm, METHODS, 8000, self.seeds)

    def backbones(self) -> None:
        for model in self.minis:
            self._tuned(f"backbones/{model}", model, THREE, 4000, self.fewer)

    def large(self) -> None:
        self._at_chosen_rates("large", {method: method for method in THREE}, *self._size(50000, 1))

    def target(self) -> None:
        pairs, epochs = self._size(8000, 2)
        variants = {f"{method} {epochs}": method for method in (*THREE, RECIPES[-1])}
        variants[f"{ENHANCED} adapter.layers={self.upper} {self._size(8000, 1)[1]}"] = ENHANCED
        self._at_chosen_rates("target", variants, pairs, f"trainer.eval_every={max(1, 25 // self.share)}")

    def robust(self) -> None:
        for name, arguments in self._elsewhere().items():
            for run in (run for method in THREE for run in self._reported(method)):
                if not (run / "evaluations" / f"{name}.json").exists():
                    self._call("eval", f"run={run}", f"name={name}", *arguments)
        self._call("compare", str(self.output / "methods"), "--baseline", str(next(iter(self._reported(ENHANCED)))))

    def ablation(self) -> None:
        grid = [f"model={self.minilm}", *self._size(8000, 2), self._tuning()]
        self._sweep("ablation", "sweep=ablation", *grid, f"optimizer.lr={','.join(self.rates)}", f"seed={self.seeds}")

    def ranks(self) -> None:
        """A table beside the sweep's own: each rank at the rate that `methods` chose, and at the one best for it."""
        chosen = next(iter(self._reported(ENHANCED).values()))
        grid = [f"adapter.rank={self.up_to}", f"optimizer.lr={','.join(self.rates)}", f"seed={self.fewer}"]
        self._sweep("ranks", ENHANCED, f"model={self.minilm}", *self._size(2000, 3), *grid)
        done = [run for _, run in run_folder.find_runs([self.output / "ranks"])[0] if run["status"] == "done"]
        lines = ["| adapter.rank | mcc | at its own best rate | optimizer.lr |", "| ---: | ---: | ---: | ---: |"]
        for rank, of_rank in groupby(sorted(done, key=_rank), _rank):
            by_rate = {rate: list(runs) for rate, runs in groupby(sorted(of_rank, key=_rate), _rate)}
            best = max(by_rate, key=lambda rate: _mcc(by_rate[rate], "selection"))
            mcc = {rate: f"{_mcc(runs, 'validation'):.4f}" for rate, runs in by_rate.items()}
            lines.append(f"| {rank} | {mcc.get(float(chosen), '')} | {mcc[best]} | {best:g} |")
        text = "\n".join(
            [*lines, "", f"mcc: validation, at optimizer.lr={chosen} for every rank; the best by selection."]
        )
        (self.output / "ranks" / "one_rate.md").write_text(text + "\n", encoding="utf-8")
        print(text)

    # -- what stages are made of --

    def _size(self, pairs: int, epochs: int) -> list[str]:
        return [f"data.train_size={pairs // self.share}", f"trainer.epochs={epochs}"]

    def _tuning(self) -> str:
        pairs, epochs = (text.split("=")[1] for text in self._size(2000, 3))
        data, trainer = f"{{train_size: {pairs}, report: false}}", f"{{epochs: {epochs}, eval_every: null}}"
        return f"++hydra.sweeper.tune={{seed: 0, data: {data}, trainer: {trainer}}}"

    def _tuned(self, stage: str, model: str, methods: tuple[str, ...], pairs: int, seeds: str) -> None:
        """Each method's rate is chosen, then each is reported at its own: one sweep of two stages."""
        grid = [f"optimizer.lr={','.join(self.rates)}", f"seed={seeds}", _variants(methods)]
        choosing = ["hydra/sweeper=tuned", self._tuning(), *grid]
        self._sweep(stage, f"model={model}", *self._size(pairs, 2), *self.alone, *choosing)

    def _at_chosen_rates(self, stage: str, methods: dict[str, str], *overrides: str) -> None:
        """Variants, each at the rate of one of the methods."""
        variants = [f"{text} optimizer.lr={next(iter(self._reported(of).values()))}" for text, of in methods.items()]
        self._sweep(stage, f"model={self.minilm}", f"seed={self.fewer}", *self.alone, _variants(variants), *overrides)

    def _reported(self, method: str) -> dict[Path, str]:
        """The method's runs in the stage `methods`, and the rate that was chosen there."""
        folder = self.output / "methods"
        rates = {}
        for name, job in (sweep_folder.read(folder).jobs if sweep_folder.is_sweep(folder) else {}).items():
            choices = {text for text in job if text.startswith(("experiment=", "adapter="))}
            if name.startswith("report/") and choices == set(method.split()):
                rates[folder / name] = next(text for text in job if text.startswith("optimizer.lr=")).split("=")[1]
        return rates or sys.exit(f"the stage methods has not chosen a rate for {method} yet: run it first")

    def _elsewhere(self) -> dict[str, list[str]]:
        """Return the evaluations of finished runs: by name, the overrides of their data."""
        if self.data is None:
            return {"perturbed": [*self.work, "data.perturb=[typo,order]", "data.perturb_seeds=1"]}
        with (self.data / "validation.tsv").open(encoding="utf-8", newline="") as file:
            header, *rows = csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
        strict = self.output / "strict" / "validation.tsv"
        strict.parent.mkdir(parents=True, exist_ok=True)
        where = header.index("n_q_in_train")
        kept = [header, *(row for row in rows if row[where] == "0")]
        strict.write_text("".join("\t".join(row) + "\n" for row in kept), encoding="utf-8")
        return {
            "paws_qqp": ["data=paws_qqp", f"data.path={self.data.absolute().parent / 'paws_qqp'}"],
            "strict": ["data=pairs", f"data.path={strict.parent}"],
            "perturbed": [*self.work, "data.perturb=all", "data.perturb_seeds=1"],
        }

    def _sweep(self, stage: str, *arguments: str) -> None:
        """Begun, or what it lacks; one that is done only shows its table again."""
        print(f"\n{stage}", flush=True)
        folder = self.output / stage
        new = ["-m", *arguments, *self.work, *self.split, *self.overrides, f"hydra.sweep.dir={folder}"]
        self._call("train", *(["-m", f"resume={folder}"] if sweep_folder.is_sweep(folder) else new))

    def _call(self, *arguments: str) -> None:
        code = main(list(arguments))
        if code not in (0, 1):  # refused, or stopped from outside; a run that failed leaves the others their worth
            sys.exit(code)
        self.worst = max(self.worst, code)


def _variants(methods: tuple[str, ...] | list[str]) -> str:
    return f"hydra.sweeper.variants=[{','.join(map(repr, methods))}]"


def _rank(run: dict) -> int:
    return run["config"]["adapter"]["rank"]


def _rate(run: dict) -> float:
    return run["config"]["optimizer"]["lr"]


def _mcc(runs: list[dict], split: str) -> float:
    return mean(run["metrics"][f"{split}/mcc"] for run in runs)


STAGES = {name: stage for name, stage in vars(Protocol).items() if not name.startswith("_")}

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--toy", action="store_true")
    parser.add_argument("places", nargs="+", metavar="DATA OUTPUT STAGE KEY=VALUE")
    options = parser.parse_args()
    overrides = [text for text in options.places if "=" in text]
    options.places = [text for text in options.places if "=" not in text]
    data = None if options.toy else Path(options.places.pop(0)).absolute()
    if not options.places or (unknown := set(options.places[1:]) - STAGES.keys()):
        parser.error(f"no stage: {', '.join(sorted(unknown))}" if options.places else "OUTPUT is missing")
    protocol = Protocol(data, Path(options.places[0]), overrides)
    for name in options.places[1:] or STAGES:
        STAGES[name](protocol)
    sys.exit(protocol.worst)
