"""What each stage costs: one file a stage, named by its row of the table (``Stage.costs``)."""
