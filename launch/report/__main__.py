"""`python -m launch.report`."""

from foreroute.launch.report.program import main

if __name__ == "__main__":
    main()
