"""A signal that ends KVM_RUN after a while, and is seen nowhere else.

A timer sends it to one thread, once a second. That thread blocks it from then on; only the vCPU's own signal
mask lets it through, so all it can do is make KVM_RUN return EINTR. No handler is needed, so it works in any
thread.

References
----------
KVM API documentation, 4.7 (``KVM_SET_SIGNAL_MASK``); timer_create(2), ``SIGEV_THREAD_ID``.
"""

import ctypes
import os
import signal
import struct
import threading
from typing import Final

SIGNAL: Final = signal.SIGRTMIN + 7
"""Arbitrary: one of the real-time signals that nothing here uses."""
SECONDS: Final = 1

_SIGEV_THREAD_ID = 4
_SIGEVENT = struct.Struct("<QiiI44x")
"""``struct sigevent``: value, signal, how to notify, thread."""
_ITIMERSPEC = struct.Struct("<4q")
"""``struct itimerspec``: interval and first expiry, each in seconds and nanoseconds."""
_CLOCK_MONOTONIC = 1


class Alarm:
    """Interrupts KVM_RUN of the creating thread once a second.

    Parameters
    ----------
    library : ctypes.CDLL
        The C library.
    """

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library
        self._timer = ctypes.c_void_p()
        # Never unblocked: another vCPU's timer may still be running, and the signal's default is to kill.
        signal.pthread_sigmask(signal.SIG_BLOCK, [SIGNAL])
        event = _SIGEVENT.pack(0, SIGNAL, _SIGEV_THREAD_ID, threading.get_native_id())
        times = _ITIMERSPEC.pack(SECONDS, 0, SECONDS, 0)
        for failed in (
            library.timer_create(_CLOCK_MONOTONIC, event, ctypes.byref(self._timer)),
            library.timer_settime(self._timer, 0, times, None),
        ):
            if failed:
                number = ctypes.get_errno()
                raise OSError(number, f"a timer for KVM_RUN: {os.strerror(number)}")

    @property
    def mask(self) -> bytes:
        """The signals to block during KVM_RUN: those that the thread blocks, without this one."""
        blocked = {int(number) for number in signal.pthread_sigmask(signal.SIG_BLOCK, [])} - {int(SIGNAL)}
        return sum(1 << number - 1 for number in blocked).to_bytes(8, "little")

    def take(self) -> None:
        """Take the signal if it is pending; otherwise the next KVM_RUN would return at once."""
        signal.sigtimedwait([SIGNAL], 0)

    def close(self) -> None:
        """Delete the timer."""
        self._library.timer_delete(self._timer)
        self.take()
