"""`python -m launch.replay`."""

from foreroute.launch.replay.program import main

if __name__ == "__main__":
    main()
