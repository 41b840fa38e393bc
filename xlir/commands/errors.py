"""What the command line says and returns when a verb fails.

Errors that a user can mend are one line on stderr. The exit code is 2 for a command line that is
not usable, 130 after Ctrl-C, 143 after another signal that asked for the end, 141 when nobody reads
the output any more, and 1 for any other failure.
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
# How collectives (Gloo's between CPUs, NCCL's between GPUs) and JAX's coordination service word it.
_PEER_LOST = re.compile(
    r"\bGloo\b|\bNCCL\b|closed by peer|reset by peer|heartbeat|coordination service|Barrier failed"
)


class UsageError(Exception):
    """The command line is not usable."""


def report(error: BaseException) -> int:
    """Says what went wrong, as one line where a user can mend it; returns the exit code."""
    if isinstance(error, KeyboardInterrupt):
        return fail("interrupted; run the same command again to resume", code=130)
    # When an array's file can't be written, JAX and Orbax raise errors of their own kinds.
    if getattr(error, "errno", 0) == errno.ENOSPC or _NO_SPACE in str(error):
        line = _first_line(error)
        return fail(f"the disk is full: free some space and run again to resume. {line}")
    if isinstance(error, BrokenPipeError) and _reader_is_gone():
        # After `tag ... | head`: like other programs, this one ends without a message. What is
        # still buffered goes nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    if isinstance(error, OSError | ValueError):
        return fail(str(error))
    # Imported here because it imports JAX, which takes seconds.
    from xlir import partition
    from xlir.train import Stopped

    if isinstance(error, Stopped):
        fail(f"{error}; run the same command again to resume")
        # When the first process ends, JAX ends the others, some of which may still be saving.
        partition.wait_for_all()
        return 128 + signal.SIGTERM
    if _PEER_LOST.search(str(error)):
        return fail(
            "another process has failed or can't be reached; run the same command again to resume. "
            + _first_line(error)
        )
    # It is not raised again, because Python would wait for the other processes before it ends.
    traceback.print_exception(error)
    return 1


def report_unraisable(unraisable: "sys.UnraisableHookArgs") -> None:
    """Takes the place of `sys.unraisablehook`.

    Leaves out what reads and writes raise that were still waiting when a failed one had already
    closed their event loop; the failure itself is reported elsewhere.
    """
    if str(unraisable.exc_value) != "Event loop is closed":
        sys.__unraisablehook__(unraisable)


def fail(message: str, code: int = 1) -> int:
    """Prints one line on stderr and returns the exit code."""
    print(f"xlir: {message}", file=sys.stderr)
    return code


def leave(code: int) -> None:
    """Ends the program.

    After a failure it ends at once: what libraries do at exit would wait for processes that are
    gone, or try again to write what could not be written.
    """
    # A failing write has been reported before.
    with contextlib.suppress(OSError):
        sys.stdout.flush()
        sys.stderr.flush()
    if code:
        os._exit(code)


def _reader_is_gone() -> bool:
    """Whether nobody reads what is printed any more."""
    poll = select.poll()
    poll.register(sys.stdout.fileno(), select.POLLOUT)
    return any(event & select.POLLERR for _, event in poll.poll(0))


def _first_line(error: BaseException) -> str:
    return str(error).splitlines()[0]
