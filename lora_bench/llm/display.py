"""What a person sees of prompting: what is about to be asked, how far it is, what it cost."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rich.progress import MofNCompleteColumn

from lora_bench.console.format import format_number
from lora_bench.console.progress import Live
from lora_bench.console.text import sanitise

if TYPE_CHECKING:
    from collections.abc import Mapping

    from rich.console import Console

    from lora_bench.llm.client import Client
    from lora_bench.llm.parsing import Answer
    from lora_bench.llm.settings import LLM
    from lora_bench.llm.template import Messages


class Display(Live):
    """How many answers there are: a live bar in a terminal, a few lines elsewhere."""

    def __init__(self, console: Console, questions: int) -> None:
        super().__init__(console, questions, MofNCompleteColumn())

    def answered(self, answers: int) -> None:
        """So many questions have their answers now."""
        self.progress.update(self.task, completed=answers)
        if self.due(answers):
            self.console.print(sanitise(f"answers {answers:,}/{self.total:,}"))


def announce(console: Console, record: Mapping[str, Any], llm: LLM, cached: int) -> None:
    """What is about to be asked, and what the user should know about it."""
    prompt, choices = record["config"]["prompt"], record["choices"]
    asked = {name: rows for name, rows in record["data"]["rows"].items() if name not in ("train", "selection")}
    sizes = ", ".join(f"{name} {rows:,}" for name, rows in asked.items())
    lines = [
        f"{llm.model} at {llm.base_url}: {choices.get('prompt', 'prompt')}, {prompt['shots']} examples",
        f"{choices.get('data', 'data')}: {sizes}; {cached:,} answers are in the cache",
        *(f"note: {note}" for note in record["data"]["warnings"]),
    ]
    for line in lines:
        console.print(sanitise(line), soft_wrap=True)


def show_cost(console: Console, cost: Mapping[str, Any]) -> None:
    """What the answers cost, all of them and those of this run; nothing where they came from elsewhere."""
    if cost:
        parts = [f"{cost['requests']:,} requests", f"{cost['cached']:,} answers from the cache"]
        if cost["prompt_tokens"] is not None:
            read, written = (format_number(cost[f"{name}_tokens"]) for name in ("prompt", "completion"))
            parts.append(f"{read} tokens read, {written} written")
        if cost["money"] is not None:
            parts.append(f"money {cost['money']:.4g}")
        if cost["money_spent"] is not None:
            parts.append(f"{cost['money_spent']:.4g} of it now" if cost["money"] else f"now {cost['money_spent']:.4g}")
        console.print(sanitise(" · ".join([*parts, f"{cost['seconds']:.0f} s"])))


def show_request(
    console: Console, client: Client, questions: Mapping[str, Messages], known: Mapping[str, Answer]
) -> None:
    """The first prompt as it would be sent, how many requests there would be, and the most that they could cost."""
    for message in next(iter(questions.values())):
        console.print(sanitise(f"[{message['role']}]", style="bold"))
        for line in message["content"].split("\n"):
            console.print(sanitise(line), soft_wrap=True)
    missing = [messages for key, messages in questions.items() if key not in known]
    line = f"{len(missing):,} requests to {client.llm.base_url}; {len(known):,} answers are in the cache"
    console.print()
    console.print(sanitise(line), soft_wrap=True)
    if client.llm.money(0, 0) is not None and client.llm.longest_answer is not None:
        most = sum(client.budget.most(messages) for messages in missing)
        console.print(sanitise(f"at most {most:.4g} in money, a byte counted as a token: expect a quarter"))
