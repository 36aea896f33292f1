"""Runs a command that ends when its parent does, even when the parent is killed.

    python -m fedgraft_server.tied PARENT_PID COMMAND [ARGUMENT]...

Without it a killed `fedgraft server up` would leave a SuperLink behind that holds the port and
the database, and the next one could not start. Linux only; elsewhere the command just runs.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from typing import Final

_PR_SET_PDEATHSIG: Final = 1  # linux/prctl.h


def main(arguments: list[str]) -> None:
    """Replaces this process by the command."""
    parent, *command = arguments
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != int(parent):  # it died before the line above
            sys.exit(1)
    os.execv(command[0], command)  # noqa: S606 - the caller's own command, no shell


if __name__ == "__main__":
    main(sys.argv[1:])
