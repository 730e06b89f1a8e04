"""Models and training loops of Hugging Face on the expert layer; needs transformers (docs/hugging_face.md)."""
