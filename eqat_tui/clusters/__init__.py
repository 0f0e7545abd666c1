"""Runs that a cluster makes: what Slurm is asked for, and what its jobs do."""
