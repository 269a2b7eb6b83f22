"""Names in PEFT's format: of tensors, and the class of transformers for a task type. Needs no torch."""

from __future__ import annotations

import re

OF_PEFT = re.compile(
    r"(?!.*\.variant\.).*\b(lora_[ABE](\.weight)?|lora_magnitude_vector|vera_[AB]|vera_lambda_[bd]|hira_[AB]|miss_block)"
)
"""The tensors of an adapter that PEFT has a name for."""

AUTO_CLASSES = {
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "TOKEN_CLS": "AutoModelForTokenClassification",
}
"""The transformers class that loads a backbone, by PEFT's task type."""
