"""The list of sessions: where a page of it ends, and how titles are compared. The same in every store."""

import re
from typing import Final

_PAGE_TOKEN: Final = re.compile(r"([0-9a-f]{1,15})-([0-9a-f]{1,15})")


def page_token(updated_ms: int, number: int) -> str:
    """Where a page of sessions ended: at the session with this time and number. Opaque to clients."""
    return f"{updated_ms:x}-{number:x}"


def parse_page_token(token: str) -> tuple[int, int]:
    """The inverse of `page_token`. Raises ValueError for anything else."""
    match = _PAGE_TOKEN.fullmatch(token)
    if match is None:
        raise ValueError("not a page token")
    return int(match[1], 16), int(match[2], 16)


def fold_title(title: str | None) -> bytes:
    """A title, or a query for one, as they are compared: bytes, so that the database looks for exactly these."""
    return b"" if title is None else title.casefold().encode("utf-8", "surrogatepass")
