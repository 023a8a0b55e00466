"""The reader of frozen graphs: constants of a graph written here field by field, and damaged bytes."""

from __future__ import annotations

import struct

import numpy as np
import pytest

from pipeline.detect.frozen_graph import float_constants


def varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def message(number: int, content: bytes) -> bytes:
    return varint(number << 3 | 2) + varint(len(content)) + content


def number(field: int, value: int) -> bytes:
    return varint(field << 3) + varint(value)


def constant(name: str, values: np.ndarray, *, packed: bool = True, dtype: int = 1) -> bytes:
    shape = b"".join(message(2, number(1, size)) for size in values.shape)
    content = values.astype("<f4").tobytes()
    held = message(4, content) if packed else message(5, content)
    tensor = number(1, dtype) + message(2, shape) + held
    attribute = message(1, b"value") + message(2, message(8, tensor))
    other = message(1, b"dtype") + message(2, number(6, dtype))
    return message(
        1, message(1, name.encode()) + message(2, b"Const") + message(5, other) + message(5, attribute)
    )


VALUES = np.arange(300, dtype=np.float32).reshape(3, 100) / 7
GRAPH = (
    message(1, message(1, b"image") + message(2, b"Placeholder"))
    + constant("a/weights", VALUES)
    + constant("a/biases", VALUES[0], packed=False)
    + constant("whole", np.zeros(2, np.float32), dtype=3)
    + message(4, b"\x08\x15")  # versions
)


def test_float_constants_are_read_by_name_and_everything_else_is_left() -> None:
    constants = float_constants(GRAPH)
    assert set(constants) == {"a/weights", "a/biases"}
    assert np.array_equal(constants["a/weights"], VALUES)
    assert np.array_equal(constants["a/biases"], VALUES[0])


def test_one_value_fills_the_tensor() -> None:
    shape = message(2, message(2, number(1, 5)))
    held = varint(5 << 3 | 5) + struct.pack("<f", 2.5)
    attribute = message(1, b"value") + message(2, message(8, number(1, 1) + shape + held))
    node = message(1, b"five") + message(2, b"Const") + message(5, attribute)
    assert float_constants(message(1, node))["five"].tolist() == [2.5] * 5


@pytest.mark.parametrize("bad", [GRAPH[:-1], GRAPH[:500], b"\xff" * 20, b"no graph at all", b"\x0f\x01"])
def test_other_bytes_are_refused(bad: bytes) -> None:
    with pytest.raises(ValueError, match="not a TensorFlow frozen graph"):
        float_constants(bad)
