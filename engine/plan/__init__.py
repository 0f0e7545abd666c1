"""What a run will need, and whether it fits: computed from shapes, before anything is loaded."""
