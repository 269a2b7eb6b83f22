"""From files, hub or generator to labelled texts, and from texts to batches of token ids."""
