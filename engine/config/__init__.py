"""What decides a run: one file a section with its fields, and the tables of stages and formats."""
