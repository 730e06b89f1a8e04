"""The numbers of a run: names, timers, sums over ranks, means of a log line, files and W&B."""
