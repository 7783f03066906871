"""Where the command starts: `unlocked …` and `python -m unlocked …`."""

import gc
import os
import sys


def main() -> int:
    """Run the command line; a Ctrl-C that comes while torch is still being imported is a sentence, too."""
    gc.disable()  # an import leaves little garbage, and looking for it takes a tenth of the start
    try:
        from .cli import main as run
    except KeyboardInterrupt:
        print("error: Stopped before anything was trained.", file=sys.stderr)
        return 130
    finally:
        gc.enable()
    code = run()
    if (
        "RANK" in os.environ
    ):  # one of several processes: after a failure threads may sit in gloo, and abort a normal exit
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


if __name__ == "__main__":
    sys.exit(main())
