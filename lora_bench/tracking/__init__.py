"""Tracking servers and viewers (TensorBoard, MLflow): they receive the metrics that the run folder records."""
