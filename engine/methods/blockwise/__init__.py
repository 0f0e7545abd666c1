"""Methods that quantize one block after another."""
