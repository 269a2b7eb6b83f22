"""Evaluation: metrics of a trained member or ensemble, and what its training cost. Writes no files."""
