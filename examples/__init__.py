"""Examples on foreroute's public protocols; each is a test, too (tests/examples/)."""
