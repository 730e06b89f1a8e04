"""Helpers for tests: ranks, a tiny run, read-backs, bytes of tensors."""
