"""Runs a command that must not outlive the process that started it, even if that is killed.

::

    python lifeline.py READ_END SECONDS COMMAND...

When a process is killed, its children keep running. This program therefore forks a watcher and then
executes the command in its own process, so that process ID, exit code and output are the command's.
The watcher waits for the end of a pipe whose write end only the parent holds. When the pipe closes,
it sends SIGTERM to the process group, and SIGKILL after SECONDS. Imports only the standard library.
"""

from __future__ import annotations

import os
import signal
import sys
import time


def main() -> None:
    """Fork the watcher, and execute the command."""
    pipe, seconds, command = int(sys.argv[1]), float(sys.argv[2]), sys.argv[3:]
    if os.fork() == 0:
        watch(pipe, seconds)
        os._exit(0)
    # Otherwise the command and its children would inherit it.
    os.close(pipe)
    try:
        os.execvp(command[0], command)
    except OSError as error:
        sys.exit(f"Cannot start '{command[0]}': {error.strerror}.")


def watch(pipe: int, seconds: float) -> None:
    """Wait until the parent is gone, then end the process group, including this watcher.

    Args:
        pipe: Read end of the pipe. Nothing is written to it; it closes with its last writer.
        seconds: Time from SIGTERM to SIGKILL.
    """
    # The command's output must end with the command, not with the watcher.
    devnull = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(devnull, stream)
    # These signals are for the command; the watcher is ended by SIGKILL.
    for signum in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(signum, signal.SIG_IGN)
    while os.read(pipe, 1):
        pass
    os.killpg(0, signal.SIGTERM)
    time.sleep(seconds)
    os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    main()
