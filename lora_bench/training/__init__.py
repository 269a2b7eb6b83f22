"""The training step: loop, optimizer, precision."""
