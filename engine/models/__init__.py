"""Where a model comes from and how it runs without ever being whole in memory.

``source`` finds a model (directory, hub id, GGUF file, random) and its tokenizer; ``weights`` and
``gguf`` read single tensors out of checkpoints; ``causal_lm`` runs the model one block at a time.
"""
