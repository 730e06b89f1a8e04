"""Training: data, model, routing, optimization, checkpoints. Imports kernels, never launch."""
