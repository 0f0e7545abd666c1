"""What a person touches: the terminal app and the command line.

Of the engine this package imports its light half (``engine.config``, ``run``, ``plan``, ``architecture``,
``system``) and never torch or transformers, so ``eqat --help`` answers at once and a run can be followed on a
machine that could not train it.
"""
