"""A run of another machine, shown here: over the user's own ssh, and over nothing else."""
