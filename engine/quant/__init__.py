"""The integer grid: its mathematics, the layers that train on it, and the packed form it is stored in."""
