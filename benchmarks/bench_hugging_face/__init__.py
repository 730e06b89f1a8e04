"""A Qwen3-MoE on foreroute's experts against transformers' own."""
