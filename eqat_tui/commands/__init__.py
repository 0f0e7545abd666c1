"""The commands, by what they are for: each reads what was typed, asks the engine's light half, and prints.

Data goes to stdout and narration to stderr. Imports that cost time wait until a command needs them, so that
``eqat --help`` answers at once.
"""
