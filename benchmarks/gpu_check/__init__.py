"""What minutes on a GPU can tell: `python -m benchmarks.gpu_check`."""
