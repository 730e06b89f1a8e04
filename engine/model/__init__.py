"""Transformer-XL: its blocks, how it is built, and its FLOPs."""
