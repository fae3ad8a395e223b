"""Runs a command that must not outlive the program that started it, however that one ends.

::

    python lifeline.py READ_END SECONDS COMMAND...

A process that is killed takes nobody along. So this forks a watcher, which waits for the end of a
pipe whose other end the starter alone holds, and then becomes the command: its process id, exit
code and output are the command's own. At the pipe's end the watcher asks the whole process group to
end, and after some seconds makes it. Imports nothing but what Python brings.
"""

from __future__ import annotations

import os
import signal
import sys
import time


def main() -> None:
    """Fork the watcher, and become the command."""
    pipe, seconds, command = int(sys.argv[1]), float(sys.argv[2]), sys.argv[3:]
    if os.fork() == 0:
        watch(pipe, seconds)
        os._exit(0)
    # Or the command itself, and its children, would hold on to it.
    os.close(pipe)
    try:
        os.execvp(command[0], command)
    except OSError as error:
        sys.exit(f"Cannot start '{command[0]}': {error.strerror}.")


def watch(pipe: int, seconds: float) -> None:
    """Wait until the starter is gone, then end the process group, this watcher with it.

    Args:
        pipe: Nothing is ever written to it; it ends with its last writer.
        seconds: Between asking and making.
    """
    # Whoever reads the command's output waits for its end, not for the watcher's.
    nowhere = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(nowhere, stream)
    # Those are for the command; the watcher itself goes with SIGKILL.
    for sign in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(sign, signal.SIG_IGN)
    while os.read(pipe, 1):
        pass
    os.killpg(0, signal.SIGTERM)
    time.sleep(seconds)
    os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    main()
