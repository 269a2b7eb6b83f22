"""Any sequence classifier of transformers, and text-to-text decoder language models.

The networks are in `backbones/auto.py` and `backbones/causal.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lora_bench.backbones.family import Family
from lora_bench.errors import Code, UserError, require, require_one_of

if TYPE_CHECKING:
    from lora_bench.backbones.base import Backbone


@dataclass(frozen=True, kw_only=True)
class AutoFamily(Family):
    """Every model type that transformers has a sequence classifier for, and decoders with a language-model head."""

    example = "gemma"  # keys are missing for decoders only (`settings_of_type`)

    form: str
    """`classifier`: a new head. `text_to_text`: the scores that the language-model head of a decoder gives the label
    words after the text are the logits, no head."""
    template: str | None
    """One text for the text columns; {task} and {fields} (`question1: …`, a line for each column) are filled in. null:
    the tokenizer joins the two texts. Its words are never truncated."""
    chat_template: bool
    """Wrap that text as a user message in the tokenizer's chat template, and begin the reply."""
    label_words: list[str] | None
    """The words for the classes in `text_to_text`; null: `data.label_names`. Their first tokens are scored, or the
    whole words where two of them begin with the same token."""

    def __post_init__(self) -> None:
        """Check the settings.

        Raises:
            UserError: the form is unknown, the template has no {fields}, is missing where the form or the chat template
                needs it, or there are fewer than two label words.
        """
        super().__post_init__()
        require_one_of("form", self.form, ("classifier", "text_to_text"))
        template, words = self.template, self.label_words
        remedy = "Put {fields} where the text goes."
        has_fields = template is None or "{fields}" in template
        require(has_fields, "template", template, "has no {fields}", remedy, code=Code.INVALID_SYNTAX)
        reason = "is for decoder language models, which read one text, and model.template is null"
        remedy = "Choose a decoder such as model=gemma, whose template ends in a cue for the answer."
        has_text = template is not None or self.form == "classifier"
        require(has_text, "form", self.form, reason, remedy, code=Code.CONFLICT)
        reason = "wraps one text, and model.template is null"
        has_text = template is not None or not self.chat_template
        require(has_text, "chat_template", "true", reason, "Give a model.template.", code=Code.CONFLICT)
        require(words is None or len(words) >= 2, "label_words", words, "must be at least two words")

    @classmethod
    def settings_of_type(cls, model_type: str | None) -> dict[str, Any]:
        """Return the settings of a classifier; of a decoder none, which may have been trained with any template."""
        if model_type is not None and _is_decoder(model_type):
            return {}
        return {"form": "classifier", "template": None, "chat_template": False, "label_words": None}

    def network_class(self, config: Any) -> Any:
        """Return the sequence classifier of the model type, or its causal language model with `text_to_text`.

        Raises:
            UserError: with `text_to_text`, for an encoder, an encoder-decoder, or a type without a language model.
        """
        import transformers

        if self.form == "classifier":
            return super().network_class(config)
        if not _is_decoder(config.model_type) or getattr(config, "is_encoder_decoder", False):
            raise UserError(
                f"needs a decoder language model, and the weights are of the type {config.model_type}",
                key="model.form",
                value=self.form,
                remedy="Set model.form=classifier, or choose a decoder such as model=gemma.",
                code=Code.UNSUPPORTED,
            )
        return transformers.MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]

    def make_backbone(self, network: Any, tokenizer: Any, new_parameters: set[str], task: str) -> Backbone:
        """Return the backbone that `form` names, around a network of `network_class`."""
        from lora_bench.backbones.auto import Auto
        from lora_bench.backbones.causal import CausalTextToText
        from lora_bench.backbones.template import Template, wrap_in_chat

        template = None
        if self.template is not None:
            text = wrap_in_chat(self.template, tokenizer) if self.chat_template else self.template
            template = Template(text, task, separator="\n")
        if self.form == "classifier":
            return Auto(network, tokenizer, new_parameters, template)
        assert template is not None
        return CausalTextToText(network, tokenizer, new_parameters, template, self.label_words)


def _is_decoder(model_type: str) -> bool:
    """Return whether transformers has a causal language model of this type and none that fills masks.

    It lists many encoders, such as BERT, under both.
    """
    from transformers.models.auto import modeling_auto

    causal, masked = modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES
    return model_type in causal and model_type not in masked
