"""`python -m launch.replay`: one rank of a run on many, run alone on this machine and measured."""
