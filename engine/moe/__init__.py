"""A Mixture-of-Experts layer driven by a Plan: exchange, experts, combine."""
