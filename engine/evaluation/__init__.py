"""Held-out bits, samples, what experts do, and baselines by counting."""
