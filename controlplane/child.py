"""Start a command that cannot outlive its parent: `python -m controlplane.child SIGNAL PARENT_PID COMMAND...`."""

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1


def die_with_parent(signum: signal.Signals, parent: int) -> None:
    """Ask the kernel to send `signum` to this process when `parent` is gone; exec keeps the request. Linux only.

    On other systems nothing is asked for, and a killed supervisor leaves its children to be stopped by hand.
    """
    if not sys.platform.startswith("linux"):
        return
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_PDEATHSIG, int(signum), 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
    if os.getppid() != parent:  # it died before the request was made, and no signal will come
        sys.exit(f"The parent process {parent} is gone.")


def main() -> None:
    """Tie this process to its parent, then become the command."""
    name, parent, *command = sys.argv[1:]
    die_with_parent(signal.Signals[name], int(parent))
    os.execvp(command[0], command)  # noqa: S606


if __name__ == "__main__":
    main()
