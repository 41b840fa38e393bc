"""Signals that ask a training run to end early, after it has saved its state."""

import contextlib
import os
import signal

import jax
from jax.experimental import multihost_utils

SIGNALS = (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)


class Termination(contextlib.AbstractContextManager):
    """Notes whether a signal has asked this run to end; all processes learn it at the same step.

    SIGTERM comes before a preemption, SIGHUP when a connection is lost, SIGUSR1 when a batch
    system's time is nearly up. A signal that is ignored, as `nohup` does with SIGHUP, stays so.

    Attributes:
      signal: the name of the signal; "SIGTERM" where another process has received it.
    """

    def __enter__(self) -> "Termination":
        self._came, self._calls, self.signal = False, 0, signal.SIGTERM.name
        # Where there may be several processes, JAX itself listens to SIGTERM from the start. Other
        # signals are passed on to it as SIGTERM.
        self._jax_listens = jax.distributed.is_initialized()
        self._ours = SIGNALS[1:] if self._jax_listens else SIGNALS
        return self

    def __exit__(self, *exc_info: object) -> None:
        # A later signal ends the process at once, as there is nothing left to save.
        for number in self._ours:
            if signal.getsignal(number) == self._note:
                signal.signal(number, signal.SIG_DFL)

    def _note(self, number: int, _: object) -> None:
        self._came, self.signal = True, signal.Signals(number).name
        if self._jax_listens:
            os.kill(os.getpid(), signal.SIGTERM)

    def asked(self) -> bool:
        """Whether to end after this step; every process has to ask after every step."""
        # JAX expects the calls to be numbered through.
        self._calls += 1
        # Before the first step there is nothing to save, and reading its batch and compiling may
        # take minutes. Until then a signal ends the process at once.
        if self._calls == 1:
            for number in self._ours:
                if signal.getsignal(number) != signal.SIG_IGN:
                    signal.signal(number, self._note)
        if self._jax_listens:
            return multihost_utils.reached_preemption_sync_point(self._calls)
        return self._came
