"""The life of a NCCL communicator: made without blocking, polled to a deadline, split, finished or aborted.

Every communicator is non-blocking: a call that NCCL has not finished is polled
(``ncclCommGetAsyncError``) before anything else is asked of the communicator, so that a rank that
never comes costs a deadline and not the process. A communicator may be aborted from another thread
at any time; from then on every use raises.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from .._C import Nccl, NcclConfig, NcclError, NcclSlot
from ..errors import ConfigError, DeadlineError, GroupError

IN_PROGRESS = 7
NO_COLOR = -1
_SPINS = 50
_LONGEST_NAP = 1e-3


@dataclass(frozen=True, kw_only=True)
class CommConfig:
    """What a communicator may be told; None leaves the choice to NCCL."""

    min_ctas: int | None = None
    max_ctas: int | None = None
    """Thread blocks a kernel may use: lower it where several communicators must run at the same time."""
    cga_cluster_size: int | None = None
    split_share: bool = False
    """Splits share the parent's resources; their operations must then not overlap."""

    def native(self) -> NcclConfig:
        """Raises ConfigError for a value NCCL would refuse."""
        given = {
            name: value
            for name, value, least in (
                ("min_ctas", self.min_ctas, 1),
                ("max_ctas", self.max_ctas, 1),
                ("cga_cluster_size", self.cga_cluster_size, 0),
            )
            if value is not None and _at_least(name, value, least)
        }
        if None not in (self.min_ctas, self.max_ctas) and given["min_ctas"] > given["max_ctas"]:
            raise ConfigError(f"min_ctas={self.min_ctas} is larger than max_ctas={self.max_ctas}")
        return NcclConfig(blocking=0, split_share=int(self.split_share), **given)


def _at_least(name: str, value: int, least: int) -> bool:
    if value < least:
        raise ConfigError(f"{name} must be {least} or more, or None for NCCL's choice; got {value}")
    return True


class Communicator:
    """One NCCL communicator. Made by :meth:`create` and :meth:`split`; ``what`` names it in errors."""

    def __init__(self, library: Nccl, slot: NcclSlot, what: str, config: CommConfig) -> None:
        self.library = library
        self.what = what
        self._slot = slot
        self._config = config
        self._slots: list[NcclSlot] = []
        """Where NCCL may still write a handle; they live as long as this object."""
        self._registered: list[int] = []
        self._windows: list[int] = []
        self._lock = threading.Lock()
        self._gone = ""

    @classmethod
    def create(
        cls, library: Nccl, unique_id: bytes, size: int, rank: int, *, what: str, config: CommConfig, deadline: float
    ) -> Communicator:
        """Collective over ``size`` ranks that pass the same id; ready when it returns.

        Raises DeadlineError after ``deadline`` seconds, NcclError with NCCL's own words if it fails; the
        half-made communicator is aborted then.
        """
        slot = NcclSlot()
        made = cls(library, slot, what, config)
        library.comm_init(slot, size, unique_id, rank, config.native())
        made._settle_or_abort(deadline, f"initialising (rank {rank} of {size})")
        return made

    def split(self, color: int, key: int, *, what: str, deadline: float) -> Communicator | None:
        """Collective: the ranks of one ``color`` form a communicator in the order of ``key``; None for NO_COLOR.

        The new handle is known only when the parent has settled, so the parent is polled first.
        """
        slot = NcclSlot()
        self._slots.append(slot)
        native = self._config.native()
        self.issue(lambda comm: self.library.comm_split(slot, comm, color, key, native), deadline, f"splitting {what}")
        if color == NO_COLOR:
            return None
        if not slot.value:
            raise NcclError(f"{self.what}: NCCL made no communicator for the split {what} (color {color}, key {key})")
        made = Communicator(self.library, slot, what, self._config)
        made._settle_or_abort(deadline, f"split off {self.what}")
        return made

    @property
    def handle(self) -> int:
        """NCCL's own, for calls that are measured without anything around them; 0 before it is connected."""
        return self._slot.value

    # -- use -------------------------------------------------------------------------------------

    def issue(self, body: Callable[[int], bool], deadline: float, doing: str) -> None:
        """Run ``body(handle)``, which says whether NCCL is still at it, and wait until NCCL has accepted it."""
        with self._lock:
            self._refuse_if_gone(doing)
            going = body(self._slot.value)
        if going:
            self.settle(deadline, doing)

    def state(self) -> int:
        """NCCL's asynchronous state: 0, IN_PROGRESS, or an error; 0 for a communicator that is gone."""
        with self._lock:
            return 0 if self._gone else self.library.async_error(self._slot.value)

    def state_text(self, state: int) -> str:
        with self._lock:
            return self.library.error_text(state, 0 if self._gone else self._slot.value)

    def settle(self, deadline: float, doing: str) -> None:
        """Poll until NCCL has finished what it was asked."""
        end = time.monotonic() + deadline
        turn = 0
        while True:
            with self._lock:
                self._refuse_if_gone(doing)
                state = self.library.async_error(self._slot.value)
            if state == 0:
                return
            if state != IN_PROGRESS:
                raise NcclError(f"{self.what}, {doing}: {self.state_text(state)}")
            if time.monotonic() > end:
                raise DeadlineError(
                    f"{self.what}, {doing}: NCCL was still in progress after {deadline:g} s; a rank did not come, or "
                    "the ranks cannot reach each other (NCCL_DEBUG=INFO tells more)"
                )
            turn += 1
            time.sleep(0 if turn < _SPINS else min(_LONGEST_NAP, 1e-5 * turn))

    def _settle_or_abort(self, deadline: float, doing: str) -> None:
        try:
            self.settle(deadline, doing)
        except GroupError as error:
            self.abort(str(error))
            raise

    def _refuse_if_gone(self, doing: str) -> None:
        if self._gone:
            raise GroupError(f"{self.what}, {doing}: the communicator is gone: {self._gone}")

    # -- buffers ---------------------------------------------------------------------------------

    def register(self, address: int, nbytes: int) -> None:
        """Tell NCCL of a buffer that it will meet often (NCCL 2.19); undone by :meth:`finish`."""
        with self._lock:
            self._refuse_if_gone("registering a buffer")
            self._registered.append(self.library.comm_register(self._slot.value, address, nbytes))

    def window(self, address: int, nbytes: int, deadline: float, *, symmetric: bool = False) -> None:
        """Collective: register a buffer of NcclMemory on all ranks (NCCL 2.27), ``symmetric`` if at equal offsets."""
        slot = NcclSlot()
        self._slots.append(slot)
        self.issue(
            lambda comm: self.library.window_register(slot, comm, address, nbytes, int(symmetric)),
            deadline,
            "registering a window",
        )
        if slot.value:  # 0: this topology has no use for windows, which is no error
            self._windows.append(slot.value)

    # -- end -------------------------------------------------------------------------------------

    def abort(self, why: str) -> None:
        """End everything under way on this rank; callable from any thread, and more than once."""
        with self._lock:  # nobody holds it for long: calls are non-blocking
            if self._gone:
                return
            self._gone = why or "aborted"
        if self._slot.value:
            self.library.comm_abort(self._slot.value)

    def finish(self, deadline: float) -> None:
        """Flush, then release; a communicator that cannot be flushed in time is aborted, and that is raised."""
        with self._lock:
            if self._gone:
                return
            for window in self._windows:
                self.library.window_deregister(self._slot.value, window)
            for handle in self._registered:
                self.library.comm_deregister(self._slot.value, handle)
        try:
            self.issue(self.library.comm_finalize, deadline, "finishing")
        except GroupError as error:
            self.abort(str(error))
            raise
        with self._lock:
            self._gone = "closed"
        self.library.comm_destroy(self._slot.value)
