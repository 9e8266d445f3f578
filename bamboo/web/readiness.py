"""Whether the store works, for everybody who asks, at the price of one probe a second."""

from math import inf
from typing import Final

import trio

from bamboo.bus.topic import Doorbell
from bamboo.store.base import Store

PROBE_S: Final = 1.0
"""The least time between the beginnings of two probes, and the greatest age of an answer: a probe is a turn of the
store's one writer, and anybody may ask without a token."""


class StoreProbe:
    """Asks the store, when somebody wants to know, and shares the answer with all who do. `run` is its one task."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._asked = Doorbell()
        self._probing = False
        self._healthy = False
        self._good_until = -inf
        self._answered = trio.Event()
        self._life = trio.CancelScope()

    def __repr__(self) -> str:
        return f"<StoreProbe {'healthy' if self._healthy else 'failing'} until {self._good_until:.1f}>"

    async def run(self) -> None:
        """Probe when asked, until `close`."""
        with self._life:
            while True:
                await self._asked.wait()
                await self._probe()
                await trio.sleep_until(self._good_until)

    def close(self) -> None:
        """End `run`. Whoever asks from now on waits in vain."""
        self._life.cancel()

    async def _probe(self) -> None:
        self._probing = True
        began = trio.current_time()
        self._healthy = await self._store.healthy()
        self._good_until = began + PROBE_S
        self._probing = False
        self._answered.set()
        self._answered = trio.Event()

    async def healthy(self) -> bool:
        """What the probe says that is under way, or that began less than PROBE_S ago, or, without such a one, the next.
        Waits for it as long as the store takes: the caller has the deadline."""
        await trio.lowlevel.checkpoint()
        if trio.current_time() >= self._good_until:
            if not self._probing:
                self._asked.ring()
            await self._answered.wait()
        return self._healthy
