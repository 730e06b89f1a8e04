"""From text to ids and back: a vocabulary for each way to cut text into symbols."""
