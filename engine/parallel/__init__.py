"""Communication between ranks: the collectives that the engine uses, each with its bytes."""
