"""The contact sheet of prepared data."""

import numpy as np
from PIL import Image


def test_clips_lie_where_they_should(command, make_shards, tmp_path, capsys, monkeypatch):
    from scripts import data_sheet

    dir = make_shards([3, 100, 2, 50])
    monkeypatch.setattr(
        "sys.argv",
        [
            "x",
            "--data",
            str(dir),
            "--out",
            str(tmp_path / "s.png"),
            "--rows",
            "4",
            "--columns",
            "5",
            "--every",
            "2",
        ],
    )
    data_sheet.main()
    picture = np.asarray(Image.open(tmp_path / "s.png")).astype(int)
    assert picture.shape == (4 * 10 - 2, 5 * 10 - 2, 3) and (picture[8:10] == 255).all()
    cells = picture[::10, ::10, 0]
    assert (
        (np.diff(cells) == 2).all()
        and (np.diff(cells[:, 0]) > 10).all()
        and "4 clips" in capsys.readouterr().out
    )
    assert all(
        3 <= row[0] and row[-1] < 103 or 105 <= row[0] and row[-1] < 155 for row in cells
    )  # within one video


def test_mistakes_are_told(command, make_shards, tmp_path):
    dir = make_shards([3])
    for flags, message in (
        (["--out", "s.png"], "no video of 19 frames"),
        (["--out", "s.jpg"], "must end in .png"),
        (["--out", "s.png", "--rows", "0"], "at least 1"),
    ):
        code, said = command(tmp_path, "scripts/data_sheet", "--data", dir, *flags)
        assert code == 2 and message in said
