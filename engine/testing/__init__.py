"""What tests share: ranks, a tiny run, bytes of tensors."""
