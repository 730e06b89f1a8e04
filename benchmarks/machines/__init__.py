"""Machines that a benchmark or a test makes here: simulated nodes and a Slurm."""
