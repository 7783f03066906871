"""Where the command starts: `unlocked …` and `python -m unlocked …`."""

import sys


def main() -> int:
    """Run the command line; a Ctrl-C that comes while torch is still being imported is a sentence, too."""
    try:
        from .cli import main as run
    except KeyboardInterrupt:
        print("error: Stopped before anything was trained.", file=sys.stderr)
        return 130
    return run()


if __name__ == "__main__":
    sys.exit(main())
