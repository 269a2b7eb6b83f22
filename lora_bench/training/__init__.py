"""Training of a pack: loop, objective, optimizer, checkpoints, distribution, memory and precision."""
