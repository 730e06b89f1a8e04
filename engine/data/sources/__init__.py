"""Where a corpus comes from: files of text or of ids, read piece by piece."""
