"""prepare/tfrecord.py against a writer and known checksums; prepare/bair.py on both sources."""

import struct

import numpy as np
import pytest
from raw import png, walk

from prepare import bair, build, tfrecord
from prepare.decode import Broken
from shards import Shards

FRAMES = 6


def slow_crc32c(data):
    """Bit by bit, as the standard has it."""
    register = 0xFFFFFFFF
    for byte in data:
        register ^= byte
        for _ in range(8):
            register = register >> 1 ^ 0x82F63B78 * (register & 1)
    return register ^ 0xFFFFFFFF


def masked(data):
    # The test of crc32c compares the two.
    crc = slow_crc32c(data) if len(data) < 2000 else tfrecord.crc32c(data)
    return struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)


def field(number, content):
    size, length = b"", len(content)
    while length > 127:
        size, length = size + bytes([length & 127 | 128]), length >> 7
    return bytes([number << 3 | 2]) + size + bytes([length]) + content


def example(clip, camera="image_aux1"):
    """A record of BAIR: actions as floats beside the frames of two cameras, in no order."""
    features = [
        (f"{k}/{camera}/encoded", field(1, field(1, frame.tobytes())))
        for k, frame in enumerate(clip)
    ]
    features += [
        (f"{k}/image_main/encoded", field(1, field(1, b"\0" * 12288))) for k in range(len(clip))
    ]
    features += [
        (f"{k}/action", field(2, field(1, struct.pack("<4f", 1, 2, 3, 4))))
        for k in range(len(clip))
    ]
    entries = [
        field(1, field(1, name.encode()) + field(2, value))
        for name, value in sorted(features, reverse=True)
    ]
    return field(1, b"".join(entries))


def record(data):
    head = struct.pack("<Q", len(data))
    return head + masked(head) + data + masked(data)


def clip_of(k):
    return walk(64, 64)[k : k + FRAMES]


@pytest.fixture(scope="module")
def raw(tmp_path_factory):
    """Train files of three and two records, a test file of two; record k starts at frame k."""
    folder, k = tmp_path_factory.mktemp("raw"), 0
    for name, count in (
        ("train/traj_9_to_11", 3),
        ("train/traj_10_to_12", 2),
        ("test/traj_0_to_1", 2),
    ):
        path = folder / f"{name}.tfrecords"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"".join(record(example(clip_of(k + i))) for i in range(count)))
        k += count
    return folder


def make(source, out, *flags):
    return bair.make(
        bair.parse(["--source", str(source), "--out", str(out), "--workers", "1", *map(str, flags)])
    )


def contents(out, split):
    shards = Shards(out / split)
    return [shards.read(k, slice(None)) for k in range(len(shards))]


def test_crc32c():
    assert tfrecord.crc32c(b"123456789") == 0xE3069283 and tfrecord.crc32c(b"") == 0
    # Test vectors of RFC 3720.
    assert tfrecord.crc32c(bytes(32)) == 0x8A9136AA and tfrecord.crc32c(b"\xff" * 32) == 0x62A8AB43
    rng = np.random.default_rng(0)
    for size in (1, 511, 512, 513, 1024, 3000):
        data = rng.bytes(size)
        assert tfrecord.crc32c(data) == slow_crc32c(data)


def test_records_become_videos_in_order(raw, tmp_path):
    manifest = make(raw, tmp_path / "out")
    assert [entry["name"] for entry in manifest["sources"]] == [
        *(f"train/traj_9_to_11.tfrecords#{k}" for k in range(3)),
        *(f"train/traj_10_to_12.tfrecords#{k}" for k in range(2)),
        *(f"test/traj_0_to_1.tfrecords#{k}" for k in range(2)),
    ]
    for split, ks in (("train", range(5)), ("test", range(5, 7))):
        assert (
            np.stack(contents(tmp_path / "out", split)) == np.stack([clip_of(k) for k in ks])
        ).all()
    assert len({entry["sha256"] for entry in manifest["sources"]}) == 7 and {"val"} - set(
        manifest["splits"]
    )


def test_val_is_the_end_of_train_and_another_camera_and_size(raw, tmp_path):
    manifest = make(raw, tmp_path / "out", "--val", 2, "--image_size", 32, "--camera", "image_main")
    assert [entry["split"] for entry in manifest["sources"]] == ["train"] * 3 + ["val"] * 2 + [
        "test"
    ] * 2
    assert "the last 2 of train to val" in manifest["split_rule"]
    assert Shards(tmp_path / "out/val").shape == (32, 32, 3) and not np.any(
        contents(tmp_path / "out", "val")
    )


def test_damage_loses_one_record_and_truncation_the_rest(raw, tmp_path):
    source = tmp_path / "raw" / "train"
    source.mkdir(parents=True)
    whole = bytearray((raw / "train/traj_9_to_11.tfrecords").read_bytes())
    size = len(whole) // 3
    whole[size + 9000] ^= 1
    (source / "a.tfrecords").write_bytes(whole)
    (source / "b.tfrecords").write_bytes((raw / "train/traj_10_to_12.tfrecords").read_bytes()[:-5])
    (source / "c.tfrecords").write_bytes(b"not a record" * 9)
    (source / "d.tfrecords").write_bytes(
        record(example(clip_of(0)[:, :32])) + record(b"\x0a\xff\x01") + record(example([]))
    )
    args = bair.parse(
        ["--source", str(tmp_path / "raw"), "--out", str(tmp_path / "out"), "--workers", "1"]
    )
    manifest = bair.make(args)
    reasons = {entry["name"]: entry["skipped"] for entry in manifest["sources"] if entry["skipped"]}
    assert (
        "checksum is wrong" in reasons["train/a.tfrecords#1"]
        and "cut short" in reasons["train/b.tfrecords"]
    )
    assert (
        "checksum of a length" in reasons["train/c.tfrecords"]
        and "6,144 bytes" in reasons["train/d.tfrecords#0"]
    )
    assert (
        "not a tf.train.Example" in reasons["train/d.tfrecords#1"]
        and "no frames 0, 1" in reasons["train/d.tfrecords#2"]
    )
    assert (
        np.stack(contents(tmp_path / "out", "train")) == np.stack([clip_of(k) for k in (0, 2, 3)])
    ).all()
    assert len(reasons) == 6 and build.report(manifest, args) == 1


def test_a_length_beyond_the_message_is_reported():
    with pytest.raises(Broken, match="beyond the end"):
        tfrecord.bytes_features(b"\x0a\x7fabc")
    with pytest.raises(Broken, match="not a tf.train.Example"):
        tfrecord.bytes_features(b"\x0a")


def test_folders_of_frames(tmp_path):
    for split, k in (("train", 0), ("train", 1), ("test", 2)):
        folder = tmp_path / "raw" / split / "traj_0_to_255" / str(k)
        folder.mkdir(parents=True)
        for t, frame in enumerate(clip_of(k)):
            (folder / f"{t}.png").write_bytes(png(frame))
    manifest = make(tmp_path / "raw", tmp_path / "out")
    assert [entry["name"] for entry in manifest["sources"]] == [
        "train/traj_0_to_255/0",
        "train/traj_0_to_255/1",
        "test/traj_0_to_255/2",
    ]
    assert (contents(tmp_path / "out", "test")[0] == clip_of(2)).all()


def test_mistakes(raw, tmp_path, command):
    (tmp_path / "there").mkdir()
    for flags, said in (
        (
            ["--source", "there", "--out", "o"],
            "no train/*.tfrecords, and no folders of frames: there: no train/<video>",
        ),
        (["--source", raw / "train", "--out", "o"], "is not below a folder train, val or test"),
        (["--source", raw, "--out", "o", "--image_size", "256"], "frames of TFRecords are 64x64"),
        (["--source", raw, "--out", "o", "--val", "5"], "--val 5 leaves no training video"),
        (["--source", "none", "--out", "o"], "none: no such file"),
    ):
        code, err = command(tmp_path, "prepare/bair", *flags)
        assert code == 2 and said in err and len(err.splitlines()) == 1
