"""The algorithms, one a file. None of them knows about files or events."""
