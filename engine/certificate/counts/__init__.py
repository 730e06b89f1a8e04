"""Rows and bytes of every step, counted from the ids alone."""
