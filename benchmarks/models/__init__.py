"""Measurements for the certificate's models of time and memory, and comparisons with them."""
