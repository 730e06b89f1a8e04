"""Dense models of transformers as experts: how far outputs are apart, and what slices keep of a real model."""
