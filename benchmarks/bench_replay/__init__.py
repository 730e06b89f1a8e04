"""`python -m benchmarks.bench_replay`: a replayed rank against real ones over gloo."""
