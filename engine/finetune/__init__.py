"""A classifier made from a trained run."""
