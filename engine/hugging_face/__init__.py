"""Models and training loops of Hugging Face on foreroute's expert layers (docs/hugging_face.md)."""
