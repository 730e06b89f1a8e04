"""Pre-trained encoders of transformers, their feed-forwards as experts, fine-tuned for a task (docs/encoders.md)."""
