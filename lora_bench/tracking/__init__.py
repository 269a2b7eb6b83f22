"""Tracking servers and viewers (TensorBoard, MLflow, Weights & Biases, Trackio): they receive the metrics of runs."""
