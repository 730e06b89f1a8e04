"""The memory that a run holds, at its peak and by moment."""
