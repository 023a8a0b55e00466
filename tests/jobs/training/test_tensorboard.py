"""Event files are read back with Protocol Buffers' own parser, and their checksums bit by bit."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

from jobs.training.tensorboard import EventFile


def event_class() -> Any:
    """The fields of TensorFlow's `Event` that are written here."""
    file = descriptor_pb2.FileDescriptorProto(name="event.proto", package="tb", syntax="proto3")
    fields = {
        "Image": [
            ("height", 1, 5, ""),
            ("width", 2, 5, ""),
            ("colorspace", 3, 5, ""),
            ("encoded", 4, 12, ""),
        ],
        "Value": [("tag", 1, 9, ""), ("simple_value", 2, 2, ""), ("image", 4, 11, ".tb.Image")],
        "Summary": [("value", 1, 11, ".tb.Value")],
        "SessionLog": [("status", 1, 5, "")],
        "Event": [
            ("wall_time", 1, 1, ""),
            ("step", 2, 3, ""),
            ("file_version", 3, 9, ""),
            ("summary", 5, 11, ".tb.Summary"),
            ("session_log", 7, 11, ".tb.SessionLog"),
        ],
    }
    for name, members in fields.items():
        message = file.message_type.add(name=name)
        for field, number, kind, of in members:
            label = 3 if name == "Summary" else 1
            message.field.add(name=field, number=number, type=kind, type_name=of or None, label=label)
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("tb.Event"))


def masked_crc(data: bytes) -> int:
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    crc ^= 0xFFFFFFFF
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def test_scalars_and_pictures_are_read_back(tmp_path: Path) -> None:
    assert masked_crc(b"123456789") == (((0xE3069283 >> 15) | (0xE3069283 << 17)) + 0xA282EAD8) & 0xFFFFFFFF
    file = EventFile(tmp_path, 300)
    file.scalars(301, {"train/loss": 0.25, "train/lr": 1e-5})
    file.picture(302, "samples", b"\xff\xd8jpeg", 40, 200)
    file.close()
    (path,) = tmp_path.glob("events.out.tfevents.*")
    data, events, kind = path.read_bytes(), [], event_class()
    while data:
        (length,) = struct.unpack("<Q", data[:8])
        assert struct.unpack("<I", data[8:12]) == (masked_crc(data[:8]),)
        content = data[12 : 12 + length]
        assert struct.unpack("<I", data[12 + length : 16 + length]) == (masked_crc(content),)
        events.append(kind.FromString(content))
        data = data[16 + length :]
    version, started, scalars, picture = events
    assert version.file_version == "brain.Event:2"
    assert (started.step, started.session_log.status) == (300, 1)
    assert scalars.step == 301
    assert {v.tag: round(v.simple_value, 8) for v in scalars.summary.value} == {
        "train/loss": 0.25,
        "train/lr": 1e-5,
    }
    (value,) = picture.summary.value
    assert (picture.step, value.tag, value.image.encoded) == (302, "samples", b"\xff\xd8jpeg")
    assert (value.image.height, value.image.width, value.image.colorspace) == (40, 200, 3)
    assert all(e.wall_time > 1e9 for e in events)
