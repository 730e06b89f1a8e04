"""Systems that the expert layer and its exchange are compared with."""
