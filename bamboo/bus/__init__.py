"""The event bus: per session a window of the newest events and the subscriptions that read it. The log is the stream.

A subscription is a cursor and a doorbell. `Window.publish` is synchronous: it appends, rings the doorbells and never
waits. A reader takes everything after its cursor in one synchronous step from the window, or, where the window no
longer reaches back, from the store. There is no live mode and no catch-up mode, hence no hand-over; a slow reader costs
one cursor and affects nobody.

A store that fails is told the same way: the writer begins an outage, which rings, and each subscription hands it out
once, before the events that are there; what a subscription's own read meets is the same outage.

Ownership: a window belongs to the session's AgentRunner, which opens and closes it; a subscription belongs to whoever
opened it and is closed by leaving its `with` block (or by `close()`). A session is in the bus while it has either;
nothing is left behind. There is no way to publish to more than one session.
"""
