"""Run as a script, with this library not imported: become a command that does not outlive the process that started it.

    python guard.py PARENT COMMAND …        PARENT: the process id of the starter

Why SIGKILL and not SIGTERM when the starter is gone: with it the rendezvous is gone, so to save together is not possible, and
a process that is stopped or waits for a dead neighbour would live on after a SIGTERM. The last checkpoint is complete anyway.

This is a process of its own before the command takes its place, as code between fork and exec is not safe beside threads.
"""

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1  # of Linux; elsewhere nothing is done

if __name__ == "__main__":
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != int(sys.argv[1]):  # it went before we asked
        os._exit(1)
    for number in (signal.SIGINT, signal.SIGTERM):  # blocked by the starter until here; see children.py
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        os.execvp(sys.argv[2], sys.argv[2:])
    except OSError as error:
        print(f"error: {sys.argv[2]} cannot be started: {error.strerror}.", file=sys.stderr, flush=True)
        os._exit(2)
