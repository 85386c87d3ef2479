"""Memory that processes of one host share without a name: an anonymous file (memfd) that the others open through /proc.

Nothing is left of it when its last process has ended, however that ended. Needs neither torch nor a group.
"""

from __future__ import annotations

import os


def create(nbytes: int) -> int:
    """A new segment of ``nbytes``, zeros; its file descriptor. Raises OSError."""
    fd = os.memfd_create("triloom", os.MFD_CLOEXEC)
    try:
        os.ftruncate(fd, nbytes)
    except OSError:
        os.close(fd)
        raise
    return fd


def attach(pid: int, fd: int) -> int:
    """The segment that a living process has open as ``fd``; a descriptor of this process. Raises OSError."""
    return os.open(f"/proc/{pid}/fd/{fd}", os.O_RDWR | os.O_CLOEXEC)
