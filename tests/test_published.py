"""Published checkpoints: layouts, reference outputs of the autoencoders, and refused files."""

import json
import os
import pickle

import h5py
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import DATA, launch, reference_weights

import configs
import models
import vqvae
from forecaster import load as load_forecaster
from models import autoencoders
from models.autoencoders.taming import VARIANTS, Attention, Taming
from prepare import videos
from runtime import checkpoints, published, resume
from runtime.console import UserError

CPU = torch.device("cpu")


def names(file: str) -> dict:
    return json.loads((DATA / file).read_text())


def prefixed(prefix: str, weights: dict) -> dict:
    return {prefix + name: value for name, value in weights.items()}


def assert_same_weights(module: torch.nn.Module, weights: dict) -> None:
    for name, value in module.state_dict().items():
        assert torch.equal(value, weights[name]), name


@pytest.fixture(scope="module")
def river_weights() -> dict:
    return reference_weights(names("river_vqvae.json"))


@pytest.fixture(scope="module")
def taming_file(tmp_path_factory):
    """A Lightning checkpoint in the layout of taming-transformers."""
    path = tmp_path_factory.mktemp("weights") / "kth_vqvae.ckpt"
    weights = reference_weights(names("taming_f8_small.json"))
    weights["loss.logvar"] = torch.zeros(())
    state = {"state_dict": weights, "epoch": 3, "hyper_parameters": {"lr": 1e-4}}
    torch.save(state, path)
    return path


# Prefixes of data-parallel and compiled networks.
PREFIXES = ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module.", "module.module."]


def wrapped_inside(weights: dict, name: str) -> dict:
    """Rename the weights of a network with wrapped submodules: a.b.weight -> a.NAME.b.weight."""
    found = {}
    for key, value in weights.items():
        first, _, rest = key.partition(".")
        found[f"{first}.{name}.{rest}" if rest else key] = value
    return found


# ------------------------------------------------------------------------------------- autoencoders
def test_the_taming_autoencoder_gives_the_reference_output(taming_file):
    module = vqvae.load(taming_file, "taming_f8_small")
    shapes = {name: list(value.shape) for name, value in module.state_dict().items()}
    assert shapes == names("taming_f8_small.json")
    arrays = np.load(DATA / "reference_io.npz")
    x, latent, decoded = (torch.from_numpy(arrays[key]) for key in ("t_x", "t_z", "t_y"))
    z = module.encode(x)
    assert (z - latent).norm() / latent.norm() < 1e-4
    assert (module.decode(z) - decoded).norm() / decoded.norm() < 1e-4
    assert not module.training
    assert not any(p.requires_grad for p in module.parameters())


@pytest.mark.parametrize(
    "kind, size, shape, attended_size",
    [
        ("taming_f8_small", 64, (4, 8, 8), 16),
        ("taming_f8", 256, (4, 32, 32), 32),
        ("taming_f16", 256, (8, 16, 16), 16),
    ],
)
def test_shapes_and_places_of_attention(kind, size, shape, attended_size):
    module = Taming(**VARIANTS[kind], codes=8, ch=32).eval()
    x = torch.zeros(1, 3, size, size)
    seen = []
    for name, part in module.named_modules():
        if name.endswith(("attn.0", "attn.1", "attn.2")):
            part.register_forward_hook(lambda part, args, out: seen.append(args[0].shape[-1]))
    with torch.no_grad():
        z = module.encode(x)
        assert z.shape == (1, *shape)
        assert module.decode(z).shape == x.shape
    # Two blocks of the encoder, three of the decoder.
    assert seen == [attended_size] * 5


@pytest.mark.parametrize(
    "kind, file", [("taming_f8_small", "taming_f8_small.json"), ("river", "river_vqvae.json")]
)
def test_latents_in_bf16_differ_by_less_than_one_percent(kind, file):
    module = vqvae.freeze(autoencoders.build(kind), precision="float32")
    module.load_state_dict(reference_weights(names(file)))
    x = torch.from_numpy(np.load(DATA / "reference_io.npz")["t_x"])
    z = module.encode(x)
    error = (vqvae.freeze(module, precision="bf16").encode(x) - z).norm() / z.norm()
    assert 1e-4 < error < 1e-2, error


def test_attention_calls_the_fused_kernel_with_contiguous_bf16(monkeypatch):
    torch.manual_seed(0)
    attention = Attention(64).requires_grad_(False)
    x = torch.randn(2, 64, 8, 8)
    seen = []
    attend = F.scaled_dot_product_attention

    def spy(q, k, v):
        seen.extend([q, k, v])
        return attend(q, k, v)

    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    with torch.autocast("cpu", torch.bfloat16):
        attention(x)
    assert [(part.shape, part.dtype) for part in seen] == [((2, 1, 64, 64), torch.bfloat16)] * 3
    assert all(part.is_contiguous() for part in seen)
    h = attention.norm(x)
    q, k, v = (part(h).flatten(2) for part in (attention.q, attention.k, attention.v))
    weights = torch.einsum("bci,bcj->bij", q, k).div(8).softmax(-1)
    mixed = torch.einsum("bij,bcj->bci", weights, v).view(2, 64, 8, 8)
    assert torch.allclose(attention(x), x + attention.proj_out(mixed), rtol=0, atol=1e-6)


def test_the_residual_block_of_river_against_its_formula():
    torch.manual_seed(0)
    block, x = autoencoders.build("river").encoder.residuals[0], torch.randn(2, 32, 8, 8)
    for p in block.parameters():
        p.data.add_(0.1 * torch.randn_like(p))

    def norm(h, layer):
        return F.group_norm(h, 32, layer.weight, layer.bias, 1e-6)

    def mean(h):
        even, odd = h[..., ::2, :], h[..., 1::2, :]
        return (even[..., ::2] + odd[..., ::2] + even[..., 1::2] + odd[..., 1::2]) / 4

    h = norm(mean(F.conv2d(x, block.conv1.weight, padding=1)), block.bn1)
    h = norm(F.conv2d(torch.where(h > 0, h, 0.2 * h), block.conv2.weight, padding=1), block.bn2)
    h = h + norm(mean(F.conv2d(x, block.downsample[0].weight)), block.downsample[2])
    assert torch.allclose(block(x), torch.where(h > 0, h, 0.2 * h), atol=1e-5)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda w: {"model": w},
        lambda w: {"model": prefixed("module.", w), "global_step": 7},
        lambda w: {"state_dict": {**w, "loss.perceptual.0": torch.zeros(2)}},
        lambda w: {
            "model": {
                **prefixed("module.ae.backbone.", w),
                "module.vector_field_regressor.x": torch.zeros(1),
            }
        },
    ],
)
def test_layouts_of_an_autoencoder(wrap, river_weights, tmp_path):
    torch.save(wrap(river_weights), tmp_path / "vqvae.pth")
    module = vqvae.load(tmp_path / "vqvae.pth", "river")
    assert_same_weights(module, river_weights)
    z = module.encode(torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0)))
    codes = river_weights["vector_quantizer.embedding.weight"]
    index = torch.cdist(z.movedim(1, -1).reshape(-1, 4), codes).argmin(1)
    chosen = codes[index].view(1, 4, 4, 4).movedim(-1, 1)
    assert torch.allclose(module.decode(z), module.decode(chosen))
    assert not torch.equal(z, chosen)


@pytest.mark.parametrize(
    "change, message",
    [
        (
            lambda w: w.pop("encoder.out_conv.bias"),
            r"v.pth: not weights of this architecture: encoder.out_conv.bias is missing",
        ),
        (lambda w: w.update(head=torch.zeros(1)), "head is unknown"),
        (
            lambda w: w.update({"decoder.conv_in.bias": torch.zeros(3)}),
            r"decoder.conv_in.bias is \(3,\), not \(256,\)",
        ),
    ],
)
def test_wrong_weights_are_refused_by_name(change, message, river_weights, tmp_path):
    weights = dict(river_weights)
    change(weights)
    torch.save({"model": weights}, tmp_path / "v.pth")
    with pytest.raises(UserError, match=message):
        vqvae.load(tmp_path / "v.pth", "river")


def test_a_file_without_an_autoencoder_is_refused(tmp_path):
    for state, message in (
        ({"weights": {}}, "holds neither `state_dict` nor `model`"),
        ({"model": [1]}, "not a dictionary"),
    ):
        torch.save(state, tmp_path / "v.pth")
        with pytest.raises(UserError, match=f"v.pth.*{message}"):
            vqvae.load(tmp_path / "v.pth", "river")


# -------------------------------------------------------------------------------------- main models
SIZES = {"width": 32, "depth": 2, "mid_depth": 1, "heads": 8}


def network(seed: int = 0, **more) -> dict:
    torch.manual_seed(seed)
    return models.build("uvit", (4, 8, 8), **SIZES, **more).state_dict()


def save_with_config(path, state: dict, monkeypatch, **attributes) -> None:
    """Save a state with a config that is an object of the predecessor's class `configs.Config`."""

    class Config:
        pass

    Config.__module__, Config.__qualname__ = "configs", "Config"
    config = Config()
    vars(config).update(attributes)
    with monkeypatch.context() as patch:
        patch.setattr(configs, "Config", Config)
        torch.save({**state, "config": config}, path)


def river_file(path, taming_file=None, **more):
    weights = prefixed("vector_field_regressor.", network(**more))
    if taming_file:
        weights.update(prefixed("ae.", checkpoints.load_checkpoint(taming_file)["state_dict"]))
    torch.save({"model": weights, "optimizer": {}, "lr_scheduler": {}, "global_step": 300}, path)
    return path


def predecessor_file(path, monkeypatch, **attributes):
    path.parent.mkdir(exist_ok=True)
    theirs = {
        "dataset": "kth",
        "interpolant_type": "ours",
        "num_observations": 40,
        "skip_frames": 0,
        "condition_frames": 5,
        "frames_to_generate": 2,
        "overfit": False,
        "load_model_ckpt_path": None,
        "model_state_res": [8, 8],
    }
    state = {
        "model": prefixed("module.vector_field_regressor.", network(1)),
        "ema": prefixed("module.", network(2)),
        "opt": {},
        "step": 250_000,
    }
    save_with_config(path, state, monkeypatch, **{**theirs, **attributes})
    return path


def test_settings_of_a_river_model_come_from_its_weights(tmp_path, taming_file):
    path = river_file(tmp_path / "model.pth", taming_file)
    forecaster, step = load_forecaster(
        path, CPU, {"data.predict": 3, "sample.steps": 7}, dataset="kth"
    )
    config = forecaster.config
    model = config.model
    assert step == 300
    assert (config.flow.interpolant, config.flow.output) == ("linear", "drift")
    assert config.latent.shape == (4, 8, 8)
    assert (model.width, model.depth, model.mid_depth, model.heads) == (32, 2, 1, 8)
    assert (config.data.condition, config.data.predict, config.sample.steps) == (10, 3, 7)
    assert_same_weights(forecaster.net, network())
    assert forecaster.mean.abs().max() == 0 and (forecaster.std == 1).all()
    # The autoencoder comes from the same file.
    assert forecaster.autoencoder.quantize.embedding.weight.shape == (16384, 4)


def test_a_predecessor_model_has_its_averaged_weights(tmp_path, taming_file, monkeypatch):
    path = predecessor_file(tmp_path / "kth_model_ours.pt", monkeypatch)
    forecaster, step = load_forecaster(path, CPU, {"vqvae.ckpt": str(taming_file)})
    config = forecaster.config
    assert (config.dataset, step) == ("kth", 250_000)
    assert (config.flow.interpolant, config.flow.c) == ("follmer", 0.1)
    # As in the config in the file.
    assert (config.data.condition, config.data.predict) == (5, 2)
    assert_same_weights(forecaster.net, network(2))


def test_flags_give_the_settings_that_a_predecessor_file_lacks(tmp_path, taming_file, monkeypatch):
    odd = {"interpolant_type": None, "condition_frames": True}
    odd |= {"frames_to_generate": [3], "dataset": None}
    path = predecessor_file(tmp_path / "kth" / "m.pt", monkeypatch, **odd)
    overrides = {"vqvae.ckpt": str(taming_file)}
    config = load_forecaster(path, CPU, overrides, dataset="kth", interpolant="follmer")[0].config
    assert config.flow.interpolant == "follmer"
    assert config.run_id == "kth-m"
    assert (config.data.condition, config.data.predict) == (10, 30)


@pytest.mark.parametrize(
    "change", [{"config": None}, {"config": "kth"}, {"step": "late"}, {"step": [1], "config": 3}]
)
def test_unusable_entries_of_a_file_are_ignored(change, tmp_path, taming_file):
    path = river_file(tmp_path / "model.pth", taming_file)
    torch.save({**checkpoints.load_checkpoint(path), "global_step": 9, **change}, path)
    assert load_forecaster(path, CPU, dataset="kth")[1] == (0 if "step" in change else 9)


def test_vqvae_ckpt_replaces_the_autoencoder_in_the_file(tmp_path, taming_file):
    path = river_file(tmp_path / "model.pth", taming_file)
    with pytest.raises(UserError, match="nowhere: no such checkpoint"):
        load_forecaster(path, CPU, {"vqvae.ckpt": "nowhere"}, dataset="kth")


def test_batch_normalisation_is_detected_in_the_weights(tmp_path):
    path = river_file(tmp_path / "model.pth", out_norm="bn")
    state = published.convert(checkpoints.load_checkpoint(path), path, "bair_64", {})
    assert state["config"]["model"]["out_norm"] == "bn"
    with pytest.raises(UserError, match="was trained with model.out_norm = bn, not with ln"):
        published.convert(
            checkpoints.load_checkpoint(path), path, "bair_64", {"model.out_norm": "ln"}
        )


@pytest.mark.parametrize(
    "flags, message",
    [
        ({}, "does not say what dataset it was trained with; add --dataset"),
        (
            {"dataset": "kth", "interpolant": "follmer"},
            "was trained with flow.interpolant = linear, not with follmer",
        ),
        (
            {"dataset": "kth", "overrides": {"model.depth": 4}},
            "was trained with model.depth = 2, not with 4",
        ),
        (
            {"dataset": "kth", "overrides": {"model.heads": 4}},
            "was trained with model.heads = 8, not with 4",
        ),
        (
            {"dataset": "kth", "overrides": {"flow.c": 1.0}},
            "was trained with flow.c = 0.1, not with 1.0",
        ),
        (
            {"dataset": "kth", "overrides": {"flow.times": "logit_normal"}},
            "flow.times belongs to the training of",
        ),
        (
            {"dataset": "bair_256"},
            "works on latents of 4 channels, those of --dataset bair_256 have 8",
        ),
        (
            {"dataset": "wmaze"},
            "does not hold its autoencoder; name it: --set vqvae.kind=KIND vqvae.ckpt=FILE",
        ),
        (
            {"dataset": "kth", "overrides": {"vqvae.ckpt": "nowhere.ckpt"}},
            "nowhere.ckpt: no such checkpoint",
        ),
    ],
)
def test_settings_that_contradict_a_river_model_are_refused(flags, message, tmp_path):
    with pytest.raises(UserError, match=message):
        load_forecaster(river_file(tmp_path / "model.pth"), CPU, **flags)


@pytest.mark.parametrize(
    "attributes, flags, message",
    [
        ({}, {"dataset": "clevrer"}, "was trained with dataset = kth, not with clevrer"),
        (
            {},
            {"interpolant": "linear"},
            "was trained with flow.interpolant = follmer, not with linear",
        ),
        ({}, {"overrides": {"data.skip": 3}}, "was trained with data.skip = 0, not with 3"),
        ({"dataset": "nowhere"}, {}, "no dataset `nowhere`"),
        (
            {"interpolant_type": None},
            {},
            "does not say what flow.interpolant it was trained with; add --interpolant",
        ),
        ({"dataset": 5}, {}, "no dataset `5`"),
        ({"dataset": ["kth"]}, {}, "does not say what dataset it was trained with; add --dataset"),
        (
            {"interpolant_type": "other"},
            {},
            "names the interpolant 'other'; known: linear, ours, follmer",
        ),
    ],
)
def test_settings_that_contradict_a_predecessor_model_are_refused(
    attributes, flags, message, tmp_path, monkeypatch
):
    with pytest.raises(UserError, match=message):
        load_forecaster(
            predecessor_file(tmp_path / "m.pt", monkeypatch, **attributes), CPU, **flags
        )


def test_training_starts_from_a_published_model(tmp_path):
    path = river_file(tmp_path / "model.pth")
    sizes = {f"model.{name}": value for name, value in SIZES.items()}
    config = configs.build("kth", {**sizes, "flow.interpolant": "linear"})
    weights = network()
    for name, value in resume.check_start(config, str(path))["ema"].items():
        assert torch.equal(value, weights[name])
    with pytest.raises(UserError, match="flow.interpolant = linear, not with follmer"):
        resume.check_start(configs.build("kth", sizes), str(path))
    deeper = configs.build("kth", {**sizes, "model.depth": 4, "flow.interpolant": "linear"})
    with pytest.raises(UserError, match="its network has other settings .model.depth: 2 -> 4"):
        resume.check_start(deeper, str(path))


# --------------------------------------------------------------- compiled, data-parallel networks
def wrapped(weights: dict, how: str) -> dict:
    """Rename weights: a prefix, or the name of a wrapper around every submodule."""
    if how.endswith("."):
        return prefixed(how, weights)
    return wrapped_inside(weights, how)


WAYS = [*PREFIXES, "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"]


@pytest.mark.parametrize("how", WAYS)
def test_a_published_model_of_a_wrapped_network_loads(how, tmp_path):
    path = tmp_path / "model.pth"
    weights = wrapped(prefixed("vector_field_regressor.", network()), how)
    torch.save({"model": weights}, path)
    state = published.convert(checkpoints.load_checkpoint(path), path, "kth", {})
    own = network()
    assert state["ema"].keys() == own.keys()
    assert all(torch.equal(value, own[name]) for name, value in state["ema"].items())
    # The same file as the start of a training.
    sizes = {f"model.{name}": value for name, value in SIZES.items()}
    config = configs.build("kth", {**sizes, "flow.interpolant": "linear"})
    assert resume.check_start(config, str(path))["ema"].keys() == own.keys()


@pytest.mark.parametrize("how", WAYS)
@pytest.mark.parametrize("kind", ["small", "river"])
def test_an_autoencoder_of_a_wrapped_network_loads(kind, how, river_weights, tmp_path):
    path = tmp_path / "vqvae.pth"
    if kind == "small":
        config = configs.build("ball_stn", {"vqvae.width": 16, "vqvae.depth": 1})
        own = vqvae.build(config.vqvae).state_dict()
        torch.save({"model": wrapped(own, how), "config": configs.to_dict(config)}, path)
    else:
        own = river_weights
        torch.save({"model": wrapped(prefixed("ae.", own), how)}, path)
    loaded = vqvae.load(path, kind).state_dict()
    assert all(torch.equal(value, own[name]) for name, value in loaded.items())


def test_every_part_of_a_checkpoint_loses_its_prefixes(tmp_path):
    net = torch.nn.Linear(2, 2)
    names = ("weight", "bias")
    compiled = torch.compile(torch.nn.Sequential(torch.compile(net))).state_dict()
    assert all("_orig_mod" in name for name in compiled)
    parts = dict.fromkeys(("model", "ema", "vqvae", "state_dict"), compiled)
    torch.save({**parts, "opt": {"module.x": 1}, "step": 3}, tmp_path / "c.pt")
    state = checkpoints.load_checkpoint(tmp_path / "c.pt")
    for part in parts:
        assert set(state[part]) == {f"0.{name}" for name in names}
    assert state["opt"] == {"module.x": 1}


def test_a_name_with_and_without_its_prefix_is_refused(tmp_path):
    weights = {"a.weight": torch.zeros(1), "module.a.weight": torch.ones(1)}
    torch.save({"model": weights}, tmp_path / "c.pt")
    with pytest.raises(UserError, match="holds a.weight both with and without a prefix"):
        checkpoints.load_checkpoint(tmp_path / "c.pt")


# ------------------------------------------------------------------------------------------ hostile
class Hostile:
    """Runs a shell command when it is unpickled."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


@pytest.mark.parametrize("place", ["config", "state", "bare"])
def test_a_file_that_would_run_code_is_refused(place, tmp_path):
    marker = tmp_path / "ran"
    path = tmp_path / "model.pth"
    hostile = Hostile(marker)
    if place == "bare":
        path.write_bytes(pickle.dumps(hostile, protocol=2))
    elif place == "state":
        torch.save(hostile, path)
    else:
        torch.save({"model": network(), "config": hostile}, path)
    commands = [["sample.py", "--ckpt", str(path), "--dataset", "kth"]]
    if place == "config":
        commands.append(["main.py", "--ckpt", str(path), "--set", "wandb.mode=disabled"])
    message = "model.pth: not a checkpoint that can be loaded safely (it would call posix.system)"
    for command in commands:
        done = launch(tmp_path, *command, check=False)
        assert done.returncode == 2 and len(done.stderr.splitlines()) == 1, done.stderr
        assert message in done.stderr
    with pytest.raises(UserError, match="can be loaded safely"):
        vqvae.load(path, "river")
    assert not marker.exists()


def test_a_class_of_an_allowed_name_runs_no_code(tmp_path, monkeypatch):
    """A callable under an allowed name becomes an inert class, and calls of it are refused."""

    class Call:
        def __reduce__(self):
            return Stand, ("touch ran",)

    class Stand:
        pass

    Stand.__module__, Stand.__qualname__ = "configs", "Config"
    with monkeypatch.context() as patch:
        patch.setattr(configs, "Config", Stand)
        torch.save({"model": network(), "config": Call()}, tmp_path / "m.pt")
    with pytest.raises(UserError, match="can be loaded safely"):
        checkpoints.load_checkpoint(tmp_path / "m.pt")


@pytest.mark.parametrize(
    "content",
    [
        b"error code: 1015",
        b"Gone",
        b"this is not it",
        b"about:blank",
        b"\x80\x02.",
        b"",
        b"\x80\x02cevil\x1b[2J\nx\n.",
    ],
)
def test_files_of_other_kinds_are_refused(content, tmp_path):
    (tmp_path / "latest.pt").write_bytes(content)
    message = "latest.pt: not a checkpoint that can be loaded safely"
    with pytest.raises(UserError, match=message) as caught:
        checkpoints.load_checkpoint(tmp_path / "latest.pt")
    assert str(caught.value).isprintable()
    torch.save({"step": 3}, tmp_path / "step_00000003.pt")
    with pytest.warns(UserWarning, match="trying the one before"):
        assert checkpoints.load_latest(tmp_path) == {"step": 3}


# ---------------------------------------------------------------------------------- from end to end
@pytest.fixture(scope="module")
def river_shards(tmp_path_factory):
    """Shards in RIVER's layout, of two real clips."""
    root = tmp_path_factory.mktemp("kth")
    source = ["--source", str(DATA / "walk.mp4"), "--out", str(root / "packed")]
    clips = ["--image_size", "64", "--clip_length", "20", "--val", "0", "--test", "0.34"]
    videos.make(videos.parse([*source, *clips]))
    launch(root, "-m", "prepare.repack", "--source", "packed", "--out", "river")
    with h5py.File(root / "river/test/shard_0001.hdf5") as file:
        assert set(file) == {"len", "0"}
        assert file["len/0"][()] == 20
        assert file["0/19"].compression == "lzf"
    return root / "river"


@pytest.mark.parametrize("layout", ["river", "predecessor"])
def test_published_models_are_sampled_on_river_shards(
    layout, river_shards, taming_file, tmp_path, monkeypatch
):
    sizes = ["--num_videos", "1", "--num_samples", "1", "--num_frames", "2", "--steps", "1"]
    flags = [*sizes, "--out", "forecasts", "--set", f"data.root={river_shards}"]
    if layout == "river":
        path = river_file(tmp_path / "model.pth", taming_file)
        flags = ["--interpolant", "linear", *flags]
    else:
        path = predecessor_file(tmp_path / "model.pt", monkeypatch)
        flags = [*flags, f"vqvae.ckpt={taming_file}"]
    printed = launch(tmp_path, "sample.py", "--ckpt", str(path), "--dataset", "kth", *flags).stdout
    diffusion, given = ("0", 10) if layout == "river" else ("sigma", 5)
    assert f"exact solver, diffusion {diffusion}" in printed
    assert (tmp_path / "forecasts/videos/000.mp4").stat().st_size > 1000
    truth = np.load(tmp_path / "forecasts/truth.npy")
    assert truth.shape == (1, given + 2, 64, 64, 3)
    assert truth.std() > 10
