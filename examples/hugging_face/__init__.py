"""Models and training loops of Hugging Face with foreroute's expert layers (docs/hugging_face.md)."""
