"""`python -m launch.report`: a page of a run, or of several."""
