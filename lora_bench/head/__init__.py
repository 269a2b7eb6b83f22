"""Features of the classification head."""
