"""From a text to planned batches, ahead of the step."""
