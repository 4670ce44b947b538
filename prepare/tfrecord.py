"""Read TFRecord files and their tf.train.Example messages without TensorFlow.

A record consists of the length (uint64), the masked CRC-32C of the length, the content, and the
masked CRC-32C of the content, all little-endian.
"""

from __future__ import annotations

import functools
import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from prepare.decode import Broken, why

HEAD, FOOT = struct.Struct("<QI"), struct.Struct("<I")
LANE = 512  # bytes per lane; the CRCs of all lanes are computed in parallel


def crc_table() -> np.ndarray:
    """Return the byte table of CRC-32C (Castagnoli's polynomial, reflected)."""
    table = np.arange(256, dtype=np.uint32)
    for _ in range(8):
        table = np.where(table & 1, (table >> 1) ^ np.uint32(0x82F63B78), table >> 1)
    return table


TABLE = crc_table()
PLAIN = TABLE.tolist()


@functools.cache
def lane_shift() -> list[list[int]]:
    """Return tables that advance a register by LANE zero bytes, one table per byte of the register.

    The CRC register is linear over XOR, so the XOR of four table entries advances any register.
    """
    shifted = np.arange(256, dtype=np.uint32)[None] << np.array([[0], [8], [16], [24]], np.uint32)
    for _ in range(LANE):
        shifted = TABLE[shifted & 0xFF] ^ (shifted >> 8)
    return shifted.tolist()


def crc32c(data: bytes) -> int:
    """Compute CRC-32C: the first bytes one by one, then all lanes in parallel, then combine these.

    A lane is LANE consecutive bytes. A loop over all bytes in Python would be much slower.
    """
    register, odd = 0xFFFFFFFF, len(data) % LANE
    for byte in data[:odd]:
        register = PLAIN[(register ^ byte) & 0xFF] ^ (register >> 8)
    # Column k has byte k of every lane, so one step of the loop advances all lanes by one byte.
    columns = np.frombuffer(data, np.uint8, offset=odd).reshape(-1, LANE).T.astype(np.uint32)
    lanes = np.zeros(columns.shape[1], np.uint32)
    for column in columns:
        lanes = TABLE[(lanes ^ column) & 0xFF] ^ (lanes >> 8)
    a, b, c, d = lane_shift()
    # Join the lanes: shift the register past a lane of zeros, then XOR the register of that lane.
    for lane in lanes.tolist():
        register = (
            a[register & 255]
            ^ b[register >> 8 & 255]
            ^ c[register >> 16 & 255]
            ^ d[register >> 24]
            ^ lane
        )
    return register ^ 0xFFFFFFFF


def masked_crc(data: bytes) -> int:
    crc = crc32c(data)
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def find_records(path: Path) -> Iterator[tuple[int, int]]:
    """Yield (offset, size) of each record, length and checksums included; reads no contents.

    Raises Broken at the first damaged or incomplete record.
    """
    try:
        end, offset = path.stat().st_size, 0
        with open(path, "rb") as file:
            while offset < end:
                file.seek(offset)
                head = file.read(HEAD.size)
                # An incomplete head is reported as a record beyond the end of the file.
                size = end
                if len(head) == HEAD.size:
                    size = HEAD.size + HEAD.unpack(head)[0] + FOOT.size
                if len(head) == HEAD.size and masked_crc(head[:8]) != HEAD.unpack(head)[1]:
                    raise Broken(
                        f"not a TFRecord from byte {offset:,} on: the checksum of a length is wrong"
                    )
                if offset + size > end:
                    raise Broken(f"cut short: its last record begins at byte {offset:,} of {end:,}")
                yield offset, size
                offset += size
    except OSError as error:
        raise Broken(why(error)) from None


def read_payload(record: bytes) -> bytes:
    """Return the content of a record from find_records(); raises Broken on a wrong checksum."""
    data, (crc,) = record[HEAD.size : -FOOT.size], FOOT.unpack(record[-FOOT.size :])
    if masked_crc(data) != crc:
        raise Broken("damaged: its checksum is wrong")
    return data


# --------------------------------------------------------------------------------- protocol buffers
def read_varint(data: memoryview, at: int) -> tuple[int, int]:
    """Decode a variable-length integer; return its value and the position after it.

    Raises IndexError if the message ends too early.
    """
    value = shift = 0
    while True:
        byte = data[at]
        at, value, shift = at + 1, value | (byte & 127) << shift, shift + 7
        if byte < 128:
            return value, at


def fields(data: memoryview) -> Iterator[tuple[int, memoryview]]:
    """Yield (number, content) of the length-delimited fields of a message; skip other fields."""
    at = 0
    while at < len(data):
        tag, at = read_varint(data, at)
        kind = tag & 7
        if kind == 0:
            _, at = read_varint(data, at)
            continue
        if kind not in (1, 2, 5):
            raise ValueError(f"field of wire type {kind}")
        size, at = read_varint(data, at) if kind == 2 else ({1: 8, 5: 4}[kind], at)
        if at + size > len(data):
            raise ValueError("a field extends beyond the end")
        if kind == 2:
            yield tag >> 3, data[at : at + size]
        at += size


def first_fields(data: memoryview) -> Iterator[memoryview]:
    """Yield the content of the fields with number 1."""
    for number, content in fields(data):
        if number == 1:
            yield content


def bytes_features(example: bytes) -> dict[str, bytes]:
    """Return {name: value} of the features that have one byte string; raises Broken."""
    found = {}
    try:
        for features in first_fields(memoryview(example)):
            for entry in first_fields(features):
                # Field 1 is the name, field 2 the feature. Field 1 of a feature is a list of byte
                # strings, whose field 1 is a byte string.
                pair = dict(fields(entry))
                values = []
                for part in first_fields(pair.get(2, memoryview(b""))):
                    values += first_fields(part)
                if len(values) == 1:
                    found[bytes(pair[1]).decode()] = bytes(values[0])
    except (ValueError, IndexError, KeyError) as error:
        raise Broken(f"not a tf.train.Example ({error})") from None
    return found
