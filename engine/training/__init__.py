"""The loop that every training shares, and one optimizer step of it."""
