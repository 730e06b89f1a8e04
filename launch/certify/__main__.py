"""`python -m launch.certify`."""

from foreroute.launch.certify.program import main

if __name__ == "__main__":
    main()
