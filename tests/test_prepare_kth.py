"""prepare/kth.py, and prepare/build.py: resuming, workers, broken files, a full disk."""

import errno
import json
import zipfile

import numpy as np
import pytest
from conftest import launch
from odd import encode
from PIL import Image
from raw import decoded, psnr, tree_bytes, walk, write_video, zipped

from prepare import build, kth
from runtime.console import UserError
from shards import Shards, ShardWriter

PERSONS, ACTIONS, SCENARIOS = (1, 2, 21), ("jogging", "walking"), (1, 3, 4)


def name_of(person, action, scenario):
    return f"person{person:02d}_{action}_d{scenario}_uncomp.avi"


@pytest.fixture(scope="module")
def raw(tmp_path_factory):
    """18 files of ten frames and more, in folders of their action."""
    folder, length = tmp_path_factory.mktemp("raw"), 10
    for action in ACTIONS:
        for person in PERSONS:
            for scenario in SCENARIOS:
                write_video(
                    folder / action / name_of(person, action, scenario), walk()[length : 2 * length]
                )
                length += 1
    return folder


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    recipe = build.Recipe
    monkeypatch.setattr(build, "Recipe", lambda *fields: recipe(*fields[:-1], per_shard=2))


def make(source, out, *flags):
    return kth.make(
        kth.parse(["--source", str(source), "--out", str(out), "--workers", "1", *map(str, flags)])
    )


def lengths(out):
    return {
        split: Shards(out / split).lengths.tolist()
        for split in build.SPLITS
        if (out / split).exists()
    }


def test_published_splits_cover_all_and_share_nobody():
    for rule in ("subjects", "official"):
        assert {kth.split_of(rule, p, 1) for p in range(1, 26)} == (
            {"train", "test"} | set(["val"] * (rule == "official"))
        )
        assert all(len({kth.split_of(rule, p, d) for d in range(1, 5)}) == 1 for p in range(1, 26))
    assert sum(map(len, kth.OFFICIAL.values())) == 25 == len(set().union(*kth.OFFICIAL.values()))
    assert [kth.split_of("demo", 7, d) for d in range(1, 5)] == ["train", "train", "val", "test"]


def test_content_order_split_and_manifest(raw, tmp_path):
    manifest = make(raw, tmp_path / "kth")
    names = sorted(path.relative_to(raw).as_posix() for path in raw.rglob("*.avi"))
    train = [name for name in names if "person21" not in name]
    by_split = {
        split: [e["name"] for e in manifest["sources"] if e["split"] == split]
        for split in ("train", "val", "test")
    }
    assert sorted(by_split["train"]) == train and not by_split["val"] and len(by_split["test"]) == 6
    for split in ("train", "test"):
        shards = Shards(tmp_path / "kth" / split)
        assert shards.fps == 25 and len(shards.paths) == len(by_split[split]) // 2
        for k, name in enumerate(by_split[split]):
            truth = decoded(raw / name, 64)
            assert psnr(shards.read(k, slice(None)), truth) > 45, name
    assert manifest == json.loads((tmp_path / "kth/manifest.json").read_text())
    assert manifest["splits"]["train"]["frames"] == sum(
        e["frames"] for e in manifest["sources"] if e["split"] == "train"
    )
    assert len({entry["sha256"] for entry in manifest["sources"]}) == 18 and not manifest["shared"]
    assert (
        "--split subjects" in manifest["command"]
        and "64x64" in manifest["resize_rule"]
        and manifest["versions"]["av"]
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["kth"]


def test_demo_split_warns_of_shared_persons_and_crops_the_centre(raw, tmp_path, capsys):
    manifest = make(
        raw,
        tmp_path / "kth",
        "--split",
        "demo",
        "--actions",
        "walking",
        "--crop",
        "center",
        "--image_size",
        32,
    )
    assert "every person is in train, val and test" in capsys.readouterr().out
    assert {split: part["videos"] for split, part in manifest["splits"].items()} == {
        "train": 3,
        "val": 3,
        "test": 3,
    }
    test = Shards(tmp_path / "kth/test")
    assert (
        psnr(
            test.read(1, slice(None)),
            decoded(raw / "walking" / name_of(2, "walking", 4), 32, (20, 0, 140, 120)),
        )
        > 45
    )
    assert "centre square" in manifest["resize_rule"]


def test_sequences_cut_the_labelled_runs(raw, tmp_path):
    text = "Frames of the sequences\n\nperson01_walking_d1\t\tframes\t1-4, 6-9\n"
    text += "person13_handclapping_d3  *missing*\n"
    text += "person01_walking_d3\tframes\t2-5, 7-400\n person01_walking_d4 frames 300-310\n"
    (tmp_path / "00sequences.txt").write_text(text)
    manifest = make(
        raw,
        tmp_path / "kth",
        "--sequences",
        tmp_path / "00sequences.txt",
        "--actions",
        "walking",
        "--limit",
        4,
    )
    assert lengths(tmp_path / "kth")["train"][:3] == [4, 4, 4]
    truth = decoded(raw / "walking" / name_of(1, "walking", 1), 64)
    assert psnr(Shards(tmp_path / "kth/train").read(1, slice(None)), truth[5:9]) > 45
    first, beyond, behind, unlabelled = manifest["sources"][:4]
    assert (
        first["videos"] == [4, 4]
        and "goes to 400" in beyond["note"]
        and beyond["videos"][1] == beyond["frames"] - 6
    )
    assert "all its runs" in behind["skipped"] and "no frames are labelled" in unlabelled["skipped"]
    with pytest.raises(UserError, match="not one line like"):
        make(raw, tmp_path / "again", "--sequences", raw / "walking" / name_of(1, "walking", 1))


def test_zips_are_read_without_unpacking_and_a_damaged_one_is_named(raw, tmp_path):
    source = tmp_path / "zips"
    source.mkdir()
    for action in ACTIONS:
        zipped(
            raw / action,
            source / f"{action}.zip",
            [path.name for path in sorted((raw / action).iterdir())],
        )
    (source / "boxing.zip").write_bytes((source / "walking.zip").read_bytes()[:5000])
    manifest = make(source, tmp_path / "zipped")
    make(raw, tmp_path / "plain")
    assert manifest["sources"][-1] == {
        **build.entry_of("boxing.zip"),
        "skipped": manifest["sources"][-1]["skipped"],
    }
    assert "not a readable zip" in manifest["sources"][-1]["skipped"]
    for split in ("train", "test"):
        assert (
            Shards(tmp_path / "zipped" / split).fingerprint()
            == Shards(tmp_path / "plain" / split).fingerprint()
        )
    assert manifest["sources"][0]["name"] == f"jogging.zip/inner/{name_of(1, 'jogging', 1)}"
    with zipfile.ZipFile(source / "walking.zip") as archive:
        at = archive.getinfo(f"inner/{name_of(1, 'walking', 3)}").header_offset + 2000
    content = bytearray((source / "walking.zip").read_bytes())
    content[at] ^= 255
    (source / "walking.zip").write_bytes(content)
    manifest = make(source, tmp_path / "flipped")
    assert [e["name"].rpartition("/")[2] for e in manifest["sources"] if e["skipped"]] == [
        name_of(1, "walking", 3),
        "boxing.zip",
    ]


def test_broken_files_are_named_skipped_and_counted(raw, tmp_path, capsys):
    source = tmp_path / "raw"
    source.mkdir()
    for k, path in enumerate(sorted((raw / "walking").iterdir())):
        whole = path.read_bytes()
        (source / path.name).write_bytes(
            {1: b"", 2: whole[: len(whole) // 3], 3: b"no video" * 500}.get(k, whole)
        )
    args = kth.parse(["--source", str(source), "--out", str(tmp_path / "kth"), "--workers", "1"])
    manifest = kth.make(args)
    assert build.report(manifest, args) == 1
    said = capsys.readouterr()
    entries = manifest["sources"]
    broken = [name_of(1, "walking", 3), name_of(2, "walking", 1)]
    # The third file is cut after a third; the frames before the cut are kept.
    (cut,) = [entry for entry in entries if entry["damage"]]
    assert cut["frames"] > 1
    assert manifest["skipped"] == 2
    assert [entry["name"] for entry in entries if entry["skipped"]] == broken
    for name in (*broken, cut["name"]):
        assert name in said.err and name in said.out
    assert "590 of 599 files of KTH are missing, the first is person01_boxing_d1" in said.out
    args.allow_skips = True
    assert build.report(manifest, args) == 0
    assert [n for part in lengths(tmp_path / "kth").values() for n in part] == [
        entry["frames"] for entry in manifest["sources"] if not entry["skipped"]
    ]


def truncate(path, share=0.75):
    """Cut the end off a file."""
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])


@pytest.mark.parametrize("name, code", [(name_of(1, "boxing", 4), 0), (name_of(1, "boxing", 3), 1)])
def test_the_runs_before_the_break_of_a_truncated_file_are_kept(tmp_path, capsys, name, code):
    (tmp_path / "raw").mkdir()
    # A long film of key frames every twelve frames, as MPEG-4 in AVI.
    film = np.concatenate([walk()[:60]] * 3)
    encode(tmp_path / "raw" / name, film, "mpeg4", options={"g": "12"})
    truncate(tmp_path / "raw" / name)
    sequences = tmp_path / "00sequences.txt"
    run = name.removesuffix("_uncomp.avi")
    sequences.write_text(f"{run}\t\tframes\t1-40, 41-80, 81-170, 171-180\n")
    for flags in ((), ("--sequences", sequences)):
        args = kth.parse(
            [
                *("--source", str(tmp_path / "raw"), "--out", str(tmp_path / f"kth{len(flags)}")),
                *("--workers", "1", *map(str, flags)),
            ]
        )
        manifest = kth.make(args)
        assert build.report(manifest, args) == code
        printed = capsys.readouterr()
        assert name in printed.err
        assert (name in printed.out) == bool(code)
        (entry,) = manifest["sources"]
        assert bool(entry["damage"]) == bool(code)
        assert not entry["skipped"] and (code or "ends early" in entry["note"])
        kept = lengths(tmp_path / f"kth{len(flags)}")["train"]
        if flags:
            assert kept[:2] == [40, 40] and 0 < kept[2] < 90 and len(kept) == 3
        else:
            assert len(kept) == 1 and 80 < kept[0] < 170
    got = Shards(tmp_path / "kth2/train").read(1, slice(0, 20))
    want = [Image.fromarray(frame).resize((64, 64), Image.BICUBIC) for frame in film[40:60]]
    assert psnr(got, np.stack([np.asarray(image) for image in want])) > 25


def test_names_in_upper_case_are_read(tmp_path, raw):
    source = tmp_path / "raw"
    source.mkdir()
    content = (raw / "walking" / name_of(1, "walking", 1)).read_bytes()
    other = (raw / "walking" / name_of(2, "walking", 1)).read_bytes()
    (source / "person01_walking_d1_uncomp.AVI").write_bytes(content)
    (source / "Person02_Walking_d1_uncomp.avi").write_bytes(other)
    sequences = tmp_path / "s.txt"
    sequences.write_text("Person01_walking_d1 frames 1-5\nperson02_walking_d1 frames 2-4\n")
    make(source, tmp_path / "kth", "--sequences", sequences)
    assert lengths(tmp_path / "kth") == {"train": [5, 3]}


def test_one_name_twice_is_an_error(tmp_path, raw, command):
    content = (raw / "walking" / name_of(1, "walking", 1)).read_bytes()
    for folder, name in (("a", name_of(1, "walking", 1)), ("b", name_of(1, "walking", 1).upper())):
        (tmp_path / "raw" / folder).mkdir(parents=True)
        (tmp_path / "raw" / folder / name).write_bytes(content)
    code, error = command(tmp_path, "prepare/kth", "--source", "raw", "--out", "kth")
    assert code == 2 and "have the same name" in error
    assert "a/person01" in error and "b/PERSON01" in error


def test_one_name_twice_in_sequences_is_an_error(tmp_path, raw, command):
    (tmp_path / "s.txt").write_text(
        "person01_walking_d1 frames 1-5, 6-9\nperson01_walking_d1 frames 1-3\n"
    )
    flags = ("--source", raw, "--out", "kth", "--sequences", "s.txt")
    code, error = command(tmp_path, "prepare/kth", *flags)
    assert code == 2 and "s.txt: person01_walking_d1 has two lines" in error


def test_all_broken_is_a_mistake_and_leaves_nothing(tmp_path):
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw" / name_of(1, "walking", 1)).write_bytes(b"no")
    with pytest.raises(UserError, match="not one video in 1 sources; the first: "):
        make(tmp_path / "raw", tmp_path / "kth")
    assert [path.name for path in tmp_path.iterdir()] == ["raw"]


def test_an_interrupted_run_resumes_and_repeats_no_shard(raw, tmp_path, monkeypatch, capsys):
    whole, out = tmp_path / "a" / "kth", tmp_path / "b" / "kth"
    make(raw, whole)
    read, seen = kth.read, []

    def stop(source, args):
        seen.append(source.name)
        if len(seen) == 8:
            raise KeyboardInterrupt
        return read(source, args)

    monkeypatch.setattr(kth, "read", stop)
    with pytest.raises(KeyboardInterrupt):
        make(raw, out)
    assert not out.exists() and [path.name for path in out.parent.iterdir()] == ["kth.partial"]
    assert not list(out.parent.rglob("*.tmp")) and len(list(out.parent.rglob("*.hdf5"))) == 3
    manifest = make(raw, out)
    assert (
        len(seen) == 8 + 12 and "6 of 18 source videos are done already" in capsys.readouterr().out
    )
    assert {name: Shards(whole / name).fingerprint() for name in ("train", "test")} == {
        name: Shards(out / name).fingerprint() for name in ("train", "test")
    }
    assert [entry["name"] for entry in manifest["sources"]] == list(dict.fromkeys(seen))
    assert [path.name for path in out.parent.iterdir()] == ["kth"]


def test_shards_of_a_run_with_other_flags_are_written_again(raw, tmp_path, monkeypatch):
    finish = build.finish
    monkeypatch.setattr(build, "finish", lambda *_: None)
    make(raw, tmp_path / "kth")
    monkeypatch.setattr(build, "finish", finish)
    make(raw, tmp_path / "kth", "--limit", 3, "--image_size", 16)
    assert lengths(tmp_path / "kth")["train"] == [10, 11, 12] and Shards(
        tmp_path / "kth/train"
    ).shape == (16, 16, 3)
    assert len(tree_bytes(tmp_path / "kth")) == 4


def test_a_full_disk_leaves_nothing_half_written(raw, tmp_path, monkeypatch, command):
    write, count = ShardWriter.add, []

    def fill(self, video):
        count.append(1)
        if len(count) == 4:
            raise OSError(errno.ENOSPC, "Can't synchronously write data")
        write(self, video)

    monkeypatch.setattr(ShardWriter, "add", fill)
    flags = "prepare/kth", "--source", raw, "--out", tmp_path / "kth", "--workers", 1
    code, err = command(tmp_path, *flags)
    assert (
        code == 1
        and err.splitlines()[-1]
        == f"error: {tmp_path}/kth.partial cannot be written: No space left on device"
    )
    left = sorted(
        path.relative_to(tmp_path / "kth.partial").as_posix()
        for path in tmp_path.rglob("*")
        if path.is_file()
    )
    assert left == ["notes/train_0001.json", "out/train/shard_0001.hdf5"]
    assert command(tmp_path, *flags)[0] == 0 and len(count) == 4 + 16


def test_the_output_does_not_depend_on_the_number_of_workers(raw, tmp_path):
    for k, workers in enumerate(("1", "2")):
        (tmp_path / str(k)).mkdir()
        done = launch(
            tmp_path / str(k),
            "-m",
            "prepare.kth",
            "--source",
            str(raw),
            "--out",
            "kth",
            "--actions",
            "walking",
            "--workers",
            workers,
            DRIFTCAST_QUIET="1",
        )
        assert (
            "9 source videos" in done.stdout
            and "6 videos" in done.stdout
            and "skipped: 0" in done.stdout
        )
    one, two = (tree_bytes(tmp_path / str(k) / "kth") for k in range(2))
    assert one == two and sorted(one) == ["test/shard_0001.hdf5", "train/shard_0001.hdf5"]


def test_mistakes(raw, tmp_path, command):
    (tmp_path / "there").mkdir()
    for flags, said in (
        (["--source", "nowhere", "--out", "o"], "nowhere: no such file or folder"),
        (["--source", "there", "--out", "o"], "there: no person01_walking_d1_uncomp.avi"),
        (["--source", raw, "--out", "o", "--actions", "boxing"], "shows boxing"),
        (["--source", raw, "--out", "there"], "there already exists"),
        (["--source", raw, "--out", "o", "--workers", "0"], "--workers must be"),
        (["--source", raw, "--out", "o", "--sequences", "none"], "none: No such file"),
    ):
        code, err = command(tmp_path, "prepare/kth", *flags)
        assert code == 2 and said in err and len(err.splitlines()) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["there"]
    assert np.all(np.diff(walk(), axis=0).any((1, 2, 3)))  # frames that tests can tell apart
