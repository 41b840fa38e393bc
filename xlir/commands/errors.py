"""The error messages and exit codes of the command line.

Errors that a user can fix are one line on stderr; other errors have a traceback. The exit code is 2
for an invalid command line, 130 after Ctrl-C, 143 after SIGTERM, SIGHUP or SIGUSR1, 141 if the
reader of the output has closed the pipe, and 1 for any other failure.
"""

import contextlib
import errno
import os
import re
import select
import signal
import sys
import traceback

_NO_SPACE = os.strerror(errno.ENOSPC)
# Words in the errors of collectives (Gloo on CPUs, NCCL on GPUs) and of JAX's coordination service
# when another process is lost.
_PEER_LOST = re.compile(
    r"\bGloo\b|\bNCCL\b|closed by peer|reset by peer|heartbeat|coordination service|Barrier failed"
)


class UsageError(Exception):
    """The command line is not valid."""


def report(error: BaseException) -> int:
    """Prints the error, as one line if a user can fix it; returns the exit code."""
    if isinstance(error, KeyboardInterrupt):
        return fail("interrupted; run the same command again to resume", code=130)
    # If the disk is full, JAX and Orbax raise errors of their own types.
    if getattr(error, "errno", 0) == errno.ENOSPC or _NO_SPACE in str(error):
        line = _first_line(error)
        return fail(f"the disk is full: free some space and run again to resume. {line}")
    if isinstance(error, BrokenPipeError) and _reader_is_gone():
        # For example after `tag ... | head`. Like other programs, end without a message; buffered
        # output is discarded.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    if isinstance(error, OSError | ValueError):
        return fail(str(error))
    # Imported here because it imports JAX, which takes seconds.
    from xlir import partition
    from xlir.train import Stopped

    if isinstance(error, Stopped):
        fail(f"{error}; run the same command again to resume")
        # When the first process ends, JAX ends the others, even those that are still saving.
        partition.wait_for_all()
        return 128 + signal.SIGTERM
    if _PEER_LOST.search(str(error)):
        return fail(
            "another process has failed or can't be reached; run the same command again to resume. "
            + _first_line(error)
        )
    # Raising the error again would make Python wait for the other processes before it ends.
    traceback.print_exception(error)
    return 1


def report_unraisable(unraisable: "sys.UnraisableHookArgs") -> None:
    """Replaces `sys.unraisablehook`.

    After a read or write has failed and closed the event loop, pending reads and writes raise
    "Event loop is closed". These errors are hidden; the failure itself is reported elsewhere.
    """
    if str(unraisable.exc_value) != "Event loop is closed":
        sys.__unraisablehook__(unraisable)


def fail(message: str, code: int = 1) -> int:
    """Prints one line on stderr and returns the exit code."""
    print(f"xlir: {message}", file=sys.stderr)
    return code


def leave(code: int) -> None:
    """Ends the program.

    After a failure it skips the libraries' exit handlers, which would wait for lost processes or
    retry failed writes.
    """
    # A failed write was already reported.
    with contextlib.suppress(OSError):
        sys.stdout.flush()
        sys.stderr.flush()
    if code:
        os._exit(code)


def _reader_is_gone() -> bool:
    """Whether the reader of stdout has closed the pipe."""
    poll = select.poll()
    poll.register(sys.stdout.fileno(), select.POLLOUT)
    return any(event & select.POLLERR for _, event in poll.poll(0))


def _first_line(error: BaseException) -> str:
    return str(error).splitlines()[0]
