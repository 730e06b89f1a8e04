"""Bits per character of the quickstart with experts merged, pruned or as int8: `python -m benchmarks.bench_compress RUN`."""
