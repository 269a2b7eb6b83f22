"""Any Hugging Face sequence classifier, through its own forward pass: members share nothing but the weights."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from lora_bench.backbones.base import Backbone
from lora_bench.errors import UserError

if TYPE_CHECKING:
    from lora_bench.data.batching import Batch


class Auto(Backbone):
    """`AutoModelForSequenceClassification`; what lies outside its base model is the head."""

    can_be_cut = False
    query_value = r".*\.(query|value|query_proj|value_proj|q_proj|v_proj|q_lin|v_lin|q|v)"

    def __init__(self, network: nn.Module, tokenizer: Any, fresh: set[str]) -> None:
        base: Any = network.base_model
        lists = [name for name, module in network.named_modules() if isinstance(module, nn.ModuleList) and len(module)]
        if base is network or not lists:
            raise UserError(
                f"{type(network).__name__} does not show its layers and its head",
                key="model.family",
                value="auto",
                remedy="Take a model whose transformers class has a base model and a list of layers.",
            )
        self.layer_paths = [max(lists, key=lambda name: len(list(network.get_submodule(name).children())))]
        self.head_modules = [
            name
            for name, child in network.named_children()
            if child is not base and any(True for _ in child.parameters())
        ]
        super().__init__(network, tokenizer, fresh)

    @property
    def max_tokens(self) -> int | None:
        return getattr(self.network.config, "max_position_embeddings", None)

    def prefix(self, batch: Batch, depth: int) -> Tensor:
        return batch.input_ids  # (N, T): the whole network is suffix

    def encode(self, hidden: Tensor, batch: Batch, depth: int) -> Tensor:
        return hidden  # (N, T)

    def answer(self, encoded: Tensor, batch: Batch) -> Tensor:
        inputs = {"input_ids": encoded, "attention_mask": batch.attention_mask}
        if "token_type_ids" in self.tokenizer.model_input_names and batch.token_type_ids is not None:
            inputs["token_type_ids"] = batch.token_type_ids
        return self.network(**inputs).logits  # type: ignore[no-any-return]
