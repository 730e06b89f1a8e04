"""SMoE-Dropout on a pre-trained encoder, arm by arm."""
