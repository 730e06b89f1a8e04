"""Measurements: each `python -m benchmarks.bench_NAME` prints a table and, as its last line, one JSON object."""
