"""Fields (N, C, H, W) float32 as data, from shards to forecasts."""

import dataclasses
import json
import pickle

import numpy as np
import pytest
import torch
from conftest import launch
from PIL import Image

import configs
import data
import vqvae
from batches import fields
from batches.latents import LatentTriples
from batches.stream import StreamTriples
from evaluation import measure
from forecaster import Forecaster, build_net, load
from report import videos
from report.colours import Colours, choose_colours, colour_table, paint
from runtime.console import UserError
from runtime.process import Process
from shards import Shards, ShardWriter, write_packed

CPU = torch.device("cpu")


def waves(frames: int, channels: int = 3, height: int = 6, width: int = 10, seed: int = 0):
    """A video of travelling waves with noise, (frames, C, H, W) float32, of both signs."""
    rng = np.random.default_rng(seed)
    t = np.arange(frames)[:, None, None, None]
    c = np.arange(channels)[None, :, None, None]
    y = np.arange(height)[None, None, :, None]
    x = np.arange(width)[None, None, None, :]
    phase = 2 * np.pi * (x / width + (c + 1) * y / height - t / 12) + rng.uniform(0, 2 * np.pi)
    video = (c + 1) * np.sin(phase) + 0.1 * rng.standard_normal(phase.shape)
    return video.astype(np.float32)


# ------------------------------------------------------------------------------------------- shards
def test_fields_come_back_from_their_shards(tmp_path):
    videos = [waves(5, seed=0), waves(9, seed=1), waves(4, seed=2)]
    size = videos[0][0].nbytes
    # The second video extends over two shards.
    with ShardWriter(
        tmp_path, "fields", fps=2.0, shard_bytes=10 * size, channels=("u", "v", "t")
    ) as writer:
        writer.add(videos[0])
        writer.add(videos[1][:6])
        writer.append(videos[1][6:])
        writer.add(videos[2])
    shards = Shards(tmp_path)
    assert (shards.key, shards.shape, shards.dtype) == ("fields", (3, 6, 10), np.float32)
    assert (len(shards.paths), shards.lengths.tolist(), shards.fps) == (2, [5, 9, 4], 2.0)
    assert shards.channels == ("u", "v", "t")
    for v, video in enumerate(videos):
        assert (shards.read(v, slice(None)) == video).all()
    order = np.array([8, 0, 0, 6, 3])
    assert (shards.read(1, order) == videos[1][order]).all()
    # Another process opens the files again.
    copy = pickle.loads(pickle.dumps(shards))
    assert copy.key == "fields" and (copy.read(2, slice(None)) == videos[2]).all()


def test_a_split_knows_what_it_holds(tmp_path):
    rows = np.zeros((4, 2, 3, 5), np.float32)
    for key in ("latents", "fields"):
        (tmp_path / key).mkdir()
        write_packed(tmp_path / key / "shard_0001.hdf5", key, rows, np.array([4]), {})
        assert Shards(tmp_path / key).key == key
        assert Shards(tmp_path / key, key).shape == (2, 3, 5)
        with pytest.raises(UserError, match="holds neither `frames`"):
            Shards(tmp_path / key, "frames")
    with ShardWriter(tmp_path / "frames") as writer:
        writer.add(np.zeros((3, 8, 8, 3), np.uint8))
    assert Shards(tmp_path / "frames").key == "frames"
    with pytest.raises(UserError, match="holds neither `fields`"):
        Shards(tmp_path / "frames", "fields")


def test_fields_of_another_type_are_refused(tmp_path):
    with ShardWriter(tmp_path / "a", "fields") as writer:
        with pytest.raises(ValueError, match=r"float32, got \(3, 2, 4, 4\) float64"):
            writer.add(np.zeros((3, 2, 4, 4)))
        with pytest.raises(ValueError, match=r"got \(3, 4, 4\) float32"):
            writer.add(np.zeros((3, 4, 4), np.float32))
    with pytest.raises(ValueError, match="key must be one of frames, latents, fields"):
        ShardWriter(tmp_path / "b", "field")
    # Shards that another program wrote.
    (tmp_path / "c").mkdir()
    rows = np.zeros((4, 2, 3, 5), np.float64)
    write_packed(tmp_path / "c/shard_0001.hdf5", "fields", rows, np.array([4]), {})
    message = r"fields of \(2, 3, 5\) float64, not \(channels, height, width\) float32"
    with pytest.raises(UserError, match=message):
        Shards(tmp_path / "c")


# ---------------------------------------------------------------------------------------- settings
SETTINGS = [
    "data.clip=6",
    "data.condition=2",
    "data.predict=3",
    "model.width=16",
    "model.depth=1",
    "model.heads=2",
    "train.steps=8",
    "train.batch_size=4",
    "train.warmup=2",
    "train.log_every=4",
    "train.sample_every=4",
    "sample.num_videos=3",
    "sample.num_samples=2",
    "sample.steps=2",
]
# A VQVAE that trains in a second.
SMALL = [
    "vqvae.kind=small",
    "vqvae.downsample=2",
    "vqvae.width=16",
    "vqvae.depth=1",
    "vqvae.codes=32",
    "vqvae.steps=10",
    "vqvae.batch_size=8",
]


def write_fields(root, channels: int = 3, height: int = 6, width: int = 10, frames: int = 12):
    """Shards of fields, two videos in each split -> the folder."""
    names = ("u", "v", "t", "q")[:channels]
    for k, split in enumerate(("train", "val", "test")):
        with ShardWriter(root / split, "fields", fps=2.0, channels=names) as writer:
            for v in range(2):
                writer.add(waves(frames, channels, height, width, seed=10 * k + v))
    return root


def build(root, *settings, dataset="fields"):
    values = configs.parse_overrides([f"data.root={root}", *SETTINGS, *settings])
    return configs.build(dataset, values)


def test_fields_take_their_size_from_the_shards(tmp_path):
    config = build(write_fields(tmp_path))
    shards = data.open_split(config, "train")
    process = Process(0, 1, CPU)
    autoencoder = vqvae.ensure_vqvae(config, shards, process)
    source = data.build_source(config, shards, autoencoder, None, process)
    latent = data.resolve_latents(config, source, autoencoder, None, process)
    assert latent.shape == (3, 6, 10)
    # Channel c of the data has the amplitude c + 1.
    assert np.allclose(latent.std, np.array([1, 2, 3]) / 2**0.5, rtol=0.1)
    assert not (tmp_path / "outputs").exists()


def test_batches_hold_the_fields_bit_for_bit(tmp_path):
    config = build(write_fields(tmp_path), "data.context=last", "data.contexts=2")
    shards = data.open_split(config, "train")
    source = LatentTriples(config, shards.dir, CPU)
    at, batch = source.frames(3), source.batch(3)
    assert batch.target.dtype == torch.float32
    for i, video in enumerate(at.video):
        frames = np.concatenate([[at.target[i], at.reference[i]], at.contexts[i]])
        stored = torch.from_numpy(shards.read(video, frames))
        found = torch.cat([batch.target[i : i + 1], batch.reference[i : i + 1], batch.contexts[i]])
        assert torch.equal(found, stored)


def test_batches_of_several_shards_are_those_of_one(tmp_path):
    config = build(tmp_path)
    videos = [waves(12, seed=v) for v in range(4)]
    batches = []
    for name, size in (("one", 1 << 28), ("many", videos[0].nbytes + 1)):
        with ShardWriter(tmp_path / name, "fields", shard_bytes=size) as writer:
            for video in videos:
                writer.add(video)
        batches.append(LatentTriples(config, tmp_path / name, CPU).batch(0))
    assert len(list((tmp_path / "many").iterdir())) == 2
    assert all(torch.equal(one, many) for one, many in zip(*batches))


def test_streams_of_fields_hold_the_fields_bit_for_bit(tmp_path):
    settings = ["data.mode=stream", "train.batch_size=1", "replay.n_live=1"]
    config = build(write_fields(tmp_path), *settings)
    shards = data.open_split(config, "train")
    frames = np.concatenate([shards.read(v, slice(None)) for v in range(2)])
    for batch in StreamTriples(config, shards.dir, CPU).batches(0, 3):
        for part in (batch.target, batch.reference, batch.contexts[:, 0]):
            assert (part.numpy() == frames).all((1, 2, 3)).sum() == 1


@pytest.mark.parametrize("unit", [1e-9, 1.0, 1e9])
def test_fields_of_any_unit_are_normalised(tmp_path, unit):
    video = waves(12) * np.float32(unit)
    # A constant channel.
    video[:, 2] = np.float32(273.15)
    with ShardWriter(tmp_path, "fields") as writer:
        writer.add(video)
    config = build(tmp_path)
    triples = LatentTriples(config, tmp_path, CPU)
    latent = data.measure_latents(config, data.Source(triples.batches, triples.batches, str))
    assert np.allclose(latent.std, [unit / 2**0.5, 2 * unit / 2**0.5, 1], rtol=0.2)
    assert latent.mean[2] == pytest.approx(273.15, rel=1e-6) and latent.delta > 0.1
    scale = fields.channel_scale(Shards(tmp_path))
    assert np.allclose(scale, [unit / 2**0.5, 2 * unit / 2**0.5, 1], rtol=0.2)


def test_statistics_of_large_fields_take_limited_memory(tmp_path, monkeypatch):
    shards = Shards(write_fields(tmp_path) / "train")
    whole, mean = fields.channel_scale(shards), data.mean_frame(shards)
    monkeypatch.setattr(fields, "MEASURED_VALUES", 17 * 3 * 6 * 10)
    assert len(fields.measured_fields(shards)) == 17
    assert np.allclose(fields.channel_scale(shards), whole, rtol=0.1)
    assert mean.shape == data.mean_frame(shards).shape


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_fields_that_are_not_finite_are_reported(tmp_path, bad):
    video = waves(12)
    video[7, 1, 2, 3] = bad
    with ShardWriter(tmp_path, "fields") as writer:
        writer.add(video)
    with pytest.raises(UserError, match="shard_0001.hdf5: fields that are not finite"):
        LatentTriples(build(tmp_path), tmp_path, CPU)


@pytest.mark.parametrize(
    "settings, says",
    [
        (["data.brightness=0.1"], "augmentation for RGB frames: set data.brightness"),
        (["vqvae.kind=river"], "train holds fields, but vqvae.kind=river is for frames; set"),
        (
            ["vqvae.kind=small", "vqvae.downsample=2", "data.hue=0.1"],
            "augmentation is for RGB frames",
        ),
        (["vqvae.kind=small"], "fields of 6x10 .* cannot be divided by vqvae.downsample = 4"),
    ],
)
def test_settings_that_do_not_suit_fields_are_refused(tmp_path, settings, says):
    root = write_fields(tmp_path)
    with pytest.raises(UserError, match=says):
        data.open_split(build(root, *settings), "train")


def test_frames_are_refused_where_fields_are_expected(make_shards, tmp_path):
    make_shards([20])
    with pytest.raises(UserError, match="train holds frames, but vqvae.kind=none is for fields"):
        data.open_split(build(tmp_path / "data"), "train")


# --------------------------------------------------------------------------------------- forecasts
def tiny_forecaster(root, *settings) -> Forecaster:
    config = build(root, *settings)
    latent = configs.Latent((3, 6, 10), (0.5, 0.0, -1.0), (0.7, 1.4, 2.1))
    config = dataclasses.replace(config, latent=latent)
    torch.manual_seed(0)
    net = build_net(config, CPU)
    # The output layer of a new network is 0.
    torch.nn.init.normal_(net.conv_out.weight, std=0.02)
    autoencoder = vqvae.load("", "none")
    return Forecaster(config, net.eval(), autoencoder, CPU)


def test_forecasts_of_fields_are_float32(tmp_path):
    forecaster = tiny_forecaster(tmp_path)
    given = np.stack([waves(4, seed=v) for v in range(2)])
    futures = forecaster.forecast(given, 3, 2, (0,), quiet=True)
    assert (futures.shape, futures.dtype) == ((2, 2, 3, 3, 6, 10), np.float32)
    # Not rounded to 256 levels, nor to float16, nor clamped to [-1, 1].
    assert len(np.unique(futures)) > 0.99 * futures.size
    assert (futures != futures.astype(np.float16)).mean() > 0.9
    assert np.abs(futures).max() > 1
    assert np.array_equal(forecaster.to_display(given), given)


def test_encoding_again_changes_no_field(tmp_path):
    given = waves(4)[None]
    futures = []
    for flag in ("0", "1"):
        forecaster = tiny_forecaster(tmp_path, f"sample.reencode={flag}")
        futures.append(forecaster.forecast(given, 4, 1, (0,), quiet=True))
    assert np.array_equal(*futures)


def test_the_mean_frame_of_fields_is_their_mean(tmp_path):
    shards = Shards(write_fields(tmp_path) / "train")
    mean = data.mean_frame(shards)
    assert (mean.shape, mean.dtype) == ((3, 6, 10), np.float32)
    drawn = data.random_frames(shards, 24, np.random.default_rng(0))
    assert np.allclose(mean, drawn.mean(0), atol=1e-6)


# ------------------------------------------------------------------------------------------- scores
def test_fields_are_scored_in_units_of_their_standard_deviation():
    rng = np.random.default_rng(0)
    truth, samples = (rng.standard_normal(shape) for shape in ((3, 5, 2, 4, 6), (3, 4, 3, 2, 4, 6)))
    truth, samples = truth.astype(np.float32), samples.astype(np.float32)
    scale = np.array([1.0, 100.0])
    larger = scale.astype(np.float32)[:, None, None]
    plain = measure.score(truth, samples, truth[:, 0].mean(0), np.ones(2))
    mean = truth[:, 0].mean(0) * larger
    scaled = measure.score(truth * larger, samples * larger, mean, scale)
    assert set(plain["summary"]) >= {"crps", "energy", "rmse", "mse", "spread_skill"}
    assert "psnr" not in plain["summary"]
    for name, entry in plain["summary"].items():
        assert entry["mean"] == pytest.approx(scaled["summary"][name]["mean"], rel=1e-4)
    error = (samples.mean(1) - truth[:, -3:]) ** 2
    rmse = np.sqrt(error.mean((-3, -2, -1)))
    assert plain["horizon"]["rmse"] == pytest.approx(rmse.mean(0).tolist(), rel=1e-4)
    repeated = np.abs(truth[:, 1:2] - truth[:, -3:]).mean((-3, -2, -1)).mean(0)
    assert plain["horizon"]["crps_repeat_last"] == pytest.approx(repeated.tolist(), rel=1e-4)
    # As many counts as pixels of the truth.
    assert sum(plain["rank_histogram"]) == 3 * 3 * 2 * 4 * 6


# ----------------------------------------------------------------------------------------- pictures
def test_colours_follow_the_range_of_the_truth():
    field = np.zeros((10, 3, 20, 20), np.float32)
    field[:, 0] = np.linspace(-4, 2, 400).reshape(20, 20)
    field[:, 1] = np.linspace(270, 300, 400).reshape(20, 20)
    signed, positive, constant = choose_colours(field, ("u", "t", "c"))
    # A signed field has a range that is symmetric about 0.
    assert signed.signed and signed.low == -signed.high and 3.9 < signed.high <= 4
    assert not positive.signed and 270 <= positive.low < 271 and 299 < positive.high <= 300
    assert (constant.low, constant.high, constant.signed) == (0, 1, False)
    assert [colour.name for colour in (signed, positive, constant)] == ["u", "t", "c"]
    assert choose_colours(field)[1].name == "channel 2"


def test_pictures_of_fields_have_a_panel_per_channel():
    colours = [Colours("a", -1, 1, True), Colours("b", 0, 2, False)]
    field = np.zeros((2, 4, 4), np.float32)
    field[0, 0, :3] = (-1, 0, 1)
    field[1, 0, :3] = (0, 2, np.nan)
    picture = paint(field, colours)
    # Two panels side by side, a white line between them.
    assert picture.shape == (4, 9, 3) and (picture[:, 4] == 255).all()
    blue, white, red = picture[0, :3].astype(int)
    assert blue[2] > blue[0] + 50 and red[0] > red[2] + 50 and white.min() > 240
    dark, bright, missing = picture[0, 5:8].astype(int)
    assert bright.sum() > dark.sum() + 200 and missing.tolist() == [128] * 3


def test_pictures_of_frames_are_unchanged():
    truth = np.zeros((2, 4, 8, 8, 3), np.uint8)
    samples = np.ones((2, 3, 2, 8, 8, 3), np.uint8)
    drawn, futures, colours = videos.as_pictures(truth, samples)
    assert drawn is truth and futures is samples and colours == []
    assert videos.add_bars(truth[0], colours) is truth[0] or (truth[0] == 0).all()
    sheet = videos.contact_sheet(truth, samples)
    assert videos.add_bars_to_sheet(sheet, colours) is sheet


def test_colour_bars_stand_below_the_frames():
    frames = np.zeros((3, 20, 60, 3), np.uint8)
    colours = [Colours("a name", -1, 1, True), Colours("b", 0, 2, False)]
    wide = videos.add_bars(frames, colours)
    assert wide.shape[0] == 3 and wide.shape[1] > 40 and wide.shape[2] >= videos.BAR_WIDTH
    assert (wide[:, :20, :60] == 0).all() and (wide[0] == wide[2]).all()
    # The bars hold the ends of both colour maps.
    colours_seen = {tuple(pixel) for pixel in wide[0].reshape(-1, 3).tolist()}
    for signed in (True, False):
        for end in (0, -1):
            assert tuple(colour_table(signed)[end].tolist()) in colours_seen


# ------------------------------------------------------------------------------------- from the top
@pytest.fixture(scope="module")
def field_run(tmp_path_factory):
    """A folder in which `main.py --dataset fields` has run, and what it printed."""
    folder = tmp_path_factory.mktemp("fields")
    write_fields(folder / "data/fields")
    return folder, launch(folder, "main.py", "--dataset", "fields", "--set", *SETTINGS).stdout


def results_of(folder, pattern="*"):
    (found,) = (folder / "outputs/results").glob(f"*/*/{pattern}")
    return found


def test_main_trains_on_fields_and_samples(field_run):
    folder, printed = field_run
    out = results_of(folder, "fields-test")
    truth, samples = np.load(out / "truth.npy"), np.load(out / "samples.npy")
    assert (truth.shape, truth.dtype) == ((3, 5, 3, 6, 10), np.float32)
    assert (samples.shape, samples.dtype) == ((3, 2, 3, 3, 6, 10), np.float32)
    stored = Shards(folder / "data/fields/test").read(0, slice(0, 5))
    assert (truth[0] == stored).all()
    result = json.loads((out / "metrics.json").read_text())
    assert result["protocol"]["channels"] == ["u", "v", "t"]
    assert result["protocol"]["metrics"] == measure.FIELD_SCORES
    scale = result["protocol"]["scale"]
    # Channel c of the data has the amplitude c + 1. The scale depends on the data only.
    assert np.allclose(scale, np.array([1, 2, 3]) / 2**0.5, rtol=0.1)
    assert scale == fields.channel_scale(Shards(folder / "data/fields/test")).tolist()
    repeated = np.abs(truth[:, 1:2] - truth[:, 2:]) / np.array(scale)[:, None, None]
    assert result["summary"]["crps_repeat_last"]["mean"] == pytest.approx(repeated.mean(), rel=1e-4)
    assert "crps / repeat last" in printed and "psnr" not in printed
    # No cache of latents, and a preview with colour bars.
    assert not (folder / "outputs/latents").exists()
    assert next((folder / "outputs/checkpoints").glob("*/preview.png")).stat().st_size > 1000


def test_the_results_of_fields_have_pictures(field_run):
    out = results_of(field_run[0], "fields-test")
    sheet = np.asarray(Image.open(out / "contact_sheet.png"))
    seen = {tuple(pixel) for pixel in sheet[-60:].reshape(-1, 3).tolist()}
    for end in (0, -1):
        assert tuple(colour_table(True)[end].tolist()) in seen
    page = (out / "index.html").read_text()
    assert 'alt="Colours of u, v, t"' in page and "standard deviation of each channel" in page
    assert len(list((out / "videos").iterdir())) == 3
    launch(out, "scripts/make_video.py", "--results", ".", "--out", "../one.gif", "--videos", "1")
    assert (out.parent / "one.gif").stat().st_size > 1000


def test_a_resumed_run_of_fields_changes_nothing(field_run, tmp_path):
    folder, _ = field_run
    root = f"data.root={folder / 'data/fields'}"
    settings = [*SETTINGS, root, "train.save_every=5", "train.sample_every=0"]
    arguments = ["main.py", "--dataset", "fields", "--set", *settings]
    launch(tmp_path, *arguments)
    (run,) = (tmp_path / "outputs/checkpoints").iterdir()
    # As if the run had been killed after its first checkpoint.
    for name in ("step_00000008.pt", "latest.pt"):
        (run / name).unlink()
    assert (run / "step_00000005.pt").exists()
    launch(tmp_path, *arguments)
    (first,) = (folder / "outputs/checkpoints").glob("*/latest.pt")
    states = [torch.load(path, weights_only=True)["ema"] for path in (first, run / "latest.pt")]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_sample_and_evaluate_take_checkpoints_of_fields(field_run, command, tmp_path):
    folder, _ = field_run
    (ckpt,) = (folder / "outputs/checkpoints").glob("fields-*/latest.pt")
    out = tmp_path / "sampled"
    common = ["--ckpt", ckpt, "--num_videos", "2", "--num_frames", "2", "--out", out]
    launch(folder, "sample.py", *map(str, common))
    assert np.load(out / "samples.npy").shape == (2, 2, 2, 3, 6, 10)
    measured = launch(folder, "evaluate.py", "--results", str(out)).stdout
    assert "spread_skill" in measured and "fvd" not in measured and "energy" in measured
    before = json.loads((out / "metrics.json").read_text())["summary"]["crps"]["mean"]
    launch(folder, "evaluate.py", "--ckpt", str(ckpt), "--videos", "3", "--samples", "2")
    own = json.loads((results_of(folder, "*-own*") / "metrics.json").read_text())
    assert {"crps", "energy", "rmse", "mse", "spread_skill"} <= set(own["summary"])
    assert own["summary"]["crps"]["mean"] > 0 and before > 0
    assert own["summary"]["crps_mean_frame"]["mean"] > 0
    code, err = command(folder, "evaluate.py", "--results", out, "--metrics", "psnr")
    assert code == 2 and "psnr is for RGB frames, and fields holds fields" in err


def test_the_small_vqvae_encodes_fields(tmp_path):
    root = write_fields(tmp_path / "data")
    launch(
        tmp_path,
        *("main.py", "--dataset", "fields", "--set", *SETTINGS, *SMALL, f"data.root={root}"),
    )
    (path,) = (tmp_path / "outputs/checkpoints").glob("fields-*/latest.pt")
    state = torch.load(path, weights_only=True)
    # Normalisation by the statistics of each channel, in the checkpoint.
    std = state["vqvae"]["std"].flatten().numpy()
    assert np.allclose(std, np.array([1, 2, 3]) / 2**0.5, rtol=0.1)
    forecaster, _ = load(path, CPU)
    assert forecaster.fields and forecaster.autoencoder.of_fields
    samples = np.load(results_of(tmp_path) / "samples.npy")
    assert (samples.shape, samples.dtype) == ((3, 2, 3, 3, 6, 10), np.float32)
    assert samples.std() > 0


def test_the_small_vqvae_learns_fields_of_any_scale():
    """Trained on the same fields in other units, it reconstructs them equally well."""
    video = waves(32, 2, 8, 8)
    units = np.array([1e4, 1e-3], np.float32)[:, None, None]
    shift = np.array([3e5, 0.5], np.float32)[:, None, None]
    found = []
    for scaled in (video, video * units + shift):
        torch.manual_seed(0)
        module = vqvae.build(configs.Vqvae(downsample=2, width=16, depth=1, codes=64), fields=2)
        vqvae.set_statistics(module, scaled)
        optimizer = torch.optim.AdamW(module.parameters(), 3e-3)
        x = torch.from_numpy(scaled)
        for k in range(60):
            loss, _ = module.loss(x, torch.Generator().manual_seed(k))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        error = module.eval().squared_error(x)
        found.append(error.mean().item())
    # 1 is the error of the mean field.
    assert found[0] < 0.5 and found[1] == pytest.approx(found[0], rel=0.2)


def test_navier_stokes_takes_shards_that_exist(tmp_path):
    """Whatever their numbers of frames and their size, with a line that says so."""
    root = write_fields(tmp_path / "data", channels=1, height=8, width=8)
    settings = [*SETTINGS, f"data.root={root}"]
    done = launch(tmp_path, "main.py", "--dataset", "navier_stokes", "--set", *settings)
    assert "holds train 24, val 24, test 24 frames of (1, 8, 8); data.stream" in done.stdout
    samples = np.load(results_of(tmp_path, "navier_stokes-test") / "samples.npy")
    assert (samples.shape, samples.dtype) == ((3, 2, 3, 1, 8, 8), np.float32)


def test_a_dataset_of_fields_without_shards_names_the_command(command, tmp_path):
    code, err = command(tmp_path, "main.py", "--dataset", "fields")
    assert code == 2 and "python -m prepare.fields --source FILES --out data/fields" in err
