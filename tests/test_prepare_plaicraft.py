"""prepare/plaicraft.py on a small PLAICraft: a database, session folders, .pt files of latents."""

import json
import os
import pickle
import sqlite3

import h5py
import numpy as np
import pytest
import torch
from raw import exit_code

from prepare import build, plaicraft
from prepare.plaicraft_sessions import digest_of, split_of
from runtime.console import UserError
from shards import Shards

SHAPE, PER_FILE = (4, 6, 10), 10
SESSIONS = {  # id: player, start, folder, latents; out of order on purpose
    "s_late": ("Steve", "2024-03-02 10:00:00", "a/x", 35),
    "s_early": ("Steve", "2024-01-01 09:00:00", "b", 20),
    "s_long": ("Alex", "2024-02-01 09:00:00", "", 250),
    "s_herobrine": (" steve ", "2024-02-02 09:00:00", "a", 7),
    "Alexs_own": ("alex", "2024-04-02 09:00:00", "c", 10),
}
FLAGS = [
    "--latent_shape",
    *map(str, SHAPE),
    "--per_file",
    str(PER_FILE),
    "--test_players",
    "STEVE",
    "--val_share",
    "0",
]


def latents_of(id):
    n = SESSIONS[id][3]
    return (
        np.random.default_rng(sorted(SESSIONS).index(id))
        .normal(size=(n, *SHAPE))
        .astype(np.float16)
    )


def folder_of(root, id):
    return root / SESSIONS[id][2] / id / "encoded_video"


def write_database(path, rows):
    with sqlite3.connect(path) as connection:
        connection.execute(
            "CREATE TABLE session_metadata (session_id TEXT, player_name TEXT, player_email TEXT, "
            "start_time TEXT, frame_count INTEGER, fps REAL, video INTEGER)"
        )
        connection.executemany("INSERT INTO session_metadata VALUES (?, ?, ?, ?, ?, ?, ?)", rows)
    connection.close()


@pytest.fixture
def raw(tmp_path):
    """A small PLAICraft. The numbers of its files are zero-padded in some sessions only."""
    root = tmp_path / "raw"
    for id, (_, _, _, count) in SESSIONS.items():
        folder, all = folder_of(root, id), torch.from_numpy(latents_of(id))
        folder.mkdir(parents=True)
        for k, start in enumerate(range(0, count, PER_FILE)):
            torch.save(
                all[start : start + PER_FILE].clone(),
                folder / (f"{k:04d}.pt" if id == "s_late" else f"batch_{k}.pt"),
            )
    rows = [
        (id, player, f"{player.strip().lower()}@mail.example", start, count * 3, 30.0, 1)
        for id, (player, start, _, count) in SESSIONS.items()
    ]
    write_database(
        root / plaicraft.DATABASE,
        [*rows, ("s_silent", "Mute", "mute@mail.example", "2024", 10, 30.0, 0)],
    )
    return root


def parse(raw, out, *flags, workers=1):
    return plaicraft.parse(
        ["--source", str(raw), "--out", str(out), "--workers", str(workers), *FLAGS, *flags]
    )


def make(raw, out, *flags, workers=1):
    return plaicraft.make(parse(raw, out, *flags, workers=workers))


def videos(out, split):
    shards = Shards(out / split, "latents")
    return [shards.read(k, slice(None)) for k in range(len(shards))]


def shards_of(out, split="train"):
    """Return fingerprint, continued videos and lengths: the content without the command."""
    shards = Shards(out / split, "latents")
    return shards.fingerprint(), [file.continues for file in shards.files], shards.lengths.tolist()


def same(videos, *wanted):
    return len(videos) == len(wanted) and all(np.array_equal(a, b) for a, b in zip(videos, wanted))


def skipped(manifest):
    return {entry["name"]: entry["skipped"] for entry in manifest["sources"] if entry["skipped"]}


def test_sessions_become_videos_in_the_order_of_their_start(raw, tmp_path, capsys):
    manifest = make(raw, tmp_path / "out", workers=2)
    test, train = videos(tmp_path / "out", "test"), videos(tmp_path / "out", "train")
    # All spellings of Steve are one player.
    assert same(test, *map(latents_of, ("s_early", "s_herobrine", "s_late")))
    assert (
        same(train, *map(latents_of, ("s_long", "Alexs_own")))
        and not (tmp_path / "out/val").exists()
    )
    shards = Shards(tmp_path / "out/train", "latents")
    # 25 + 1 files, 20 per shard.
    assert shards.fps == 10.0 and shards.files[0].dtype == np.float16 and len(shards.paths) == 2
    splits = manifest["splits"]
    assert (
        not skipped(manifest)
        and splits["train"]["longest"] == 250
        and splits["test"]["shortest"] == 7
    )
    assert {entry["frames"] for entry in manifest["sources"]} == {10, 7, 5} and manifest[
        "resize_rule"
    ].startswith("latents")
    assert all(len(entry["sha256"]) == 64 for entry in manifest["sources"])
    assert (
        manifest["sessions"][0]["player"] == digest_of("steve")
        and "sessions without video, by" in capsys.readouterr().out
    )


def test_the_output_does_not_depend_on_the_number_of_workers(raw, tmp_path):
    make(raw, tmp_path / "one")
    make(raw, tmp_path / "two", workers=2)
    assert shards_of(tmp_path / "one") == shards_of(tmp_path / "two") and shards_of(
        tmp_path / "one"
    )[1] == [False, True]


def test_neither_names_nor_addresses_are_written(raw, tmp_path, capsys):
    os.rename(folder_of(raw, "s_early") / "batch_0.pt", folder_of(raw, "s_early") / "Steve_0.pt")
    make(raw, tmp_path / "out", "--val_players", "Alex")
    everything = b"".join(
        path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()
    )
    assert b"s_late" in everything and digest_of("alex").encode() in everything
    for word in (b"steve", b"alex@", b"alexs_own", b"mail.example", b"'alex'", b'"alex"', b"mute"):
        assert word not in everything.lower(), word


def test_players_named_by_digest_and_by_share(raw, tmp_path):
    args = parse(raw, tmp_path / "out", "--val_players", digest_of("alex"))
    found, _ = plaicraft.find_sources(args)
    assert {source.split for source in found.sources} == {"test", "val"} and args.test_players == [
        digest_of("steve")
    ]
    shares = {"test": 0.2, "val": 0.1}
    splits = [split_of(f"player {k}", {}, shares) for k in range(4000)]
    assert [
        abs(splits.count(split) / 4000 - share) < 0.02
        for split, share in (("test", 0.2), ("val", 0.1), ("train", 0.7))
    ] == [True] * 3
    assert splits[:50] == [split_of(f"player {k}", {}, shares) for k in range(50)]


def test_a_session_is_divided_at_gaps_and_broken_files(raw, tmp_path, capsys):
    folder, all = folder_of(raw, "s_long"), latents_of("s_long")
    bad = torch.from_numpy(all[30:40].copy())
    bad[3, 0, 0, 0] = float("nan")
    torch.save(bad, folder / "batch_3.pt")
    (folder / "batch_6.pt").unlink()
    (folder / "batch_9.pt").write_bytes((folder / "batch_9.pt").read_bytes()[:-900])
    torch.save(torch.zeros(10, 4, 6, 11), folder / "batch_12.pt")
    torch.save(torch.from_numpy(all[150:154].copy()), folder / "batch_15.pt")
    # The last source of a shard is broken, so the next shard does not continue its video.
    (folder / "batch_20.pt").write_bytes(b"")
    torch.save(torch.zeros(10, *SHAPE), folder / "batch_022.pt")
    torch.save(torch.zeros(10, *SHAPE), folder / "notes.pt")
    args = parse(raw, tmp_path / "out")
    manifest = plaicraft.make(args)
    reasons, at = skipped(manifest), lambda k: f"s_long/batch_{k}.pt"
    assert (
        "not finite" in reasons[at(3)]
        and "missing" in reasons["s_long, between the numbers 5 and 7"]
    )
    assert (
        "not a whole file" in reasons[at(9)]
        and "(10, 4, 6, 11)" in reasons[at(12)]
        and "4 latents" in reasons[at(15)]
    )
    assert (
        "not a whole file" in reasons[at(20)]
        and "number 22" in reasons[at(22)]
        and "number 22" in reasons[at("022")]
    )
    assert "no number" in reasons["s_long/notes.pt"]
    cuts = [(0, 3), (4, 6), (7, 9), (10, 12), (13, 15), (16, 20), (21, 22), (23, 25)]
    assert same(
        videos(tmp_path / "out", "train"),
        *(all[10 * a : 10 * b] for a, b in cuts),
        latents_of("Alexs_own"),
    )
    assert (
        build.report(manifest, args, "file") == 1
        and "batch_9.pt: not a whole file" in capsys.readouterr().out
    )
    args.allow_skips = True
    assert build.report(manifest, args, "file") == 0


def test_a_pickle_that_runs_something_is_refused(raw, tmp_path):
    class Hostile:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "hacked"),)

    folder = folder_of(raw, "s_late")
    torch.save({"latents": Hostile()}, folder / "0001.pt")
    assert torch.serialization.get_unsafe_globals_in_checkpoint(folder / "0001.pt") == [
        f"{os.mkdir.__module__}.mkdir"
    ]
    (folder / "0002.pt").write_bytes(pickle.dumps(Hostile(), protocol=2))
    manifest = make(raw, tmp_path / "out")
    assert (
        set(skipped(manifest)) == {"s_late/0001.pt", "s_late/0002.pt"}
        and not (tmp_path / "hacked").exists()
    )


def test_sessions_that_cannot_be_placed_are_named(raw, tmp_path):
    os.rename(folder_of(raw, "s_early"), raw / "elsewhere")
    (raw / "again/s_late/encoded_video").mkdir(parents=True)
    with sqlite3.connect(raw / plaicraft.DATABASE) as connection:
        connection.execute(
            "UPDATE session_metadata SET player_name = NULL WHERE session_id = 's_herobrine'"
        )
    connection.close()
    manifest = make(
        raw, tmp_path / "out", "--test_players", "Alex", "--val_players", "Steve", "--allow_skips"
    )
    assert skipped(manifest) == {
        "s_early": "no folder s_early/encoded_video below the source",
        "s_herobrine": "no player_name: the player could be in another split",
        "s_late": "has 2 folders encoded_video",
    }
    assert same(videos(tmp_path / "out", "test"), latents_of("s_long"), latents_of("Alexs_own"))


def test_an_interrupted_run_resumes(raw, tmp_path, monkeypatch):
    make(raw, tmp_path / "whole")
    read, seen = plaicraft.read, []

    def stops(source, args):
        seen.append(source.name)
        if len(seen) > 23:
            raise KeyboardInterrupt
        return read(source, args)

    monkeypatch.setattr(plaicraft, "read", stops)
    with pytest.raises(KeyboardInterrupt):
        make(raw, tmp_path / "out")
    assert (
        not (tmp_path / "out").exists()
        and len(list((tmp_path / "out.partial").rglob("*.hdf5"))) == 1
    )
    monkeypatch.setattr(
        plaicraft, "read", lambda source, args: seen.append(source.name) or read(source, args)
    )
    seen.clear()
    make(raw, tmp_path / "out")
    # The finished shard is not read again.
    assert "s_long/batch_18.pt" not in seen and "s_long/batch_20.pt" in seen
    assert (
        shards_of(tmp_path / "out") == shards_of(tmp_path / "whole")
        and not (tmp_path / "out.partial").exists()
    )


def test_limit_takes_the_first_sessions(raw, tmp_path):
    make(raw, tmp_path / "out", "--limit", "1")
    assert same(videos(tmp_path / "out", "test"), latents_of("s_early"))
    assert same(videos(tmp_path / "out", "train"), latents_of("s_long"))


FAKE = """
import torch
class AutoencoderKL(torch.nn.Module):
    @classmethod
    def from_pretrained(cls, path, local_files_only, use_safetensors):
        assert local_files_only and use_safetensors
        open(path + "/config.json").close()
        self = cls()
        self.weight = torch.nn.Parameter(torch.ones(1))
        self.config = type("C", (), {"scaling_factor": 0.5})
        return self
    def decode(self, z):
        x = torch.nn.functional.interpolate(z[:, :3], scale_factor=8, mode="nearest") / 4
        return type("D", (), {"sample": x})
"""


def test_decoded_to_frames(raw, tmp_path, monkeypatch):
    """With a stand-in for diffusers: the frames that it draws must be in the shards, in order."""
    # The number of threads would stay changed in the tests that follow.
    monkeypatch.setattr(torch, "set_num_threads", lambda threads: None)
    (tmp_path / "site/diffusers").mkdir(parents=True)
    (tmp_path / "site/diffusers/__init__.py").write_text(FAKE)
    (tmp_path / "site/diffusers-0.1.dist-info").mkdir()
    (tmp_path / "site/diffusers-0.1.dist-info/METADATA").write_text(
        "Name: diffusers\nVersion: 0.1\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    (tmp_path / "weights").mkdir()
    flags = [
        "--decode",
        str(tmp_path / "weights"),
        "--scaled",
        "--image_size",
        "48",
        "--limit",
        "1",
    ]
    with pytest.raises(UserError, match="not the folder of an AutoencoderKL"):
        make(raw, tmp_path / "out", *flags)
    (tmp_path / "weights/config.json").write_text("{}")
    manifest = make(raw, tmp_path / "out", *flags)
    frames = Shards(tmp_path / "out/train").read(0, slice(None))
    assert frames.shape == (250, 48, 48, 3) and manifest["versions"]["diffusers"] == "0.1"
    # Mean over the picture, of values that are not clipped.
    wanted = latents_of("s_long")[:, :3].astype(np.float32).mean((2, 3)) / 0.5 / 4
    assert np.corrcoef(frames.mean((1, 2)).ravel(), wanted.ravel())[0, 1] > 0.95


def test_mistakes(raw, tmp_path, command, monkeypatch):
    (tmp_path / "none").mkdir()
    (tmp_path / "odd").mkdir()
    with sqlite3.connect(tmp_path / "odd" / plaicraft.DATABASE) as connection:
        connection.execute("CREATE TABLE session_metadata (session_id TEXT)")
    connection.close()
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / plaicraft.DATABASE).write_text("not a database " * 99)
    # Latents of other shapes than the default.
    for flags, said in (
        (["--source", "none"], "contains no global_database.db"),
        (["--source", "odd"], "no such column: player_name"),
        (["--source", "text"], "not a database"),
        (
            ["--source", raw, "--test_players", "Nobody"],
            "--test_players Nobody: no player of that name",
        ),
        (
            ["--source", raw, "--test_players", "Alex", "--val_players", "alex"],
            "alex is in --test_players and",
        ),
        (["--source", raw, "--test_share", "0.7", "--val_share", "0.4"], "at most 1 together"),
        (["--source", raw, "--decode", "x"], "pip install diffusers"),
        (["--source", raw, "--workers", "1"], "not one video in"),
    ):
        if "--decode" in flags and plaicraft.importlib.util.find_spec("diffusers"):
            continue
        code, err = command(tmp_path, "prepare/plaicraft", "--out", "o", *flags)
        assert code == 2 and said in err.splitlines()[-1] and not (tmp_path / "o").exists()


def test_the_command_says_that_these_are_latents(raw, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(
        "sys.argv",
        ["x", "--source", str(raw), "--out", str(tmp_path / "out"), "--workers", "1", *FLAGS],
    )
    assert exit_code(plaicraft.main) == 0 and "these are latents" in capsys.readouterr().out
    with h5py.File(next((tmp_path / "out/test").glob("*.hdf5"))) as file:
        assert "steve" not in file.attrs["command"].lower() and "latents" in file
    assert (
        "steve" not in json.dumps(json.loads((tmp_path / "out/manifest.json").read_text())).lower()
    )


def test_endings_in_upper_case_and_linked_sessions_are_read(raw, tmp_path):
    make(raw, tmp_path / "plain")
    for path in list(raw.rglob("*.pt")):
        path.rename(path.with_suffix(".PT"))
    first = next(path.parent for path in sorted(raw.rglob("encoded_video")))
    first.rename(tmp_path / "elsewhere")
    first.symlink_to(tmp_path / "elsewhere")
    make(raw, tmp_path / "upper")
    for split in ("train", "val", "test"):
        if (tmp_path / "plain" / split).exists():
            assert same(videos(tmp_path / "upper", split), *videos(tmp_path / "plain", split))
