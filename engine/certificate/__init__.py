"""The work of a run with a planned router, known before it starts: counted from its text, its tables and its schedule
alone."""
