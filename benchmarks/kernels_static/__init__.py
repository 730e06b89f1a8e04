"""Every kernel compiled ahead of time for GPUs that are not here: `python -m benchmarks.kernels_static`."""
