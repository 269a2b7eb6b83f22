"""Terminal output of `lora-bench prompt`: the request, the progress, the cost."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rich.progress import MofNCompleteColumn

from lora_bench.console.format import format_number
from lora_bench.console.stages import Live
from lora_bench.console.text import sanitise

if TYPE_CHECKING:
    from collections.abc import Mapping

    from rich.console import Console

    from lora_bench.llm.client import Client
    from lora_bench.llm.parsing import Answer
    from lora_bench.llm.settings import LLM
    from lora_bench.llm.template import Messages


class Display(Live):
    """The number of answers so far: a live bar in a terminal, a few lines elsewhere."""

    def __init__(self, console: Console, questions: int) -> None:
        super().__init__(console, questions, MofNCompleteColumn())
        self.answers = 0

    def update(self, answers: int) -> None:
        """Show the number of questions that are answered; without a terminal, print a line if one is `due`."""
        self.answers = answers
        self.progress.update(self.task, completed=answers)
        if self.due(answers):
            self.screen.print(self.line())

    def line(self) -> str:
        """Return the number of answers as one line."""
        return f"answers {self.answers:,}/{self.total:,}"


def announce(console: Console, record: Mapping[str, Any], llm: LLM, cached: int) -> None:
    """Print the model, the data, the number of cached answers and the warnings about the data.

    Args:
        record: the run's record (`run.json`).
        llm: the server and its model.
        cached: number of cached answers.
    """
    prompt, choices = record["config"]["prompt"], record["choices"]
    reported_rows = {name: rows for name, rows in record["data"]["rows"].items() if name not in ("train", "selection")}
    sizes = ", ".join(f"{name} {rows:,}" for name, rows in reported_rows.items())
    lines = [
        f"{llm.model} at {llm.base_url}: {choices.get('prompt', 'prompt')}, {prompt['shots']} examples",
        f"{choices.get('data', 'data')}: {sizes}; {cached:,} answers are cached",
        *(f"note: {note}" for note in record["data"]["warnings"]),
    ]
    for line in lines:
        console.print(sanitise(line), soft_wrap=True)


def show_cost(console: Console, cost: Mapping[str, Any]) -> None:
    """Print the cost of all answers, and the share that this run paid; nothing for answers from a file."""
    if cost:
        items = [f"{cost['requests']:,} requests", f"{cost['cached']:,} answers from the cache"]
        if cost["prompt_tokens"] is not None:
            items.append(
                f"{format_number(cost['prompt_tokens'])} tokens read, "
                f"{format_number(cost['completion_tokens'])} written"
            )
        if cost["money"] is not None:
            items.append(f"money {cost['money']:.4g}")
        if cost["money_spent"] is not None:
            items.append(f"{cost['money_spent']:.4g} of it now" if cost["money"] else f"now {cost['money_spent']:.4g}")
        console.print(sanitise(" · ".join([*items, f"{cost['seconds']:.0f} s"])))


def show_request(
    console: Console, client: Client, questions: Mapping[str, Messages], cached: Mapping[str, Answer]
) -> None:
    """Print the first prompt, the number of requests that would be sent, and their maximal cost.

    The cost is left out without prices or a limit on the tokens of an answer.

    Args:
        console: the terminal.
        client: not opened; nothing is sent.
        questions: messages by key, at least one.
        cached: answers by key that need no request.
    """
    for message in next(iter(questions.values())):
        console.print(sanitise(f"[{message['role']}]", style="bold"))
        for line in message["content"].split("\n"):
            console.print(sanitise(line), soft_wrap=True)
    missing = [messages for key, messages in questions.items() if key not in cached]
    line = f"{len(missing):,} requests to {client.llm.base_url}; {len(cached):,} answers are cached"
    console.print()
    console.print(sanitise(line), soft_wrap=True)
    if client.llm.cost(0, 0) is not None and client.llm.max_answer_tokens is not None:
        max_cost = sum(client.budget.max_cost_of(messages) for messages in missing)
        console.print(
            sanitise(f"cost: at most {max_cost:.4g}, with a token for each byte; expect about a quarter of it")
        )
