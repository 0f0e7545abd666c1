"""What a stopped run goes on from: the store of tensors and facts, and when it is written."""
