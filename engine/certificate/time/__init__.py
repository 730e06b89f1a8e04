"""How long a step takes on a cluster, by a model of it."""
