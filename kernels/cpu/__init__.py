"""The operations on a CPU."""
