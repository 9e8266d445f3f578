"""How a store tells those who look after it that there is something to do. The same in every store."""

import trio


class Tally:
    """Counts, and wakes the one task that waits for the count to be high enough."""

    def __init__(self) -> None:
        self._count = 0
        self._wanted = 0
        self._reached = trio.Event()

    def __repr__(self) -> str:
        return f"<Tally {self._count}>"

    def add(self, number: int) -> None:
        self._count += number
        if self._count >= self._wanted:
            self._reached.set()

    async def wait(self, number: int) -> None:
        """Return once `number` was added since this last returned. If cancelled, nothing is forgotten."""
        await trio.lowlevel.checkpoint()
        self._wanted = number
        while self._count < number:
            self._reached = trio.Event()
            await self._reached.wait()
        self._count = 0


class Upkeep:
    """What commits have done since somebody last looked: sessions `deleted`, and the bytes by which logs have
    `grown`.
    """

    def __init__(self) -> None:
        self.deleted = Tally()
        self.grown = Tally()
