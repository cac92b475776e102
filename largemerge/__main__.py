"""`python -m largemerge`, the same as the `largemerge` command."""

from largemerge.cli import main

if __name__ == "__main__":
    main()
