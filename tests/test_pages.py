"""Pages of results: one file that contains everything, played frame by frame in a real browser."""

import base64
import io
import json
import re
from html.parser import HTMLParser

import browser as chromium
import numpy as np
import pytest
from PIL import Image

import configs
from evaluation import protocols
from report import page, plots, videos
from runtime.console import UserError

V, S, T, P, H, W = 3, 2, 6, 4, 16, 20
HOSTILE = "</script><script>window.hacked = 1</script>\"'><img src=x onerror=window.hacked=1>&amp;"
needs_chromium = [
    pytest.mark.skipif(
        bool(chromium.MISSING),
        reason=f"no {chromium.MISSING}: apt-get install chromium chromium-driver",
    ),
    pytest.mark.xdist_group("browser"),
]


def arrays() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    return rng.integers(0, 255, (V, T, H, W, 3), np.uint8), rng.integers(
        0, 255, (V, S, P, H, W, 3), np.uint8
    )


def fill(dir, **changes):
    """A results folder with small arrays and the metrics that go with them."""
    dir.mkdir(parents=True, exist_ok=True)
    truth, samples = arrays()
    np.save(dir / "truth.npy", truth)
    np.save(dir / "samples.npy", samples)
    summary = {
        "crps": {"mean": 0.0123, "se": 0.0011},
        "psnr": {"mean": 20.0, "se": 0.5},
        "fvd": {"mean": 123.456, "se": None},
    }
    summary |= {
        "crps_repeat_last": {"mean": 0.0246, "se": 0.002},
        "psnr_repeat_last": {"mean": 21.5, "se": 0.5},
        "crps_mean_frame": {"mean": float("nan"), "se": 0.0},
    }
    result = {
        "protocol": {
            "videos": V,
            "split": "test",
            "samples_per_video": S,
            "condition": T - P,
            "predict": P,
            "skip": 0,
            "fps": 8,
            "reencode": True,
            "unheard": HOSTILE,
        },
        "config": {
            "dataset": HOSTILE,
            "flow": {"interpolant": "follmer", "c": 1.0},
            "output": {"run_id": ""},
            "train": {"seed": 3},
        },
        "summary": summary,
        "horizon": {"crps": [0.1] * P, "crps_repeat_last": [0.2] * P},
        **changes,
    }
    (dir / "metrics.json").write_text(json.dumps(result))
    videos.contact_sheet(truth, samples).save(dir / "contact_sheet.png")
    plots.rank_histogram(np.array([4, 5, 6]), dir / "rank_histogram.png")
    return dir


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a results folder and its page."""
    top = tmp_path_factory.mktemp("pages")
    page.result_page(fill(top / "c" / "model" / "data"))
    return top


class Links(HTMLParser):
    """Collects the references and the elements of a page."""

    def __init__(self, text: str):
        super().__init__()
        self.links, self.elements = [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.elements.append(tag)
        self.links += [
            value
            for name, value in attributes
            if name in ("src", "href", "srcset", "poster", "data")
        ]


def sheets_of(page: str) -> dict:
    return json.loads(re.search(r'id="sheets">(.*?)</script>', page, re.S).group(1))


# ----------------------------------------------------------------------------------------- the file
def test_a_page_contains_all_its_parts_and_escapes_strings(folder):
    page = (folder / "c/model/data/index.html").read_text()
    found = Links(page)
    assert len(found.links) == 4 and all(link.startswith("data:") for link in found.links)
    assert (
        found.elements.count("script") == 2
        and found.elements.count("img") == 3
        and "http:" not in page
    )
    assert "&lt;/script&gt;" in page and "<img src=x" not in page


def test_sheets_hold_every_frame_exactly(folder):
    data, (truth, samples) = sheets_of((folder / "c/model/data/index.html").read_text()), arrays()
    order = videos.rank_by_motion(truth, T - P)
    assert (data["given"], data["frames"], data["fps"], len(data["sheets"])) == (T - P, T, 8, V)
    for v, sheet in zip(order, data["sheets"]):
        image = np.asarray(
            Image.open(io.BytesIO(base64.b64decode(sheet.partition(",")[2]))).convert("RGB")
        )
        cells = image.reshape(-1, H, data["columns"], W, 3).swapaxes(1, 2).reshape(-1, H, W, 3)
        assert (cells[:T] == truth[v]).all() and (
            cells[T : T + S * P] == samples[v].reshape(-1, H, W, 3)
        ).all()


def test_too_many_clips_or_samples_are_left_out_and_the_page_states_it(tmp_path):
    text = page.result_page(fill(tmp_path), futures=1, limit=1).read_text()
    assert len(sheets_of(text)["sheets"]) == 1 and text.count("<canvas") == 2
    assert f"1 of {V} clips" in text and f"Truth and 1 of {S} samples" in text
    liveliest = videos.rank_by_motion(arrays()[0], T - P)[0]
    assert f"<h3>clip {liveliest}</h3>" in text


def test_metrics_stand_beside_the_baselines(folder):
    page = re.sub(r"<[^>]*>", " ", (folder / "c/model/data/index.html").read_text())
    page = re.sub(r"\s+", " ", page)
    assert "CRPS lower is better 0.0123 ± 0.0011 0.0246 ± 0.0020 – × 0.50 better" in page
    assert "PSNR (dB) higher is better 20.00 ± 0.50 21.50 ± 0.50 – −1.5 dB worse" in page
    assert "FVD lower is better 123.5 – – –" in page


def test_the_protocol_is_described_and_the_config_is_listed():
    told = protocols.get("own", configs.build("videos"), {"videos": 3}).to_metadata(["psnr", "fvd"])
    said = page.describe_protocol({**told, "skip": 0, "reencode": True, "checkpoint": "", "odd": 7})
    assert (
        said[0].startswith("Protocol own-videos_3: 3 test clips")
        and "Fvd and kvd: the forecast frames" in said[2]
    )
    assert said[3:] == [
        "The task that the checkpoint was trained on.",
        "Each forecast frame is decoded and encoded again before the next one.",
        "odd: 7.",
    ]
    assert (
        page.list_settings(
            {"dataset": "kth", "flow": {"c": 0.1, "name": "x"}, "latent": {"shape": [4, 8, 8]}}
        )
        == "dataset=kth\nflow.c=0.1\nflow.name=x\nlatent.shape=[4, 8, 8]"
    )


def test_a_folder_that_holds_no_results_is_a_mistake(tmp_path):
    with pytest.raises(UserError, match="metrics.json: no such file; name a results folder"):
        page.result_page(tmp_path)
    with pytest.raises(UserError, match="lacks one of protocol"):
        page.result_page(fill(tmp_path, summary=[]))
    (fill(tmp_path) / "samples.npy").unlink()
    with pytest.raises(UserError, match="samples.npy: no such file"):
        page.result_page(tmp_path)
    assert not (tmp_path / "index.html").exists()


def test_a_page_without_pictures_horizon_or_metrics(tmp_path):
    fill(tmp_path, summary={}, horizon={}, protocol={}, config={})
    for name in ("contact_sheet.png", "rank_histogram.png"):
        (tmp_path / name).unlink()
    text = page.result_page(tmp_path).read_text()
    assert "<h1>? · ?</h1>" in text and "<img" not in text and text.count("<canvas") == V * (1 + S)


# ------------------------------------------------------------------------------------- in a browser
@pytest.fixture(scope="module")
def browser():
    browser = chromium.Browser()
    yield browser
    browser.close()
    assert chromium.processes_of(browser.folder) == []


SHOWN = """const canvas = document.createElement("canvas");
    const pen = canvas.getContext("2d", { willReadFrequently: true });
    return [...document.querySelectorAll(".clip canvas")].map(canvas => {
        pen.drawImage(canvas, 0, 0);
        return [...pen.getImageData(0, 0, canvas.width, canvas.height).data];
    });"""
FRAMES = """[...document.querySelectorAll(".clip")].map(clip => +clip.dataset.frame)"""
PAGE = "c/model/data/index.html"


def opened(browser, page, **size):
    """The page with all its clips drawn."""
    browser.open(page, **size)
    browser.until(f"{FRAMES}.every(frame => frame > 0)", "all clips to be drawn")


def scrub(browser, frame: int) -> None:
    browser.run(f"""const slider = document.getElementById("frame");
        slider.value = {frame};
        slider.dispatchEvent(new Event("input"));""")


class TestInABrowser:
    pytestmark = needs_chromium

    def test_the_scrubber_shows_the_same_frame_of_every_clip_exactly(self, browser, folder):
        opened(browser, folder / PAGE)
        truth, samples = arrays()
        order = videos.rank_by_motion(truth, T - P)
        for t in (0, T - P, T - 1):
            scrub(browser, t + 1)
            assert browser.run(f"return {FRAMES}") == [t + 1] * V
            shown = np.array(browser.run(SHOWN)).reshape(V, 1 + S, H, W, 4)
            wanted = np.stack(
                [[frames[t] for _, frames in videos.tracks(truth[v], samples[v])] for v in order]
            )
            assert (shown[..., :3] == wanted).all()
            phase = "given" if t < T - P else f"forecast {t + 1 - (T - P)} of {P}"
            assert (
                browser.run("return document.getElementById('where').textContent")
                == f"frame {t + 1} of {T}: {phase}"
            )
            color = browser.run(
                "return getComputedStyle(document.querySelector('canvas')).borderTopColor"
            )
            assert color == f"rgb{videos.GIVEN if t < T - P else videos.FORECAST}"
        assert browser.run("return window.hacked") is None and browser.errors() == []

    def test_play_moves_all_clips_and_pause_stops_them(self, browser, folder):
        opened(browser, folder / PAGE)
        for toggle in (
            lambda: browser.run("document.getElementById('play').click()"),
            lambda: browser.press(" "),
        ):
            scrub(browser, 1)
            toggle()
            browser.until("document.getElementById('frame').value > 1", "the next frame")
            frames = browser.run(f"return {FRAMES}")
            assert len(set(frames)) == 1
            toggle()
            before = browser.run(f"return {FRAMES}")
            later = browser.call(
                "/execute/async", script=f"setTimeout(() => arguments[0]({FRAMES}), 400)", args=[]
            )
            assert before == later and "Play" in browser.run(
                "return document.getElementById('play').textContent"
            )
        assert browser.errors() == []

    def test_arrow_keys_and_buttons_step_by_one_frame_and_around(self, browser, folder):
        opened(browser, folder / PAGE)
        for step, frame in (
            (lambda: browser.press("\ue012"), T),
            (lambda: browser.press("\ue014"), 1),
            (lambda: browser.run("document.getElementById('next').click()"), 2),
            (lambda: browser.run("document.getElementById('back').click()"), 1),
        ):
            step()
            assert browser.run(f"return {FRAMES}") == [frame] * V

    @pytest.mark.parametrize("width, dark", [(390, False), (1200, True)])
    def test_no_page_is_wider_than_its_window(self, browser, folder, width, dark):
        browser.open(folder / PAGE, width=width, height=800, dark=dark)
        browser.run("document.querySelectorAll('details').forEach(part => { part.open = true })")
        assert browser.run("return [innerWidth, document.documentElement.scrollWidth]") == [
            width,
            width,
        ]
        light = (
            browser.run("return getComputedStyle(document.body).backgroundColor")
            == "rgb(255, 255, 255)"
        )
        assert light != dark and browser.errors() == []
        unnamed = browser.run("""
            const parts = document.querySelectorAll("button, input, select, img, canvas");
            const label = part => part.labels?.[0]?.textContent;
            const name = part => part.ariaLabel || part.alt || part.textContent || label(part);
            return [...parts].filter(part => !name(part)).length""")
        assert unnamed == 0
