"""A user's model with expert layers on disk."""
