"""Packed checkpoints for other libraries: one file a format, and the check that what was written is right."""
