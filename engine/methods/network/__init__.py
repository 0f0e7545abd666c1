"""Methods that train all blocks together."""
