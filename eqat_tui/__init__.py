"""What a person touches: the command line today, the terminal app later.

Of the engine this package imports ``engine.run`` and nothing else, and never torch or transformers, so
``eqat --help`` answers at once and a run can be followed on a machine that could not train it.
"""
