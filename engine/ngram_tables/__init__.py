"""Tables of n-grams whose rows are shared out over all ranks and move as planned."""
