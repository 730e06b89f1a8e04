"""The public operations: checks, autograd and fake registration, and a plain-loop reference of each."""
