"""A run: its settings and inputs, its record while it trains, its final evaluation; and a finished run, loaded."""
