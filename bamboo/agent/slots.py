"""How many runs are active at once, in all sessions: first come, first served among sessions, no task and no wait of
its own."""

from typing import Protocol

import trio


class SlotHolder(Protocol):
    def slot_granted(self) -> None:
        """A slot is the holder's now. Synchronous; it releases the slot when its run is over, or at once if it has
        none."""


class Slots:
    """`total` slots. A holder waits at most once at a time."""

    def __init__(self, total: int) -> None:
        self.total = total
        self.taken = 0
        self._waiting: dict[SlotHolder, None] = {}
        self._frozen = False
        self._idle = trio.Event()

    def __repr__(self) -> str:
        return f"<Slots {self.taken}/{self.total} taken, {len(self._waiting)} waiting>"

    @property
    def free(self) -> bool:
        """One can be taken at once. Nobody is overtaken: while somebody waits, none is free."""
        return not self._frozen and self.taken < self.total

    def try_take(self) -> bool:
        """Take a slot if one is free."""
        if not self.free:
            return False
        self.taken += 1
        return True

    def request(self, holder: SlotHolder) -> None:
        """`holder.slot_granted` is called, perhaps at once, when it is its turn."""
        self._waiting.setdefault(holder)
        self._grant()

    def withdraw(self, holder: SlotHolder) -> None:
        self._waiting.pop(holder, None)

    def release(self) -> None:
        self.taken -= 1
        self._grant()
        if self.taken == 0:
            self._idle.set()
            self._idle = trio.Event()

    async def wait_idle(self) -> None:
        """Return when no slot is taken."""
        await trio.lowlevel.checkpoint()
        while self.taken:
            await self._idle.wait()

    def freeze(self) -> None:
        """Grant no more: the server drains."""
        self._frozen = True

    def _grant(self) -> None:
        while self._waiting and self.free:
            holder = next(iter(self._waiting))
            del self._waiting[holder]
            self.taken += 1
            holder.slot_granted()
