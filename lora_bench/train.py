"""The entry point of a run, top to bottom: configs -> data -> backbone -> adapters -> fit -> evaluate -> record."""

from __future__ import annotations

import random
import time
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from omegaconf import DictConfig, OmegaConf
from torch.utils.flop_counter import FlopCounterMode

from lora_bench import config, environment
from lora_bench.adapters import Adapter, method_class, peft_format
from lora_bench.adapters.pack import Member, Pack
from lora_bench.adapters.targets import unmatched_alternatives
from lora_bench.backbones.load import load, load_tokenizer, public_place
from lora_bench.data import sources
from lora_bench.data.pairs import TokenTable, tokenize
from lora_bench.errors import DivergedError, RunFailedError, UserError, nearest
from lora_bench.evaluation.cost import FlopModel, peak_memory_bytes, reset_peak_memory
from lora_bench.evaluation.metrics import check_metrics, score
from lora_bench.progress import Display, announce, show_result
from lora_bench.record import Run
from lora_bench.screen import shown
from lora_bench.training.checkpoint import Checkpoints
from lora_bench.training.interrupt import Interruption
from lora_bench.training.loop import fit, predict, prepare, total_steps
from lora_bench.training.memory import keep_freed_memory
from lora_bench.training.objective import check_columns, make_objective
from lora_bench.training.precision import resolve_device, resolve_precision
from lora_bench.training.probe import estimate, probe_step

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from rich.console import Console

    from lora_bench.data.examples import Examples
    from lora_bench.training.state import Outcome


_KEYS = ("model", "adapter", "data", "optimizer", "trainer", "metric", "seed", "resume", "dry_run")


@dataclass(frozen=True)
class Experiment:
    """All settings of one run, typed and checked."""

    model: config.Model
    adapter: Adapter
    data: config.Data
    optimizer: config.Optimizer
    trainer: config.Trainer
    metrics: dict[str, config.Metric]
    seed: int

    @classmethod
    def build(cls, cfg: DictConfig) -> Experiment:
        """From the composed config; refuses what is out of range, naming the key."""
        for name in cfg:
            config.need(name in _KEYS, str(name), None, "is not a known key", nearest(str(name), _KEYS))
        config.need(type(cfg.seed) is int and 0 <= cfg.seed < 2**63, "seed", cfg.seed, "must be a whole number from 0")
        config.need(type(cfg.dry_run) is bool, "dry_run", cfg.dry_run, "must be true or false")
        metrics = config.build_metrics(cfg.metric)
        check_metrics(metrics)
        made = cls(
            data=config.build_data(cfg.data),  # first: T5 takes its label words from it
            model=config.build_model(cfg.model),
            adapter=config.build(method_class(str(cfg.adapter.method)), cfg.adapter, "adapter"),
            optimizer=config.build(config.Optimizer, cfg.optimizer, "optimizer"),
            trainer=config.build(config.Trainer, cfg.trainer, "trainer"),
            metrics=metrics,
            seed=cfg.seed,
        )
        check_columns(made.trainer, made.data.text_columns)
        return made


def train(
    cfg: DictConfig,
    folder: Path,
    *,
    choices: dict[str, str],
    overrides: list[str],
    console: Console,
    brief: bool = False,
    begun: Run | None = None,
) -> None:
    """Run one experiment and leave its record in `folder`; with `dry_run=true` only say what it would cost.

    Args:
        cfg: the composed config.
        folder: the run's folder; made once nothing more can be refused.
        choices: the option chosen of each group, for the record.
        overrides: what was asked for on the command line, for the record.
        console: where to tell how it goes.
        brief: one line for the result instead of a table (a sweep ends with its own).
        begun: the run in `folder`, reopened, that began with this config: go on from its newest checkpoint.

    Raises:
        UserError: the request cannot be met; nothing is left behind.
        DivergedError: loss, gradient or scores ceased to be finite; the record says so.
    """
    experiment = Experiment.build(cfg)
    trainer = experiment.trainer
    device = resolve_device(trainer.device)
    keep_freed_memory()
    reset_peak_memory(device)
    if trainer.threads:
        torch.set_num_threads(trainer.threads)

    splits, described = load_splits(experiment.data)
    pack, backbone_sha256 = attach(experiment, device, resolve_precision(trainer.precision, device))
    tables = {
        name: tokenize(split, experiment.data.text_columns, pack.backbone, experiment.data.max_length)
        for name, split in splits.items()
    }
    swapped = swapped_table(experiment, splits["train"], pack)
    _seed_everything(experiment.seed)
    checkpoints = Checkpoints(folder / "checkpoints")
    newest = checkpoints.newest() if begun else None
    if newest is None:
        preparation = _prepare(pack, trainer, tables["train"])
    else:
        preparation = _Preparation(**newest.facts["preparation"])
        if newest.facts["ranks"][0]:
            pack.set_ranks(0, newest.facts["ranks"][0])
    if cfg.dry_run:
        console.print(estimate(pack, trainer, tables["train"]).table())
        return

    resolved = OmegaConf.to_container(cfg, resolve=True)
    assert isinstance(resolved, dict)
    config = {str(key): value for key, value in resolved.items()}
    if begun:
        _refuse_another(begun.record, described["fingerprint"], backbone_sha256)
    run = begun or Run.claim(folder, choices=choices, config=config, overrides=overrides)
    with _recorded_end(run, console, brief):
        if begun:
            run.rewind(newest.step if newest else 0)
        run.update(
            data={**described, "truncated": {name: table.truncated for name, table in tables.items()}},
            params=pack.count_parameters(0),
            targets=pack.ranks(0),
            environment={
                **environment.describe(),
                "device": str(device),
                "precision": str(pack.backbone.compute_dtype).removeprefix("torch."),
                "threads": torch.get_num_threads(),
                "backbone_sha256": backbone_sha256,
            },
        )
        damaged = [f"passed over a damaged checkpoint, {trouble}" for trouble in checkpoints.damaged]
        announce(console, run.record, len(pack.updates[0]), [*_notes(experiment, run.record), *damaged])
        if newest:
            console.print(shown(f"going on from step {newest.step}"))
        flop_model = FlopModel.measure(lambda rows, length: probe_step(pack, rows, length))
        steps = total_steps(trainer, len(tables["train"]))
        with Display(console, steps) as display, Interruption() as interruption:
            (outcome,) = fit(
                pack,
                [experiment.optimizer],
                trainer,
                tables["train"],
                tables["selection"],
                swapped=swapped,
                flop_model=flop_model,
                metrics=experiment.metrics,
                watcher=_Watcher(run, display),
                checkpoints=replace(checkpoints, facts={"preparation": asdict(preparation)}),
                begun=newest,
                interruption=interruption,
            )
        _record_cost(run, outcome, preparation, device)
        run.update(targets=pack.ranks(0))  # a method may have pruned
        if outcome.status == "diverged":
            raise DivergedError(outcome.error)
        _evaluate(run, pack, experiment, outcome, tables)
        _tell_room(run, pack, trainer, console)
        peft_format.save(run.adapter_folder, pack, 0, public_place(experiment.model))
    checkpoints.clear()
    show_result(console, run.folder, run.record, brief=brief)


def _refuse_another(began: dict[str, Any], fingerprint: dict[str, str], backbone_sha256: str) -> None:
    """An interrupted run goes on with the data and the backbone that it began with."""
    for split, found in began["data"].get("fingerprint", {}).items():
        if fingerprint.get(split) != found:
            raise UserError(f"the {split} split is not the one that the run began with", key="resume")
    if began["environment"].get("backbone_sha256") not in (None, backbone_sha256):
        raise UserError("the backbone is not the one that the run began with", key="resume")


def load_splits(data: config.Data) -> tuple[dict[str, Examples], dict[str, Any]]:
    """Train, selection and every labelled split to report, and what the record says of them.

    Raises:
        UserError: the source has no train split, or no labelled split to report.
    """
    found = sources.load(data)
    if "train" not in found:
        raise UserError(
            "there is no train split",
            key="data",
            remedy=f"Found: {', '.join(found)}. Training needs a train file with labels.",
        )
    reported = sources.reported(found)
    if not reported:
        raise UserError(
            "there is no labelled split to report on",
            key="data",
            remedy="Add a validation file: scores on the training pairs say nothing.",
        )
    train, selection = sources.carve(found["train"], data)
    splits = {"train": train, "selection": selection, **reported}
    described = {
        "source": data.source,
        "fingerprint": {name: split.fingerprint() for name, split in splits.items()},
        **sources.examine(splits),
    }
    return splits, described


def attach(
    experiment: Experiment, device: torch.device, dtype: torch.dtype, saved_ranks: dict[str, int] | None = None
) -> tuple[Pack, str]:
    """The pack of one on its backbone, and the backbone's hash as it was loaded.

    Args:
        saved_ranks: rank by module where a saved adapter's tensors are about to be put in.
    """
    backbone = load(experiment.model, load_tokenizer(experiment.model), task=experiment.data.task, device=device)
    backbone.need_room(experiment.data.max_length)
    backbone_sha256 = backbone.hash()
    backbone.to(device, dtype, trained=experiment.adapter.trains_backbone)
    return Pack(backbone, [Member(experiment.adapter, experiment.seed, saved_ranks)]), backbone_sha256


@dataclass(frozen=True)
class _Preparation:
    """What looking at data before the first step cost."""

    seconds: float
    flops: float


def _prepare(pack: Pack, trainer: config.Trainer, train: TokenTable) -> _Preparation:
    began = time.perf_counter()
    with FlopCounterMode(display=False) as counter:
        prepare(pack, trainer, train)
    return _Preparation(time.perf_counter() - began, counter.get_total_flops())


def swapped_table(experiment: Experiment, train: Examples, pack: Pack) -> TokenTable | None:
    """The training pairs with their texts exchanged, where the objective asks for both orders."""
    data = experiment.data
    if make_objective(experiment.trainer).orders == 1:
        return None
    return tokenize(train, data.text_columns, pack.backbone, data.max_length, swapped=True)


def _evaluate(run: Run, pack: Pack, experiment: Experiment, outcome: Outcome, tables: dict[str, TokenTable]) -> None:
    """Score every reported split, once, with the member's best state."""
    assert outcome.best is not None
    best = {key: outcome.best[key] for key in ("step", "epoch")}
    metrics = {f"selection/{name}": value for name, value in outcome.best["metrics"].items()}
    for name in [name for name in tables if name not in ("train", "selection")]:
        table = tables[name]
        assert table.labels is not None
        began = time.perf_counter()
        (scores,) = predict(pack, table, experiment.trainer.eval_batch_size)
        seconds = round(time.perf_counter() - began, 3)
        values = score(scores, table.labels, experiment.metrics)
        metrics |= {f"{name}/{key}": value for key, value in values.items()}
        run.log({**best, "split": name, "metrics": values, "seconds": seconds})
        run.write_predictions(name, table.ids, table.labels, scores)
    run.update(metrics=metrics, selection={**best, "metric": "mcc"})


def _record_cost(run: Run, outcome: Outcome, preparation: _Preparation, device: torch.device) -> None:
    """Seconds and FLOPs of training hold those of preparation: a start that looks at data is not free."""
    run.update(
        cost={
            "train_seconds": preparation.seconds + outcome.seconds,
            "train_flops": preparation.flops + outcome.flops,
            "prepare_seconds": preparation.seconds,
            "peak_memory_bytes": peak_memory_bytes(device),
            "pairs_per_second": outcome.pairs / outcome.seconds if outcome.seconds else None,
            "steps": outcome.steps,
            "pack_size": 1,
        }
    )


def _tell_room(run: Run, pack: Pack, trainer: config.Trainer, console: Console) -> None:
    """Record the portions in which pairs went through the network, and tell where memory made them smaller."""
    found = {"micro_batch_size": trainer.micro_batch_size, "eval_batch_size": trainer.eval_batch_size}
    if "training" in pack.room:
        found["micro_batch_size"] = pack.room["training"] * pack.size  # it counts pairs over all members
    if "evaluation" in pack.room:
        found["eval_batch_size"] = pack.room["evaluation"]
    run.update(cost=found)
    for key, pairs in found.items():
        if pairs != getattr(trainer, key):
            console.print(shown(f"note: memory was short, so the run went on with trainer.{key}={pairs}."))


@contextmanager
def _recorded_end(run: Run, console: Console, brief: bool) -> Iterator[None]:
    """However the run ends, its record says so; a traceback goes to its log."""
    try:
        yield
        run.finish("done")
    except Exception as error:
        if not run.folder.exists():
            raise RunFailedError("was deleted or moved while the run trained", file=run.folder) from None
        run.fail(error)
        raise
    except BaseException:  # Ctrl-C, or a signal that became SystemExit
        with suppress(RunFailedError):
            run.finish("interrupted", "stopped from outside")
        if not brief:
            console.print(shown(f"go on with: lora-bench train resume={run.folder}"), soft_wrap=True)
        raise


class _Watcher:
    """Tells the record and the screen how training goes."""

    def __init__(self, run: Run, display: Display) -> None:
        self.run = run
        self.display = display
        self.stepped = display.stepped

    def evaluated(self, member: int, line: dict[str, Any]) -> None:
        self.run.log(line)
        self.display.evaluated(member, line)


def _notes(experiment: Experiment, record: dict[str, Any]) -> list[str]:
    """What the user should know of a run before it trains."""
    notes = list(record["data"]["warnings"])
    truncated = sum(record["data"]["truncated"].values())
    if truncated:
        limit = experiment.data.max_length
        notes.append(f"{truncated:,} pairs are longer than data.max_length={limit} and are truncated.")
    pattern = getattr(experiment.adapter, "target_modules", "all")
    for alternative in unmatched_alternatives(pattern, list(record["targets"])):
        notes.append(f"adapter.target_modules: no linear matches {alternative!r}.")
    return notes


def _seed_everything(seed: int) -> None:
    """The global streams, which only full fine-tuning's dropout draws from; everything else has streams of its own."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
