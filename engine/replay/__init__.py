"""One rank of a run, alone in a process: its true rows, kernels, shards and allocations, without the other ranks."""
