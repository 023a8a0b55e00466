"""TensorBoard event files with scalars and pictures, written without TensorBoard or TensorFlow.

A file is a sequence of records: the length (8 bytes, little-endian), its masked CRC-32C, an `Event` message
of Protocol Buffers, its masked CRC-32C.
"""

from __future__ import annotations

import os
import socket
import struct
import time
from collections.abc import Mapping
from pathlib import Path

_POLYNOMIAL = 0x82F63B78


def _crc_table() -> list[int]:
    table = []
    for value in range(256):
        for _ in range(8):
            value = (value >> 1) ^ (_POLYNOMIAL if value & 1 else 0)
        table.append(value)
    return table


_TABLE = _crc_table()


class EventFile:
    """A new event file in `folder`, for steps from `first_step` on.

    TensorBoard drops what earlier files of the folder have from that step on, so the curves of a resumed run
    have no double points.
    """

    def __init__(self, folder: Path, first_step: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        now = time.time()
        name = f"events.out.tfevents.{now:017.6f}.{socket.gethostname()}.{os.getpid()}"
        self._file = (folder / name).open("ab")
        self._write(_double(1, now) + _text(3, b"brain.Event:2"))
        # SessionLog with status START.
        self._write(_double(1, now) + _number(2, first_step) + _text(7, _number(1, 1)))

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Write values of a step by their names."""
        tags = (_text(1, _text(1, k.encode()) + _float(2, v)) for k, v in values.items())
        self._write(_double(1, time.time()) + _number(2, step) + _text(5, b"".join(tags)))

    def picture(self, step: int, name: str, encoded: bytes, height: int, width: int) -> None:
        """Write an encoded JPEG or PNG of three channels."""
        image = _number(1, height) + _number(2, width) + _number(3, 3) + _text(4, encoded)
        value = _text(1, _text(1, name.encode()) + _text(4, image))
        self._write(_double(1, time.time()) + _number(2, step) + _text(5, value))

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _write(self, event: bytes) -> None:
        length = struct.pack("<Q", len(event))
        self._file.write(length + _masked_crc(length) + event + _masked_crc(event))
        self._file.flush()


def _masked_crc(data: bytes) -> bytes:
    crc = 0xFFFFFFFF
    for byte in data:
        crc = (crc >> 8) ^ _TABLE[(crc ^ byte) & 0xFF]
    crc ^= 0xFFFFFFFF
    rotated = ((crc >> 15) | (crc << 17)) & 0xFFFFFFFF
    return struct.pack("<I", (rotated + 0xA282EAD8) & 0xFFFFFFFF)


# --- fields of Protocol Buffers: key (number and wire type), value ----------------------------------


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _number(field: int, value: int) -> bytes:
    return _varint(field << 3) + _varint(value)


def _double(field: int, value: float) -> bytes:
    return _varint(field << 3 | 1) + struct.pack("<d", value)


def _text(field: int, value: bytes) -> bytes:
    return _varint(field << 3 | 2) + _varint(len(value)) + value


def _float(field: int, value: float) -> bytes:
    return _varint(field << 3 | 5) + struct.pack("<f", value)
