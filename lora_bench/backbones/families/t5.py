"""T5, T5 v1.1 (Flan-T5) and mT5, text to text or as an encoder with a head; the networks are in `backbones/t5.py`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lora_bench.backbones.family import Family
from lora_bench.errors import Code, require, require_one_of

if TYPE_CHECKING:
    from lora_bench.backbones.base import Backbone


@dataclass(frozen=True, kw_only=True)
class T5Family(Family):
    """T5 answers with a word (encoder and one decoder step), or classifies from its encoder."""

    model_types = ("t5", "mt5")

    form: str
    """`text_to_text`: the label words' scores are the logits, no head. `encoder`: mean-pooled encoder and a head."""
    template: str
    """The encoder's input; {task} and {fields} (`question1: … question2: …`) are filled in."""
    label_words: list[str] | None
    """The words for the classes; null: `data.label_names`. Their first tokens are scored, or the whole words where two
    of them begin with the same token."""

    def __post_init__(self) -> None:
        """Check the settings.

        Raises:
            UserError: the form is unknown, the template has no {fields}, or there are fewer than two label words.
        """
        super().__post_init__()
        require_one_of("form", self.form, ("text_to_text", "encoder"))
        require(
            "{fields}" in self.template,
            "template",
            self.template,
            "has no {fields}",
            "Put {fields} where the text goes.",
            code=Code.INVALID_SYNTAX,
        )
        words = self.label_words
        require(words is None or len(words) >= 2, "label_words", words, "must be at least two words")

    def network_class(self, config: Any) -> Any:
        """Return the class for `form`, whatever the config: that of generation, or of token classification."""
        import transformers

        if self.form == "text_to_text":
            return transformers.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING[type(config)]
        return transformers.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING[type(config)]

    def make_backbone(self, network: Any, tokenizer: Any, new_parameters: set[str], task: str) -> Backbone:
        """Return the backbone that `form` names, around a network of `network_class`."""
        from lora_bench.backbones.t5 import T5Encoder, T5TextToText

        if self.form == "encoder":
            return T5Encoder(network, tokenizer, new_parameters, self.template, task)
        return T5TextToText(network, tokenizer, new_parameters, self.template, task, self.label_words)
