"""What training is: data, model, routing, optimisation, checkpoints. Imports kernels, never launch."""
