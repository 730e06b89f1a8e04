"""Machines that a benchmark or a test makes on this one: simulated nodes and a Slurm."""
