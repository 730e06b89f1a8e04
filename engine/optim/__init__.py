"""Adam, DeepSpeed, and experts sharded over ranks."""

import os

import torch

# DeepSpeed looks for its accelerator when it is imported. DS_ACCELERATOR=cpu keeps a run off the GPUs.
os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
