"""`python -m launch.study`: arms side by side, with seeds and intervals."""
