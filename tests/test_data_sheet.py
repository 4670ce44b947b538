"""The contact sheet of prepared data."""

import numpy as np
from PIL import Image


def test_clips_are_at_their_places_in_the_sheet(
    command, make_shards, tmp_path, capsys, monkeypatch
):
    from scripts import data_sheet

    dir = make_shards([3, 100, 2, 50])
    out = tmp_path / "s.png"
    flags = f"--data {dir} --out {out} --rows 4 --columns 5 --every 2"
    monkeypatch.setattr("sys.argv", ["data_sheet", *flags.split()])
    data_sheet.main()
    picture = np.asarray(Image.open(out)).astype(int)
    assert picture.shape == (4 * 10 - 2, 5 * 10 - 2, 3) and (picture[8:10] == 255).all()
    cells = picture[::10, ::10, 0]
    assert (np.diff(cells) == 2).all()
    assert (np.diff(cells[:, 0]) > 10).all()
    assert "4 clips" in capsys.readouterr().out
    # Each clip lies within one of the two videos that are long enough.
    for row in cells:
        in_second = row[0] >= 3 and row[-1] < 103
        in_fourth = row[0] >= 105 and row[-1] < 155
        assert in_second or in_fourth


def test_mistakes_are_reported(command, make_shards, tmp_path):
    dir = make_shards([3])
    for flags, message in (
        (["--out", "s.png"], "no video of 19 frames"),
        (["--out", "s.jpg"], "must end in .png"),
        (["--out", "s.png", "--rows", "0"], "at least 1"),
    ):
        code, said = command(tmp_path, "scripts/data_sheet", "--data", dir, *flags)
        assert code == 2 and message in said
