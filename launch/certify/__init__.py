"""`python -m launch.certify`: what a run will do, written down before it starts."""
