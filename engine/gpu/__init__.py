"""What makes a GPU wait less: steps that are recorded, passages that are compiled."""
