"""A run that several processes compute together: the first one, which is the run's engine, and the others."""
