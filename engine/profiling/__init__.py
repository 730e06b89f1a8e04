"""Traces of a few steps."""
