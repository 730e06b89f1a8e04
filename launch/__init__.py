"""How processes start: the programs a person runs. The only place that knows Hydra."""
