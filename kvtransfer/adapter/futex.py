"""Waiting for a word of shared memory to change, in the kernel (Linux).

See futex(2). Words are 4 bytes, aligned, named by their address; processes that map the same memory meet
there.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform

_NUMBERS = {"x86_64": 202, "aarch64": 98, "riscv64": 98, "ppc64le": 221, "s390x": 238}
_NUMBER = _NUMBERS.get(platform.machine(), 0)
AVAILABLE = bool(_NUMBER)
"""Whether the call's number on this machine is known."""
_WAIT, _WAKE = 0, 1
_ALL = 2**31 - 1
_libc = ctypes.CDLL(None, use_errno=True)
_syscall = _libc.syscall
_syscall.restype = ctypes.c_long


class _Timespec(ctypes.Structure):
    _fields_ = (("seconds", ctypes.c_long), ("nanoseconds", ctypes.c_long))


def value(address: int) -> int:
    """The word now; the memory must be mapped."""
    return ctypes.c_uint32.from_address(address).value


def wait(address: int, seen: int, limit_s: float) -> None:
    """Sleep until a :func:`wake`, for ``limit_s`` at most; not at all if the word is not ``seen`` any more.

    May return early.

    Raises:
        OSError: there is no such word.
    """
    limit = _Timespec(int(limit_s), int(limit_s % 1 * 1e9))
    failed = _syscall(
        _NUMBER, ctypes.c_void_p(address), _WAIT, ctypes.c_uint32(seen), ctypes.byref(limit), None, 0
    )
    if failed and (number := ctypes.get_errno()) not in (errno.EAGAIN, errno.ETIMEDOUT, errno.EINTR):
        raise OSError(number, os.strerror(number))


def wake(address: int) -> None:
    """Wake all that wait for the word; from any process that maps it."""
    _syscall(_NUMBER, ctypes.c_void_p(address), _WAKE, _ALL, None, None, 0)
