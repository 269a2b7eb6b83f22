"""What a trained member is worth and what it cost: names and numbers; only the record writes them."""
