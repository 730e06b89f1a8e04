"""From token ids, or hidden states, to a Plan."""
