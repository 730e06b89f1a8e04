"""Mixture-of-Experts: routers, tables, k schedule, plan, exchange, experts, layer."""
