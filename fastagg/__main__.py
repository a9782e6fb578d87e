"""`python -m fastagg`: the command line."""

from fastagg.cli.app import main

if __name__ == "__main__":
    main()
