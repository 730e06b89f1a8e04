"""`python -m launch.certify`: a run's rows, bytes, memory and time, written down before it starts."""
