"""One blob of bytes <-> one Flower record: the only place where fedq's bytes meet Flower's types.

Flower sends each record, array and chunk of a message as a request of its own with about 0.8 kB of
headers, so a message carries one blob. Arrays are sent in chunks and config records are not: a
large blob on a slow uplink must be an array, a small one is cheaper as a config record.
"""

from __future__ import annotations

import os

# Both are read by Flower at import, and neither may phone home from a device or a test.
os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
os.environ.setdefault("FLWR_DISABLE_UPDATE_CHECK", "1")

from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict

from fedq.errors import DecodeError

KEY = "fedq"
STYPE = "fedq.blob"
ARRAY_FROM_BYTES = 1 << 16
#: Flower's code for a reply whose records could not be built: not one of Flower's own.
UNREADABLE = 1001
#: Codes for replies that a simulated fleet lost: after the deadline, beyond the number that was
#: asked for, and of devices that died or went away.
LATE, SURPLUS, DROPOUT, AWAY = range(1002, 1006)
#: What errors in the place of a reply count as; all others are errors.
KINDS = {
    UNREADABLE: "malformed",
    LATE: "late",
    SURPLUS: "surplus",
    DROPOUT: "dropout",
    AWAY: "away",
}


def pack(blob: bytes) -> RecordDict:
    """Return a message content that carries ``blob``; the inverse of :func:`unpack`."""
    if len(blob) < ARRAY_FROM_BYTES:
        return RecordDict({KEY: ConfigRecord({"blob": blob})})
    record, content = (
        ArrayRecord(),
        RecordDict(),
    )  # set item by item: half the time of Flower's init
    record["blob"] = Array("uint8", (len(blob),), STYPE, blob)
    content[KEY] = record
    return content


def unpack(content: RecordDict) -> bytes:
    """Return the blob of a message; :class:`DecodeError` if it carries none.

    >>> unpack(pack(b"abc"))
    b'abc'
    """
    record = content.get(KEY)
    if isinstance(record, ConfigRecord):
        blob = record.get("blob")
        if isinstance(blob, bytes):
            return blob
    elif isinstance(record, ArrayRecord):
        array = record.get("blob")
        if array is not None and array.stype == STYPE:
            return array.data
    raise DecodeError("the message carries no fedq blob")
