"""The table of fixed limits in `docs/websocket.md` says what the code does."""

import re
from pathlib import Path

import h11

from bamboo.core.types import MAX_JSON_DEPTH
from bamboo.gateway import connection, door, listener, outbox, requests
from bamboo.wire.frames import CommandFrame, ConnectFrame
from bamboo.wire.schemas import MAX_JSON_VALUES

PAGE = (Path(__file__).parents[3] / "docs" / "websocket.md").read_text(encoding="utf-8")


def test_the_fixed_limits_are_those_of_the_code() -> None:
    table = PAGE.partition("## Limits\n")[2].partition("\n## ")[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines() if line[:1] == "|"]
    shown = {what: (limit, above) for what, limit, above in rows[2:]}
    kib = 1024
    read = listener._RECEIVE_BYTES // kib
    each = f"{connection._PIECE_BYTES} bytes of `gateway.max_message_bytes`"

    assert {what: limit for what, (limit, _) in shown.items()} == {
        "head of the upgrade's request": f"about {h11._connection.DEFAULT_MAX_INCOMPLETE_EVENT_SIZE // kib} KiB",
        "connections on their way in": f"{door.MAX_HANDSHAKES}",
        "a frame before `connected`": f"{connection.MAX_CONNECT_BYTES // kib} KiB",
        f"pieces of one frame: fragments, or reads of {read} KiB": f"{connection._MAX_PIECES}, and one for each {each}",
        "frames in work": f"1, and {requests.MAX_STOPS} stops",
        "read ahead of the frame in work": (
            f"{connection.READ_AHEAD_BYTES // kib} KiB, and {listener._INBOUND_MESSAGES} frames"
        ),
        "answers that wait to be written": f"{outbox.ANSWERS_BYTES // kib} KiB",
        "bad frames in a row": f"{connection.MAX_BAD_FRAMES}",
        "`ref`": "256 characters, or an integer of at most 2⁵³",
        "`session_id`; other ids and names": "128; 256 characters",
        "`params`, `metadata`": f"{MAX_JSON_DEPTH} levels, {MAX_JSON_VALUES:,} values",
    }
    assert f"has had {door.FAIR_S:.0f} s" in shown["connections on their way in"][1]
    schema = ConnectFrame.model_json_schema()["properties"]
    assert re.search(r"'maxLength': 128\b", str(schema["session_id"]))
    reference = str(CommandFrame.model_json_schema()["properties"]["ref"])
    assert "'maxLength': 256" in reference
    assert f"'maximum': {2**53}" in reference
