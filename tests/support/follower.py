"""A client that follows a session, or a run: it may be slow, be cut, and come back with its cursor."""

from contextlib import suppress

import trio

from bamboo.bus.event_bus import EventBus
from bamboo.bus.subscription import Subscription
from bamboo.core.events import Delta, Event, Gap
from bamboo.core.types import Cursor, Epoch, RunId, SessionId
from bamboo.errors import StoreError
from tests.support.bus_world import Reader, never
from tests.support.mortal_store import Life, MortalStore
from tests.support.stores import Gate


class Follower(Reader):
    """A `Reader` that looks at every event as it comes: it is of the session that was asked for, and, unless it is a
    delta, durable.

    While `gate` is closed it takes nothing, and stays subscribed. A store that fails cuts it.
    """

    def __init__(
        self, mortal: MortalStore, session_id: SessionId, *, run_id: RunId | None = None, after: Cursor | None = None
    ) -> None:
        super().__init__(EventBus(mortal.store, window_bytes=0), session_id, run_id=run_id, until=never)
        self._mortal = mortal
        self.gate = Gate()
        self.wanted = True
        """It comes back in the next process, too."""
        self.subscription: Subscription | None = None
        self._begun = False
        self._scope: trio.CancelScope | None = None
        self.start(after)

    def __repr__(self) -> str:
        return f"<Follower of {self.run_id or self.session_id} at {self.cursor}>"

    async def follow_on(self, bus: EventBus) -> None:
        """Read on, from the last item on, until there is nothing more to come. May be cancelled, and called again; does
        nothing while it reads already."""
        if self.done or self._scope is not None:
            return
        try:
            with (
                trio.CancelScope() as self._scope,
                bus.subscribe(self.session_id, run_id=self.run_id) as self.subscription,
                suppress(StoreError),
            ):
                await self.begin(self.subscription)
                self._begun = True
                while not self.done:
                    await self.gate.pass_through()
                    items = await self.subscription.receive()
                    self.note([item for item in items if isinstance(item, Event | Gap)])
                    if not items:
                        self.done = True
        finally:
            self._scope = None
            self.subscription = None
            self._begun = False

    def leave(self) -> None:
        """It is cut, and does not come back by itself."""
        self.wanted = False
        if self._scope is not None:
            self._scope.cancel()

    async def catch_up(self, bus: EventBus) -> None:
        """Read on, unless it does already, until it has all that is there. Nothing may be written meanwhile, and the
        store works."""
        self.gate.open()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._insist, bus)
            while not self.done and not self._at_the_end:  # noqa: ASYNC110 - several things end it; time is virtual
                await trio.sleep(0.01)
            nursery.cancel_scope.cancel()
        self.done = True

    async def _insist(self, bus: EventBus) -> None:
        while not self.done:
            await self.follow_on(bus)
            await trio.sleep(0.01)

    @property
    def _at_the_end(self) -> bool:
        if self.subscription is None or not self._begun:
            return False
        life = self._mortal.life(self.session_id)
        return life is None or self.subscription.seq == life.head

    def check_all(self) -> None:
        """What it has is what there is, but for what it was told that it would not get."""
        life = None if self.cursor is None else self.life_of(self.cursor.epoch)
        if life is None:
            assert not self.kept, f"{self!r} has {self.seqs} of a session that never was"
            return
        if self.refused:
            self._forget_what_died(life)
        self.check(life.events)
        assert life.deleted or all(seq <= life.floor for seq in self.missing), "it misses what is there"

    def _forget_what_died(self, life: Life) -> None:
        """It came back to a session that was gone: nobody could tell it any more which deltas had died with a
        process."""
        while self.kept and self.kept[-1] not in life.events:
            assert isinstance(self.kept.pop().body, Delta)
        self.cursor = self.kept[-1].cursor if self.kept else Cursor(Epoch(""), self.first)

    def life_of(self, epoch: str) -> Life | None:
        """None: its writer was gone before it had stored anything."""
        lives = self._mortal.lives.get(self.session_id, [])
        return next((life for life in lives if epoch in life.epochs), None)

    def _note_event(self, event: Event) -> None:
        assert event.session_id == self.session_id, f"{event!r} for a reader of {self.session_id}"
        if not isinstance(event.body, Delta):
            life = self.life_of(event.epoch)
            assert life is not None, f"{event!r} was shown before there was a session"
            log = [*life.events, *life.handed_over] if life.handed_over else life.events
            assert event.seq <= len(log), f"{event!r} was shown before it was durable"
            assert log[event.seq - 1] == event, f"{event!r} was shown, {log[event.seq - 1]!r} is kept"
        super()._note_event(event)
