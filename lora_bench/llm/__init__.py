"""A prompted language model as a baseline: any OpenAI-compatible server, zero- or few-shot."""
