"""The page that shows a run while it trains."""

import json
import re

import pytest
from PIL import Image

from runtime import preview


def heights(svg: str) -> list[float]:
    """The y coordinates of the curve."""
    points = re.search(r'points="([^"]+)"', svg)[1].split()
    return [float(point.split(",")[1]) for point in points]


def test_the_curve_falls_on_a_logarithmic_axis():
    svg = preview.curve_svg([(10, 1.0), (20, 0.1), (30, 0.01)])
    top, middle, bottom = heights(svg)
    assert middle - top == pytest.approx(bottom - middle, abs=0.2)
    assert ">1<" in svg and ">0.01<" in svg and ">30<" in svg


@pytest.mark.parametrize("points", [[(1, 0.5)], [(1, 0.5), (2, 0.5)], [(0, 0.5)]])
def test_a_flat_curve_can_be_drawn(points):
    assert all(0 < y < preview.HEIGHT for y in heights(preview.curve_svg(points)))


def test_long_runs_are_averaged():
    points = [(k, 1.0 + k % 2) for k in range(100_000)]
    thinned = preview.thin_out(points)
    assert len(thinned) <= preview.MOST_POINTS
    assert thinned[-1][0] == 99_999
    assert all(loss == pytest.approx(1.5) for _, loss in thinned)


def test_rows_without_a_finite_loss_are_left_out(tmp_path):
    rows = [{"step": 1, "loss": 0.5}, {"step": 2, "sample_crps": 0.1}, {"step": 3, "loss": 0.0}]
    text = "".join(json.dumps(row) + "\n" for row in rows) + '{"step": 4, "loss": NaN}\n'
    (tmp_path / "metrics.jsonl").write_text(text)
    assert preview.read_loss(tmp_path / "metrics.jsonl") == [(1, 0.5)]


def test_a_run_leaves_a_page_a_curve_and_the_newest_picture(tiny_preview):
    dir = tiny_preview
    page = (dir / "preview.html").read_text()
    for name in re.findall(r'data-file="([^"]+)"', page):
        assert (dir / name).is_file()
    assert "://" not in page
    newest = max(dir.glob("forecasts_*.png"))
    assert newest.read_bytes() == (dir / "preview.png").read_bytes()
    assert Image.open(newest).size[0] > 100
    assert heights((dir / "curve.svg").read_text())


@pytest.fixture(scope="module")
def tiny_preview(tmp_path_factory):
    from conftest import TINY, launch

    folder = tmp_path_factory.mktemp("preview")
    launch(folder, "main.py", "--set", *TINY, "train.sample_every=5")
    return folder / "outputs/checkpoints/ball_stn-follmer-0"
