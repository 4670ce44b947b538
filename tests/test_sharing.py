"""Work shared through files."""

import threading
import time

import numpy as np
import pytest

from runtime.console import Failure
from runtime.folders import Parts, lock


def test_several_share_the_parts_without_doing_one_twice(tmp_path):
    done, parts = [], Parts(tmp_path / "parts", 12, lambda: False)

    def work(name: str, first: int) -> None:
        for k in parts.ours(first):
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
    assert (
        sorted(k for k, _ in done) == list(range(12)) == parts.there()
        and len({name for _, name in done}) == 3
    )
    assert parts.read()["k"].tolist() == np.repeat(np.arange(12), 2).tolist()


def test_what_is_there_is_not_done_again_and_what_another_summed_up_ends_it(tmp_path):
    over = []
    parts = Parts(tmp_path / "parts", 3, lambda: bool(over))
    work = parts.ours()
    parts.write(next(work), {"k": np.zeros(1)})
    assert next(work) == 1 and list(Parts(tmp_path / "parts", 3, lambda: True).ours()) == []
    over.append(1)
    assert list(work) == []


def test_one_process_writes_and_a_folder_that_has_gone_is_told(tmp_path):
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
    with pytest.raises(
        Failure, match="gone has gone: another process wrote other results in its place"
    ):
        gone.sum_up(tmp_path, lambda: None)


def test_the_lock_of_one_is_refused_to_another_and_given_back(tmp_path):
    with lock(tmp_path / "file") as first, lock(tmp_path / "file") as second:
        assert first and not second
    with lock(tmp_path / "file") as again:
        assert again
    with lock(tmp_path / "nowhere" / "file") as none:
        assert not none
