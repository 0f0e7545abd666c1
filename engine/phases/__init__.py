"""The phases of a run; :mod:`engine.pipeline` puts them in order."""
