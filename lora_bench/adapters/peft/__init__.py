"""PEFT's file format: writing, reading, importing adapters that PEFT trained."""
