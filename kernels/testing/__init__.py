"""Helpers for tests of the operations: cases, an interpreter that guards memory, counts of bytes moved."""
