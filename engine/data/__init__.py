"""Text, tokens, batches, and the place where activations live between blocks."""
