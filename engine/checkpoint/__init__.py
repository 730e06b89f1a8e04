"""The model on disk, for any number of ranks."""
