"""The start of a program: options, ranks, signals, and errors of one line."""
