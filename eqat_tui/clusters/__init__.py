"""Runs that a cluster makes: what Slurm is asked for, and what its jobs do.

Slurm's own commands are called, and not submitit: a job of submitit's is a pickled Python function, whose
handler of the warning asks the function for a state, pickles that, requeues the job and leaves, all at once
and in one process. An engine is a program of its own that keeps its state in its run's directory; after a
warning it needs its next step, and then the time of a checkpoint. What is left of submitit is the text of a
script and a call of sbatch."""
