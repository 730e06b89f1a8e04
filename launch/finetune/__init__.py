"""`python -m launch.finetune`: a trained run or a pre-trained encoder, fine-tuned for a task, evaluated at every k."""
