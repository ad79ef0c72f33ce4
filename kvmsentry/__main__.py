"""`python -m kvmsentry`."""

from kvmsentry.cli.main import main

if __name__ == "__main__":
    main()
