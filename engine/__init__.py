"""The training engine of eqat: one process per run, started as ``python -m engine RUN_DIR``."""

__version__ = "0.1.0"
