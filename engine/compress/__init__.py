"""A trained model made smaller: experts merged or pruned with their tables and moments, or kept as int8."""
