"""Typed settings, and the only place that composes configuration with Hydra."""
