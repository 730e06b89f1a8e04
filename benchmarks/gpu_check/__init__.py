"""A check of minutes on a GPU: `python -m benchmarks.gpu_check`."""
