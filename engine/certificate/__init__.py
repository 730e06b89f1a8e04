"""What a run with a planned router will do, known before it starts: counted from its text, its tables and its schedule
alone."""
