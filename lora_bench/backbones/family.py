"""The declaration of a model family: the model types that it serves, its settings, and the backbone that it makes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lora_bench.config.schema import Model

if TYPE_CHECKING:
    from lora_bench.backbones.base import Backbone


@dataclass(frozen=True, kw_only=True)
class Family(Model, ABC):
    """A model family and its settings, the keys below `model`.

    A subclass adds fields for keys that other families do not have.
    """

    model_types = tuple[str, ...]()
    """The `model_type`s of config.json that the family serves; empty: every sequence classifier of transformers."""

    example = ""
    """A choice of the group `model` for remedies, if it has another name than the family."""

    @classmethod
    def serves(cls, model_type: str) -> bool:
        """Return whether weights of this model type can be loaded with the family."""
        return not cls.model_types or model_type in cls.model_types

    @classmethod
    def settings_of_type(cls, model_type: str | None) -> dict[str, Any]:
        """Return the family's own settings that follow from a model type alone, for adapters that name a backbone.

        Keys that are left out have to be given by the user.
        """
        return {}

    def network_class(self, config: Any) -> Any:
        """Return the transformers class that the weights are loaded into; None if transformers has none.

        Args:
            config: the Hugging Face config of the weights, of a model type that the family serves.
        """
        import transformers

        return transformers.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING.get(type(config), None)

    @abstractmethod
    def make_backbone(self, network: Any, tokenizer: Any, new_parameters: set[str], task: str) -> Backbone:
        """Return the backbone around a loaded network.

        Args:
            network: an instance of `network_class`, in fp32.
            tokenizer: its fast tokenizer.
            new_parameters: names of the parameters that the checkpoint did not hold.
            task: the task's short name, for families whose input contains it.
        """
