"""What a run will need, and whether it fits: computed from shapes, before anything is loaded.

From the bottom up: ``estimate``, ``rates``, ``object_sizes``, ``export_sizes`` and ``memory_terms`` hold the
constants and counts that all share, ``machine`` says what there is, ``paper`` what others have reached.
``costs`` lists what is asked of a stage, and who answers. ``streams`` and ``passages`` say what passes
through the blocks and who is taught; ``training_costs``, ``block_training`` and ``network_training`` what
trainings have in common; ``stages`` has a file for each stage, with what is its own; ``phases`` the
preparation, the evaluations and the export, which belong to no stage. ``memory_model``, ``time_model``,
``disk_model``, ``recovery_model`` and ``fit`` are sums and loops over the stages of a run, and ``plan`` is
all of it as one answer.
"""
