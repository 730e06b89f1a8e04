"""How a program starts: options, ranks, signals, and errors of one line."""
