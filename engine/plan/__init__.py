"""What a run will need, and whether it fits: computed from shapes, before anything is loaded.

estimate, object_sizes, export_sizes, rates, memory_terms    constants and counts that all share
costs                                                        what is asked of a stage, and who answers
streams, passages                                            what passes through blocks, and who is taught
training_costs, block_training, network_training             what trainings have in common
stages/                                                      one file a stage: what is its own
phases                                                       preparation, evaluations, the export
memory_model, time_model, disk_model, recovery_model, fit    sums and loops over the stages of a run
plan                                                         all of it, as one answer
"""
