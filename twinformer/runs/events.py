"""Event files that TensorBoard reads, numbers only.

A file is a row of records: the length (8 bytes), its check sum, an ``Event`` in protocol buffers, its check sum
(TensorFlow's ``tfrecord`` format; ``event.proto`` and ``summary.proto``). Numbers by step need five fields of it, so
they are written here: the libraries that offer this import PyTorch when they find it, which is no business of a run
that trains the other twin.
"""

from __future__ import annotations

import os
import struct
import time
from collections.abc import Mapping
from pathlib import Path


class EventFile:
    """One event file of a directory. What earlier files say of steps after ``start`` is taken back."""

    def __init__(self, directory: Path, *, start: int = 0) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.file = directory / f"events.out.tfevents.{time.time_ns() // 10**9:010d}.{os.getpid()}.{start}"
        version = _text(3, "brain.Event:2")
        restart = _whole(2, start + 1) + _message(7, _whole(1, 1))  # session_log { status: START }
        self._waiting = _record(_now() + version) + _record(_now() + restart)

    def add(self, step: int, numbers: Mapping[str, float]) -> None:
        values = b"".join(_message(1, _text(1, tag) + _single(2, number)) for tag, number in numbers.items())
        self._waiting += _record(_now() + _whole(2, step) + _message(5, values))

    def flush(self) -> None:
        """Append what waits, all of it or nothing. Raises OSError."""
        append(self.file, self._waiting)
        self._waiting = b""


def append(file: Path, data: bytes) -> None:
    """Append to a file; where that fails half-way (a full disk), the file is left as it was, and OSError raised."""
    with file.open("ab") as stream:
        size = stream.tell()
        try:
            stream.write(data)
            stream.flush()
        except OSError:
            os.ftruncate(stream.fileno(), size)
            raise


def _record(data: bytes) -> bytes:
    length = struct.pack("<Q", len(data))
    return length + _masked(length) + data + _masked(data)


def _masked(data: bytes) -> bytes:
    """The check sum of a record: CRC-32C, rotated and moved so that check sums of check sums stay different."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc = _TABLE[(crc ^ byte) & 0xFF] ^ (crc >> 8)
    crc ^= 0xFFFFFFFF
    return struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)


def _table() -> tuple[int, ...]:
    """CRC-32C (Castagnoli), bits reversed: what each byte does."""
    found = []
    for byte in range(256):
        for _ in range(8):
            byte = byte >> 1 ^ (0x82F63B78 if byte & 1 else 0)
        found.append(byte)
    return tuple(found)


_TABLE = _table()


# protocol buffers: a field is its number and kind, then its value


def _now() -> bytes:
    return _key(1, 1) + struct.pack("<d", time.time())  # wall_time


def _whole(field: int, number: int) -> bytes:
    return _key(field, 0) + _varint(number)


def _single(field: int, number: float) -> bytes:
    return _key(field, 5) + struct.pack("<f", number)


def _text(field: int, text: str) -> bytes:
    return _message(field, text.encode())


def _message(field: int, data: bytes) -> bytes:
    return _key(field, 2) + _varint(len(data)) + data


def _key(field: int, kind: int) -> bytes:
    return _varint(field << 3 | kind)


def _varint(number: int) -> bytes:
    found = bytearray()
    while number > 0x7F:
        found.append(number & 0x7F | 0x80)
        number >>= 7
    found.append(number)
    return bytes(found)
