"""Tracking servers and viewers (TensorBoard, MLflow) beside the run folder: they are told what the record is told."""
