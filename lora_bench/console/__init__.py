"""What a terminal shows, and what a process does with its streams and signals."""
