"""The training loop: a step, a run's state, and the choices at its start."""
