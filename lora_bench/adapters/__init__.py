"""Adapters: the methods, the low-rank layer they share, packs of K adapters, and PEFT's file format."""
