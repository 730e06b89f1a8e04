"""What the expert layer and its exchange are compared with."""
