"""`python -m launch.study`."""

from foreroute.launch.study.program import main

if __name__ == "__main__":
    main()
