"""The loop: a step, a run's state, and what is decided at its start."""
