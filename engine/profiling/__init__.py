"""A trace of a few steps."""
