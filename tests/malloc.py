"""What glibc's malloc has given out to this process."""

from __future__ import annotations

import ctypes


class Malloc(ctypes.Structure):
    """glibc's `mallinfo2`, over all arenas."""

    uordblks: int
    hblkhd: int
    fordblks: int
    _NAMES = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"
    _fields_ = [(name, ctypes.c_size_t) for name in _NAMES.split()]

    @property
    def in_use(self) -> int:
        """Bytes given out, in arenas or pages of their own."""
        return self.uordblks + self.hblkhd


def malloc_state() -> Malloc:
    """Read the state of malloc."""
    libc = ctypes.CDLL(None)
    libc.mallinfo2.restype = Malloc
    state: Malloc = libc.mallinfo2()
    return state
