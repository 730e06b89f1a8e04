"""Helpers for tests of the programs."""
