"""What a run holds in memory, at its peak and by moment."""
