"""Extensions: what installed distributions add to lora-bench through entry points."""
