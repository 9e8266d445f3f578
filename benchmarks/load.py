"""A load: so many chats at once, so many tokens each, at such a pace.

Upstream, clients and harness agree on it through the model's name.
"""

import re
from dataclasses import dataclass
from typing import Final

_MODEL: Final = re.compile(r"bench-([1-9]\d{0,5})-(\d{1,3}(?:\.\d{1,6})?)")


@dataclass(frozen=True, slots=True)
class Load:
    """`delay_s` is the time between two tokens of one chat; 0 is as fast as the upstream can write."""

    name: str
    chats: int
    tokens: int
    delay_s: float

    @property
    def delivered(self) -> int:
        """Tokens of the whole load."""
        return self.chats * self.tokens

    @property
    def model(self) -> str:
        """The model to ask for, so that the fake upstream streams this load."""
        return f"bench-{self.tokens}-{self.delay_s:g}"

    @property
    def deadline_s(self) -> float:
        """No server that works takes longer, however slow the machine is."""
        return 60 + 5 * self.tokens * self.delay_s

    def __str__(self) -> str:
        pace = f"at {self.delay_s * 1000:g} ms per token" if self.delay_s else "at full speed"
        return f"{self.chats} chats × {self.tokens} tokens {pace}"


A: Final = Load("A", chats=50, tokens=200, delay_s=0)
B: Final = Load("B", chats=20, tokens=100, delay_s=0.02)
C: Final = Load("C", chats=200, tokens=100, delay_s=0.02)
LOADS: Final = {load.name: load for load in (A, B, C)}

QUICK_LOADS: Final = {
    "A": Load("A", chats=4, tokens=20, delay_s=0),
    "B": Load("B", chats=2, tokens=10, delay_s=0.005),
    "C": Load("C", chats=8, tokens=10, delay_s=0.005),
}
"""The same shapes, small: they show that the harness works and nothing else."""

WARM_UP: Final = Load("warm-up", chats=4, tokens=20, delay_s=0.001)
"""Before anything is measured: lazy imports, caches, the first connections to the upstream."""


def parse_model(model: str) -> tuple[int, float]:
    """(tokens, delay in seconds) of a model's name. Raises ValueError for any other name."""
    match = _MODEL.fullmatch(model)
    if match is None:
        raise ValueError("a model here is called bench-<tokens>-<delay in seconds>")
    return int(match[1]), float(match[2])


def token_text(index: int) -> str:
    """The text of a chat's token number `index`, from 0. No two are the same, so a lost or doubled one is seen."""
    return f" t{index}"
