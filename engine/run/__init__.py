"""The contract between the engine and whoever watches it: files in a run directory.

Nothing in this package imports torch, transformers or textual, so the command line and the app start
in milliseconds and can follow, list and stop runs on machines that have no GPU stack at all.
"""
