"""`python -m support.job`, alone or under torchrun."""

import sys

if __name__ == "__main__":
    try:
        from support.job.command import main  # takes seconds, in which one may want to stop it

        sys.stdout.reconfigure(errors="backslashreplace")
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit("Stopped.")
