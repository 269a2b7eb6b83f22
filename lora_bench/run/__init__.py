"""One run while it happens: its settings and inputs, the recorder, the final evaluation; and a finished run, loaded."""
