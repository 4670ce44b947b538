"""Atomic writes of files and folders, locks, and work shared by several processes."""

import errno
import fcntl
import os
import re
import socket
import threading
import time

import numpy as np
import pytest

from runtime import folders
from runtime.console import Failure, UserError
from runtime.folders import (
    Parts,
    complete,
    describe_owner,
    lock,
    replace_folder,
    restore_folder,
    stage_lock,
    write_atomically,
)


class Crash(Exception):
    """Raised by the tests in the middle of a write."""


def names(dir) -> list[str]:
    return sorted(path.name for path in dir.iterdir())


# ------------------------------------------------------------------------------------ atomic writes
@pytest.mark.parametrize("per_process", [False, True])
def test_a_file_is_replaced_when_it_is_complete(tmp_path, per_process):
    path = tmp_path / "a.json"
    for content in (b"first", b"second"):
        with write_atomically(path, per_process) as file:
            file.write(content)
            assert not path.exists() or path.read_bytes() == b"first"
            assert file.name.startswith(str(tmp_path / ".a.json."))
        assert path.read_bytes() == content
        assert names(tmp_path) == ["a.json"]


def test_a_crash_while_a_file_is_written_leaves_the_old_one(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    path.write_bytes(b"old")
    with pytest.raises(Crash), write_atomically(path) as file:
        file.write(b"half")
        raise Crash
    assert path.read_bytes() == b"old" and names(tmp_path) == ["a.json"]

    def fail(*_):
        raise OSError("no space left on device")

    for step in ("fsync", "replace"):
        with monkeypatch.context() as patch, pytest.raises(OSError):
            patch.setattr(os, step, fail)
            with write_atomically(path) as file:
                file.write(b"new")
        assert path.read_bytes() == b"old" and names(tmp_path) == ["a.json"]


def test_a_new_folder_appears_when_it_is_complete(tmp_path):
    out = tmp_path / "deep" / "out"
    (tmp_path / "deep/out.partial").mkdir(parents=True)
    (tmp_path / "deep/out.partial/stale").touch()
    with pytest.raises(Crash), complete(out) as partial:
        assert names(partial) == []
        (partial / "a").touch()
        raise Crash
    assert names(out.parent) == []
    with complete(out) as partial:
        (partial / "b").touch()
        assert not out.exists()
    assert names(out) == ["b"] and names(out.parent) == ["out"]
    with pytest.raises(UserError, match="out already exists; remove it"), complete(out):
        pass
    assert names(out) == ["b"] and names(out.parent) == ["out"]


def test_a_folder_is_replaced_when_it_is_complete(tmp_path):
    out = tmp_path / "out"
    for name in ("first", "second"):
        with replace_folder(out) as partial:
            (partial / name).touch()
            assert not out.exists() or names(out) == ["first"]
        assert names(out) == [name] and names(tmp_path) == ["out"]


def test_a_crash_while_a_folder_is_filled_leaves_the_old_one(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "old").touch()
    with pytest.raises(Crash), replace_folder(out) as partial:
        (partial / "half").touch()
        raise Crash
    assert names(out) == ["old"] and names(tmp_path) == ["out"]


@pytest.mark.parametrize("restore", [True, False])
def test_a_swap_of_folders_that_was_interrupted_is_undone(tmp_path, monkeypatch, restore):
    out = tmp_path / "out"
    out.mkdir()
    (out / "old").touch()
    replace = os.replace

    def crash(source, target):
        if target == out:
            raise Crash
        replace(source, target)

    with monkeypatch.context() as patch, pytest.raises(Crash):
        patch.setattr(os, "replace", crash)
        with replace_folder(out) as partial:
            (partial / "new").touch()
    assert names(tmp_path) == ["out.old"]
    if restore:
        restore_folder(out)
        assert names(tmp_path) == ["out"] and names(out) == ["old"]
        restore_folder(out)
    with pytest.raises(Crash), replace_folder(out):
        assert names(out) == ["old"]
        raise Crash
    assert names(tmp_path) == ["out"] and names(out) == ["old"]


# -------------------------------------------------------------------------------------- shared work
def test_several_threads_compute_every_part_once(tmp_path):
    done, parts = [], Parts(tmp_path / "parts", 12, lambda: False)

    def work(name: str, first: int) -> None:
        for k in parts.claim(first):
            if k is not None:
                time.sleep(0.01 * (1 + k % 3))
                done.append((k, name))
                parts.write(k, {"k": np.full(2, k)})
            else:
                time.sleep(0.01)

    threads = [threading.Thread(target=work, args=args) for args in (("a", 0), ("b", 4), ("c", 4))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
    assert sorted(k for k, _ in done) == list(range(12)) == parts.written()
    assert len({name for _, name in done}) == 3
    assert parts.read()["k"].tolist() == np.repeat(np.arange(12), 2).tolist()


def test_finished_parts_are_skipped_and_a_finished_whole_ends_the_work(tmp_path):
    over = []
    parts = Parts(tmp_path / "parts", 3, lambda: bool(over))
    work = parts.claim()
    parts.write(next(work), {"k": np.zeros(1)})
    assert next(work) == 1 and list(Parts(tmp_path / "parts", 3, lambda: True).claim()) == []
    over.append(1)
    assert list(work) == []


def test_one_process_writes_and_a_removed_folder_is_a_failure(tmp_path):
    parts, wrote = Parts(tmp_path / "parts", 1, lambda: bool(wrote)), []
    (tmp_path / "parts").mkdir()
    with lock(tmp_path) as ours:
        thread = threading.Thread(target=parts.sum_up, args=(tmp_path, lambda: wrote.append(1)))
        thread.start()
        time.sleep(0.3)
        assert ours and not wrote
    thread.join(timeout=10)
    assert wrote == [1]
    parts.sum_up(tmp_path, lambda: wrote.append(2))
    assert wrote == [1]
    gone = Parts(tmp_path / "gone", 1, lambda: False)
    with pytest.raises(Failure, match="gone was removed: another process wrote other results"):
        gone.sum_up(tmp_path, lambda: None)


# -------------------------------------------------------------------------------------------- locks
def test_a_held_lock_is_refused_and_a_released_lock_is_granted(tmp_path):
    with lock(tmp_path / "file") as first, lock(tmp_path / "file") as second:
        assert first and not second
    with lock(tmp_path / "file") as again:
        assert again
    with lock(tmp_path / "nowhere" / "file") as none:
        assert not none


def test_a_lock_can_be_waited_for(tmp_path):
    order = []

    def second() -> None:
        with lock(tmp_path / "file", wait=True) as held:
            order.append(("second", held))

    with lock(tmp_path / "file") as held:
        thread = threading.Thread(target=second)
        thread.start()
        time.sleep(0.2)
        order.append(("first", held))
    thread.join(timeout=10)
    assert order == [("first", True), ("second", True)]


def test_a_second_run_waits_for_the_stages_of_the_first(tmp_path, capsys):
    order = []

    def second() -> None:
        with stage_lock(tmp_path / "outputs"):
            order.append("second")

    with pytest.raises(Crash), stage_lock(tmp_path / "outputs"):
        thread = threading.Thread(target=second)
        thread.start()
        time.sleep(0.2)
        order.append("first")
        raise Crash
    thread.join(timeout=10)
    assert order == ["first", "second"]
    # One line, which says for whom the second run waits.
    line = (
        rf"waiting for process {os.getpid()} on {re.escape(socket.gethostname())}, "
        r"since \d{4}-\d\d-\d\d \d\d:\d\d:\d\d, which prepares data or latents under "
        rf"{re.escape(str(tmp_path))}/outputs\n"
    )
    assert re.fullmatch(line, capsys.readouterr().out)


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_reported_once_and_used(
    tmp_path, monkeypatch, capsys, number
):
    def refuse(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)
    monkeypatch.setattr(folders, "_without_locks", set())
    (tmp_path / "parts").mkdir()
    with stage_lock(tmp_path / "outputs"), lock(tmp_path / "file") as held:
        assert held
    # Siblings: a lock that is waited for, the lock of a folder, and shared parts.
    with lock(tmp_path / "file", wait=True) as held, lock(tmp_path) as folder_held:
        assert held and folder_held
    parts = Parts(tmp_path / "parts", 2, lambda: False)
    for k in parts.claim():
        parts.write(k, {"k": np.full(1, k)})
    assert parts.written() == [0, 1]
    printed = capsys.readouterr().out
    assert printed.count("\n") == 1
    assert "has no file locks" in printed and os.strerror(number) in printed


def test_the_owner_of_a_lock_that_nobody_wrote_is_another_run(tmp_path):
    assert describe_owner(tmp_path / "none") == "another run"
    for text in ("", "[]", "{}", '{"host": "a", "pid": 1, "since": "x"}'):
        (tmp_path / ".lock").write_text(text)
        assert describe_owner(tmp_path / ".lock") == "another run"
