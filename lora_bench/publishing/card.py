"""The model card of a published run: README.md of its repository, written from the record."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import yaml

from lora_bench.adapters.peft.names import AUTO_CLASSES
from lora_bench.config.metric_names import display_name
from lora_bench.config.schema import SYMMETRIC
from lora_bench.console.format import format_duration, format_number, to_single_line
from lora_bench.evaluation.chance import describe_failure
from lora_bench.files.untrusted import as_number
from lora_bench.publishing.card_metadata import card_metadata

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from lora_bench.publishing.results import Result
    from lora_bench.publishing.source import PublishedRun

MAX_NAMES = 20
"""Maximum number of classes that are listed."""


def render_card(run: PublishedRun, results: Sequence[Result], license_name: str | None) -> str:
    """Return README.md: metadata, use, results, training data, training, cost and limits.

    Args:
        run: what is published.
        results: its metrics.
        license_name: for the metadata.
    """
    metadata = yaml.safe_dump(card_metadata(run, results, license_name), sort_keys=False, allow_unicode=True)
    sections = {
        "Use": _use(run),
        "Results": _results(run, results),
        "Training data": _data(run),
        "Training": _training(run),
        "Cost": _cost(run),
        "Limits": _limits(run, results),
    }
    title = to_single_line(run.repository.rpartition("/")[2])
    lines = ["---", metadata.rstrip(), "---", "", f"# {title}", "", _introduction(run)]
    for heading, content in sections.items():
        lines += ["", f"## {heading}", "", *content]
    return "\n".join(lines) + "\n"


def _introduction(run: PublishedRun) -> str:
    """Return what the run is, from which texts to which answers."""
    base, columns = _link(run.base_id, "") if run.base_id else _code(run.base_name), run.finished.text_columns
    subject = f"{base}, fully fine-tuned" if run.is_full else f"{base} with an adapter ({_code(run.method)})"
    if run.finished.members > 1:
        subject = f"{base} with an ensemble of {run.finished.members} adapters ({_code(run.method)})"
    texts = f"{'pairs of texts' if len(columns) > 1 else 'texts'} ({', '.join(map(_code, columns))})"
    names = run.finished.label_names
    if names is None:
        answer = f"It predicts a number for {texts}"
    else:
        listed = ", ".join(map(_code, names[:MAX_NAMES])) + (", …" if len(names) > MAX_NAMES else "")
        answer = f"It classifies {texts} into {len(names)} classes: {listed}"
    version = _environment(run, "versions", "lora-bench")
    return f"{subject}. {answer}. Trained and evaluated with lora-bench {version}."


# -- use --


def _use(run: PublishedRun) -> Iterator[str]:
    """Yield how to load the run with lora-bench and other programs."""
    reference = f"hf://{run.repository}"
    place, argument = (" model.path=DIR", ', model_path="DIR"') if run.needs_path else ("", "")
    row = ", ".join('"…"' for _ in run.finished.text_columns)
    if run.needs_path:
        yield f"The base model, {_code(run.base_name)}, is not included: it was a local folder. Give its path as DIR."
        yield f"The SHA-256 of its weights is `{run.finished.backbone_sha256}`, and it is checked."
        yield ""
    yield from _block("bash", f"lora-bench predict run={reference} input=texts.tsv output=labelled.tsv{place}")
    yield from _block(
        "python",
        "import lora_bench",
        "",
        f'run = lora_bench.load("{reference}"{argument})',
        f"run.predict([({row})])  # {_SCORES[run.finished.form]}",
    )
    yield from _other_programs(run)
    yield "For ONNX Runtime, transformers and inference servers, export the run first:"
    yield ""
    if not run.has_pair_features:
        yield from _block("bash", f"lora-bench export run={reference} format=merged output=MODEL{place}")
    yield from _block("bash", f"lora-bench export run={reference} format=onnx output=GRAPH{place}")
    yield "The exports have a README.md with the format of their inputs."
    if run.has_pair_features:
        yield "The head has pair features, which only format=onnx and format=torch can express."


_SCORES = {
    "binary": "(N,) P(label 1)",
    "multiclass": "(N, C) probability of each class",
    "regression": "(N,) numbers",
}


def _other_programs(run: PublishedRun) -> Iterator[str]:
    """Yield how transformers or PEFT load the repository as it is; nothing if they cannot."""
    if run.is_full and run.is_classifier and not run.has_pair_features and run.finished.members == 1:
        yield "With transformers:"
        yield ""
        auto_class = AUTO_CLASSES["SEQ_CLS"]
        yield from _block(
            "python",
            "import transformers",
            "",
            f'model = transformers.{auto_class}.from_pretrained("{run.repository}", subfolder="adapter")',
            f'tokenizer = transformers.AutoTokenizer.from_pretrained("{run.repository}", subfolder="adapter")',
        )
    elif run.is_read_by_peft:
        yield "With PEFT:"
        yield ""
        auto_class = AUTO_CLASSES[run.adapter_config["task_type"]]
        outputs = 1 if run.finished.label_names is None else len(run.finished.label_names)
        yield from _block(
            "python",
            "import peft, transformers",
            "",
            f'base = transformers.{auto_class}.from_pretrained("{run.base_id}", num_labels={outputs})',
            f'model = peft.PeftModel.from_pretrained(base, "{run.repository}", subfolder="adapter")',
        )
    else:
        return
    if _scores_both_orders(run):
        yield "This run scores both orders of the two texts. Take the mean of both for the same scores."
        yield ""


# -- results and data --


def _results(run: PublishedRun, results: Sequence[Result]) -> Iterator[str]:
    """Yield a table of metrics for each split."""
    if not results:
        yield "The record has no metrics of a reported split."
        return
    rows = []
    for split, metric, value, interval in results:
        bounds = "" if interval is None else f"{interval[0]:.4f} to {interval[1]:.4f}"
        rows.append((split, display_name(metric), f"{value:.4f}", bounds))
    yield from _table(("split", "metric", "value", "95 % interval"), rows)
    yield ""
    yield "The best state was chosen on a selection split, which was carved out of the training data."
    if any(result.interval for result in results):
        yield "Intervals are percentiles of a bootstrap over the examples. They do not cover other seeds."
    else:
        yield "There are no intervals, because the predictions were not available."


def _data(run: PublishedRun) -> Iterator[str]:
    """Yield the source of the data, and the rows of each split."""
    identity, data = run.data.get("hub_id"), run.finished.record["data"]
    if identity:
        configuration = run.data.get("hub_config")
        yield f"{_link(identity, 'datasets/')}" + (f", configuration {_code(configuration)}." if configuration else ".")
    else:
        yield f"{_code(run.data_name)}: data that are not on the hub."
    yield ""
    rows = data.get("rows") if isinstance(data.get("rows"), dict) else {}
    yield from _table(("split", "rows"), [(name, f"{count:,}") for name, count in rows.items() if as_number(count)])
    for warning in data.get("warnings") or []:
        yield ""
        yield f"Note: {to_single_line(str(warning))}"


# -- training and cost --

_SETTINGS = (
    "adapter.rank",
    "adapter.alpha",
    "adapter.target_modules",
    "adapter.layers",
    "optimizer.lr",
    "optimizer.schedule",
    "trainer.epochs",
    "trainer.max_steps",
    "trainer.batch_size",
    "trainer.objective",
    "data.max_length",
    "seed",
)
"""Settings that the card names; run.json has all of them."""


def _training(run: PublishedRun) -> Iterator[str]:
    """Yield the settings that matter most, and the state that was chosen."""
    rows = [("adapter", _code(run.method)), ("base model", _code(run.base_name))]
    for key in _SETTINGS:
        group, _, name = key.rpartition(".")
        value = _setting(run, group, name) if group else run.finished.config.get(name)
        if key == "trainer.epochs" and _setting(run, "trainer", "max_steps") is not None:
            continue  # the steps decide
        if value is not None:
            rows.append((f"`{key}`", _code(value)))
    rows.append(("precision", _code(run.finished.precision)))
    yield from _table(("setting", "value"), rows)
    yield ""
    selection = run.finished.record["selection"]
    if selection.get("step") is not None:
        metric = display_name(str(selection.get("metric")))
        yield f"The state of step {selection['step']} had the best selection {metric}."
    yield "All settings, versions and hashes are in `run.json`, and the log of evaluations is in `metrics.jsonl`."


def _cost(run: PublishedRun) -> Iterator[str]:
    """Yield parameters, time, FLOPs and memory."""
    params, cost = run.finished.record["params"], run.finished.record["cost"]
    values = (
        ("adapter parameters", params.get("adapter"), ""),
        ("head parameters", params.get("head"), ""),
        ("all parameters", params.get("total"), ""),
        ("FLOPs of training", cost.get("train_flops"), "FLOP"),
        ("peak memory", cost.get("peak_memory_bytes"), "B"),
    )
    numbers = ((name, as_number(value), unit) for name, value, unit in values)
    rows = [(name, format_number(number, unit)) for name, number, unit in numbers if number is not None]
    seconds = as_number(cost.get("train_seconds"))
    if seconds is not None:
        rows.append(("time of training", format_duration(seconds)))
    rows.append(("device", _code(_environment(run, "device") or "unknown")))
    yield from _table(("cost", "value"), rows)
    if (size := as_number(cost.get("pack_size"))) and size > 1:
        yield ""
        yield f"It was trained in a pack of {size:.0f} runs, so time and memory of its own are not known."


def _limits(run: PublishedRun, results: Sequence[Result]) -> Iterator[str]:
    """Yield sentences on what the results do not say, as a list."""
    length, rows = _setting(run, "data", "max_length"), run.finished.record["data"].get("rows")
    yield "- It is one training run with one seed. Another seed gives other scores."
    yield "- The results hold for texts like those of the training data. Evaluate it on your own before you use it."
    yield f"- Texts are truncated to {length} tokens."
    if run.finished.form == "binary":
        yield "- The threshold between the classes is 0.5, in the results too."
    for split in dict.fromkeys(result.split for result in results):
        examples = rows.get(split) if isinstance(rows, dict) else None
        reason = describe_failure(run.finished.record, split, examples if isinstance(examples, int) else None)
        if reason is not None:
            yield f"- The run learned nothing: {to_single_line(reason)}."
    calibration = run.finished.calibration
    if calibration is not None:
        yield f"- Scores are not calibrated. The temperature of the selection split is {calibration.temperature:.3g}."
    for package in run.finished.other_packages:
        yield f"- It needs the package {_code(package)}."
    yield "- Biases of the base model and of the data were not examined."


# -- Markdown --


def _block(language: str, *lines: str) -> Iterator[str]:
    """Yield a block of code, and an empty line after it."""
    yield from (f"```{language}", *lines, "```", "")


def _table(headers: Sequence[str], rows: Iterable[Sequence[str]]) -> Iterator[str]:
    """Yield the lines of a table."""
    yield f"| {' | '.join(headers)} |"
    yield f"|{' --- |' * len(headers)}"
    for row in rows:
        cells = [cell.replace("|", "\\|") for cell in row]
        yield f"| {' | '.join(cells)} |"


def _code(value: object) -> str:
    """Return a value as code of one line, so that nothing in it is read as Markdown or HTML."""
    text = to_single_line(str(value)).replace("`", "'")
    return f"`{text}`"


def _link(identity: str, kind: str) -> str:
    return f"[{identity}](https://huggingface.co/{kind}{identity})"


def _scores_both_orders(run: PublishedRun) -> bool:
    """Return whether the run's pairs are scored in both orders, as `Trainer.scores_both_orders_of` does."""
    setting = _setting(run, "trainer", "score_both_orders")
    both = _setting(run, "data", "relation") in SYMMETRIC if setting is None else bool(setting)
    return both and len(run.finished.text_columns) > 1


def _setting(run: PublishedRun, group: str, name: str) -> Any:
    """Return a setting of the run; None if it has none."""
    node = run.finished.config.get(group)
    return node.get(name) if isinstance(node, dict) else None


def _environment(run: PublishedRun, *keys: str) -> Any:
    """Return a value of the recorded environment; None if it is missing."""
    node: Any = run.finished.record["environment"]
    for key in keys:
        node = node.get(key) if isinstance(node, dict) else None
    return node
