"""README.md of an export for deployment."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence


def render_readme(settings: Mapping[str, Any], title: str, requirements: str, notes: Sequence[str]) -> str:
    """Return README.md: a complete example, the files, and the graph's inputs and outputs for other languages.

    Args:
        settings: the content of scoring.json.
        title: of the page.
        requirements: the packages that score.py needs, as arguments of pip.
        notes: further sentences.
    """
    example = ["How do I learn Go?", "What is the best way to learn Go?"][: len(settings["text_columns"])]
    arguments = " ".join(f'"{text}"' for text in example)
    return _README.format(
        title=title,
        requirements=requirements,
        arguments=arguments,
        row=repr(tuple(example)),
        file=settings["graph"],
        min_length=settings["min_length"],
        inputs=", ".join(f"`{name}`" for name in settings["inputs"]),
        facts="\n".join(f"- {fact[0].upper()}{fact[1:]}" for fact in [*_facts(settings), *notes]),
    )


def _facts(settings: Mapping[str, Any]) -> list[str]:
    """Return sentences on the inputs and outputs of a graph."""
    facts = [f"a row has the texts {', '.join(settings['text_columns'])}, in this order."]
    if settings["template"] is not None:
        facts.append("the texts stand between the parts of `template`, and the tokenizer reads them as one text.")
    facts.append(
        f"more than {settings['max_length']} tokens are truncated as `data.truncation={settings['truncation']}` says: "
        "see `kept_positions`."
    )
    if "text_ids" in settings["inputs"]:
        facts.append("`text_ids` is 1 for tokens of the first text, 2 for those of the second, 0 for others.")
    if settings["both_orders"]:
        facts.append(
            "inputs with the prefix `reversed_` have the same rows with their texts in reversed order, padded to the "
            "same length. The score is the mean of both orders."
        )
    if settings["members"] > 1:
        facts.append(f"the score is the mean of {settings['members']} members, all of which are in the graph.")
    facts.append(f"`scores` {_SCORES[settings['form']]}.")
    if settings["threshold"] is not None:
        facts.append(f"`labels` is 1 for scores of at least {settings['threshold']:.6g}, else 0. The graph has it.")
    if settings["label_names"]:
        classes = ", ".join(f"{label}: {name!r}" for label, name in enumerate(settings["label_names"]))
        facts.append(f"the classes are {{{classes}}}.")
    versions = ", ".join(f"{name} {number}" for name, number in settings["versions"].items())
    facts.append(f"written with {versions}.")
    return facts


_SCORES = {
    "binary": "is P(label 1) of each row, (N,)",
    "multiclass": "is the probability of each class, (N, C), and `labels` the most probable one",
    "regression": "is the predicted number, (N,)",
}
"""The meaning of the scores, by form of task."""

_README = """\
# {title}

Written by `lora-bench export`. The scores are those of `lora-bench predict`.

```bash
pip install {requirements}
python score.py {arguments}
```

In Python, in this folder:

```python
from score import Model

model = Model()
print(model.predict([{row}]))
```

| file | contents |
| --- | --- |
| `{file}` | the graph, in fp32 |
| `scoring.json` | settings of the inputs, names of the classes |
| `tokenizer.json` | the tokenizer |
| `score.py` | the code above, without lora-bench and transformers |

## The graph

- The inputs are {inputs}: int64, one row per example, padded to a common length of at least {min_length}.
{facts}
"""
