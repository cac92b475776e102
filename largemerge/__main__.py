"""The `largemerge` command, and `python -m largemerge`: takes over the signals first, then imports everything else."""

from largemerge import interrupts

interrupts.install()

from largemerge.cli import main  # noqa: E402 (Ctrl-C while this is imported must end like any other)

if __name__ == "__main__":
    main()
