"""Runs and sweeps on disk: their folders, records, predictions and logs. Needs no torch."""
