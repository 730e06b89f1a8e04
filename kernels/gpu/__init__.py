"""The operations on a GPU, in Triton."""
