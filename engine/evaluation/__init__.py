"""How good a model is: perplexity, zero-shot tasks, and its own words after a prompt."""
