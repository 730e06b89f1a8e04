"""`python -m launch.finetune`."""

from foreroute.launch.finetune.program import main

if __name__ == "__main__":
    main()
