"""The low-rank linear and the axes on which LoRA variants differ: initialisation, allocation, quantisation."""
