"""What a model is, from its config.json and the headers of its files alone."""
