"""TensorFlow's TFRecord files and the tf.train.Example messages in them, without TensorFlow.

A record is: length (uint64), masked CRC-32C of the length, the bytes, masked CRC-32C of the bytes; little endian.
"""

from __future__ import annotations

import functools
import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from prepare.decode import Broken, why

HEAD, FOOT = struct.Struct("<QI"), struct.Struct("<I")
LANE = 512  # bytes of each of the lanes that a CRC is computed in side by side


def crc_table() -> np.ndarray:
    """Castagnoli's polynomial, reflected: what each byte makes of a register of zeros."""
    table = np.arange(256, dtype=np.uint32)
    for _ in range(8):
        table = np.where(table & 1, (table >> 1) ^ np.uint32(0x82F63B78), table >> 1)
    return table


TABLE = crc_table()
PLAIN = TABLE.tolist()


@functools.cache
def lane_shift() -> list[list[int]]:
    """What LANE zero bytes make of a register, for each value of each of its four bytes: a register is linear over XOR."""
    shifted = np.arange(256, dtype=np.uint32)[None] << np.array([[0], [8], [16], [24]], np.uint32)
    for _ in range(LANE):
        shifted = TABLE[shifted & 0xFF] ^ (shifted >> 8)
    return shifted.tolist()


def crc32c(data: bytes) -> int:
    """CRC-32C: what does not fill a lane byte by byte, then all lanes at once, joined one after another."""
    register, odd = 0xFFFFFFFF, len(data) % LANE
    for byte in data[:odd]:
        register = PLAIN[(register ^ byte) & 0xFF] ^ (register >> 8)
    columns = np.frombuffer(data, np.uint8, offset=odd).reshape(-1, LANE).T.astype(np.uint32)
    lanes = np.zeros(columns.shape[1], np.uint32)
    for column in columns:
        lanes = TABLE[(lanes ^ column) & 0xFF] ^ (lanes >> 8)
    a, b, c, d = lane_shift()
    for lane in lanes.tolist():
        register = (
            a[register & 255]
            ^ b[register >> 8 & 255]
            ^ c[register >> 16 & 255]
            ^ d[register >> 24]
            ^ lane
        )
    return register ^ 0xFFFFFFFF


def masked(data: bytes) -> int:
    crc = crc32c(data)
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def places(path: Path) -> Iterator[tuple[int, int]]:
    """(offset, size) of each record with its frame, without reading what is in them; raises Broken where it cannot go on."""
    try:
        end, offset = path.stat().st_size, 0
        with open(path, "rb") as file:
            while offset < end:
                file.seek(offset)
                head = file.read(HEAD.size)
                size = (
                    HEAD.size + HEAD.unpack(head)[0] + FOOT.size if len(head) == HEAD.size else end
                )
                if len(head) == HEAD.size and masked(head[:8]) != HEAD.unpack(head)[1]:
                    raise Broken(
                        f"not a TFRecord from byte {offset:,} on: the checksum of a length is wrong"
                    )
                if offset + size > end:
                    raise Broken(f"cut short: its last record begins at byte {offset:,} of {end:,}")
                yield offset, size
                offset += size
    except OSError as error:
        raise Broken(why(error)) from None


def payload(record: bytes) -> bytes:
    """What a record as places() gives it holds, once its checksum is right."""
    data, (crc,) = record[HEAD.size : -FOOT.size], FOOT.unpack(record[-FOOT.size :])
    if masked(data) != crc:
        raise Broken("damaged: its checksum is wrong")
    return data


# --------------------------------------------------------------------------------- protocol buffers
def varint(data: memoryview, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]  # an IndexError where the message ends too early
        at, value, shift = at + 1, value | (byte & 127) << shift, shift + 7
        if byte < 128:
            return value, at


def fields(data: memoryview) -> Iterator[tuple[int, memoryview]]:
    """(number, content) of the fields of a message that have a length; others are passed over."""
    at = 0
    while at < len(data):
        tag, at = varint(data, at)
        kind = tag & 7
        if kind == 0:
            _, at = varint(data, at)
            continue
        if kind not in (1, 2, 5):
            raise ValueError(f"field of wire type {kind}")
        size, at = varint(data, at) if kind == 2 else ({1: 8, 5: 4}[kind], at)
        if at + size > len(data):
            raise ValueError("a field goes beyond the end")
        if kind == 2:
            yield tag >> 3, data[at : at + size]
        at += size


def bytes_features(example: bytes) -> dict[str, bytes]:
    """{name: value} of the features of an Example that hold one string of bytes; raises Broken."""
    found = {}
    try:
        for features in (content for number, content in fields(memoryview(example)) if number == 1):
            for entry in (content for number, content in fields(features) if number == 1):
                pair = dict(
                    fields(entry)
                )  # 1: name, 2: the feature, whose field 1 is a list of bytes, whose field 1 they are
                values = [
                    value
                    for number, part in fields(pair.get(2, memoryview(b"")))
                    if number == 1
                    for inner, value in fields(part)
                    if inner == 1
                ]
                if len(values) == 1:
                    found[bytes(pair[1]).decode()] = bytes(values[0])
    except (ValueError, IndexError, KeyError) as error:
        raise Broken(f"not a tf.train.Example ({error})") from None
    return found
