"""Reads the constants of a TensorFlow frozen graph, without TensorFlow.

A frozen graph is a serialized protobuf message `GraphDef`: a list of nodes, of which those of the operation
"Const" hold weights. Only what leads to these is decoded; everything else is skipped by its wire type.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from math import prod

import numpy as np
from numpy.typing import NDArray

# Field numbers of the messages on the way to a constant's values.
_GRAPH_NODE = 1
_NODE_NAME, _NODE_OP, _NODE_ATTR = 1, 2, 5
_ENTRY_KEY, _ENTRY_VALUE = 1, 2
_VALUE_TENSOR = 8
_TENSOR_DTYPE, _TENSOR_SHAPE, _TENSOR_CONTENT, _TENSOR_FLOATS = 1, 2, 4, 5
_SHAPE_DIM, _DIM_SIZE = 2, 1
_DT_FLOAT = 1

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5

_Field = tuple[int, int | memoryview]


def float_constants(graph: bytes) -> dict[str, NDArray[np.float32]]:
    """The float32 constants of a frozen graph, by the names of their nodes.

    Raises:
        ValueError: the bytes are not a serialized graph.
    """
    constants = {}
    try:
        for number, node in _fields(memoryview(graph)):
            if number == _GRAPH_NODE:
                found = _constant(_message(node))
                if found is not None:
                    constants[found[0]] = found[1]
    except (IndexError, struct.error, TypeError, UnicodeDecodeError) as error:
        raise ValueError(f"not a TensorFlow frozen graph: {error}") from error
    return constants


def _constant(node: memoryview) -> tuple[str, NDArray[np.float32]] | None:
    name, operation, tensor = "", "", None
    for number, content in _fields(node):
        if number == _NODE_NAME:
            name = str(_message(content), "utf-8")
        elif number == _NODE_OP:
            operation = str(_message(content), "utf-8")
        elif number == _NODE_ATTR:
            entry = dict(_fields(_message(content)))
            if bytes(_message(entry[_ENTRY_KEY])) == b"value":
                tensor = dict(_fields(_message(entry[_ENTRY_VALUE]))).get(_VALUE_TENSOR)
    if operation != "Const" or tensor is None:
        return None
    values = _tensor(_message(tensor))
    return None if values is None else (name, values)


def _tensor(tensor: memoryview) -> NDArray[np.float32] | None:
    shape: tuple[int, ...] = ()
    dtype, content = 0, b""
    for number, value in _fields(tensor):
        if number == _TENSOR_DTYPE and isinstance(value, int):
            dtype = value
        elif number == _TENSOR_SHAPE:
            shape = _shape(_message(value))
        elif number == _TENSOR_CONTENT:
            content = bytes(_message(value))
        elif number == _TENSOR_FLOATS:  # packed, or one value a field
            content += bytes(_message(value))
    if dtype != _DT_FLOAT:
        return None
    values = np.frombuffer(content, "<f4")
    if values.size == 1:  # one value stands for a tensor filled with it
        values = np.repeat(values, prod(shape))
    if values.size != prod(shape):
        raise ValueError(f"not a TensorFlow frozen graph: {values.size} values for a tensor of shape {shape}")
    return values.reshape(shape).astype(np.float32)


def _shape(shape: memoryview) -> tuple[int, ...]:
    sizes = []
    for number, dimension in _fields(shape):
        if number == _SHAPE_DIM:
            size = dict(_fields(_message(dimension))).get(_DIM_SIZE, 0)
            if not isinstance(size, int):
                raise TypeError("a dimension's size is not a number")
            sizes.append(size)
    return tuple(sizes)


def _fields(message: memoryview) -> Iterator[_Field]:
    """Number and content of each field: an int, or the bytes of a length-delimited or fixed-size field."""
    at = 0
    while at < len(message):
        key, at = _varint(message, at)
        number, wire = key >> 3, key & 7
        if wire == _VARINT:
            value, at = _varint(message, at)
            yield number, value
            continue
        if wire == _BYTES:
            size, at = _varint(message, at)
        elif wire in (_FIXED32, _FIXED64):
            size = 4 if wire == _FIXED32 else 8
        else:
            raise ValueError(f"not a TensorFlow frozen graph: wire type {wire}")
        if number == 0 or at + size > len(message):
            raise ValueError("not a TensorFlow frozen graph: a field reaches past its end")
        yield number, message[at : at + size]
        at += size


def _varint(message: memoryview, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = message[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7
        if shift > 63:
            raise ValueError("not a TensorFlow frozen graph: a number is too long")


def _message(content: int | memoryview) -> memoryview:
    if isinstance(content, int):
        raise TypeError("a number where a message should be")
    return content
