"""Signals that ask a training run to end early, after it has saved its state."""

import contextlib
import os
import signal

import jax
from jax.experimental import multihost_utils

SIGNALS = (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)


class Termination(contextlib.AbstractContextManager):
    """Records whether a signal asked this run to end; all processes report it at the same step.

    SIGTERM is sent before a preemption, SIGHUP when a connection is lost, and SIGUSR1 when the time
    limit of a batch job is near. Signals that are ignored at the start, such as SIGHUP under
    `nohup`, stay ignored.

    Attributes:
      signal: the name of the signal; "SIGTERM" if another process received the signal.
    """

    def __enter__(self) -> "Termination":
        self._came, self._calls, self.signal = False, 0, signal.SIGTERM.name
        # If there may be several processes, JAX handles SIGTERM from the start. Other signals are
        # forwarded to it as SIGTERM.
        self._jax_listens = jax.distributed.is_initialized()
        self._ours = SIGNALS[1:] if self._jax_listens else SIGNALS
        return self

    def __exit__(self, *exc_info: object) -> None:
        # From now on, a signal ends the process at once: nothing is left to save.
        for number in self._ours:
            if signal.getsignal(number) == self._note:
                signal.signal(number, signal.SIG_DFL)

    def _note(self, number: int, _: object) -> None:
        self._came, self.signal = True, signal.Signals(number).name
        if self._jax_listens:
            os.kill(os.getpid(), signal.SIGTERM)

    def asked(self) -> bool:
        """Whether to end after this step; every process must call this after every step."""
        # JAX expects consecutive numbers.
        self._calls += 1
        # Signals are handled from the end of the first step. Before that, a signal ends the
        # process at once. There is nothing to save, and reading and compiling may take minutes.
        if self._calls == 1:
            for number in self._ours:
                if signal.getsignal(number) != signal.SIG_IGN:
                    signal.signal(number, self._note)
        if self._jax_listens:
            return multihost_utils.reached_preemption_sync_point(self._calls)
        return self._came
