"""An update, a roll-out and every autoencoder on fake CUDA tensors: no operation mixes devices, and
the host never waits for the GPU.

Backward passes are torch's code and are not run: every weight gets a gradient of zeros instead.
"""

import dataclasses

import numpy as np
import pytest
import torch
from fake_cuda import GPU, HostWait, fake_cuda, no_host_waits
from torch._subclasses.fake_tensor import DataDependentOutputException

import configs
import interpolants
import shards
import solvers
import train
import vqvae
from batches.frames import apply_jitter, draw_jitter
from batches.latents import LatentTriples
from batches.stream import StreamTriples
from forecaster import Forecaster, build_net
from models import autoencoders
from runtime import parallel
from runtime.process import Process

LATENT = configs.Latent((4, 8, 8), (0.0,) * 4, (1.0,) * 4)
SMALL_NET = {
    "model.size": "",
    "model.width": 16,
    "model.depth": 1,
    "model.mid_depth": 1,
    "model.heads": 2,
}
PROCESS = Process(0, 1, GPU)


def small_config(**options) -> configs.Config:
    config = configs.build(
        "kth", {**SMALL_NET, "train.batch_size": 4, "sample.steps": 2, **options}
    )
    return dataclasses.replace(config, latent=LATENT)


@pytest.fixture
def gpu():
    with fake_cuda():
        yield


@pytest.fixture
def latents(tmp_path):
    """A folder with latents of two videos."""
    rows = np.zeros((200, *LATENT.shape), np.float16)
    shards.write_packed(
        tmp_path / "shard_0001.hdf5",
        "latents",
        rows,
        np.full(2, 100),
        {"continues": False, "fps": 25.0},
    )
    return tmp_path


# -------------------------------------------------------------------- an update
def run_updates(config: configs.Config, source, monkeypatch) -> None:
    """Two updates and averages as train.fit makes them, from batches of `source`."""
    learner = train.build_learner(config, PROCESS)
    forecaster = Forecaster(config, None, None, GPU)

    def set_gradients(loss: torch.Tensor) -> None:
        assert loss.device == GPU and not loss.shape
        for weight in learner.net.parameters():
            weight.grad = torch.zeros_like(weight)

    monkeypatch.setattr(torch.Tensor, "backward", set_gradients)
    with no_host_waits():
        for step, batch in enumerate(source.batches(0, 2)):
            earlier = source.earlier(step) if config.train.own else None
            scalars = train.update(learner, forecaster, batch, step, PROCESS, earlier)
            train.update_ema(
                parallel.local(learner.ema), parallel.local(learner.weights), step, 0.99
            )
    assert all(scalar.device == GPU and not scalar.shape for scalar in scalars.values())


LEVERS = {
    "model.name": "trunk",
    "data.contexts": 2,
    "data.context": "at:1,3",
    "sample.context": "",
    "sample.redraw": "frame",
    "flow.draws": 2,
    "flow.start": 1.0,
}
UPDATES = [
    {},
    {"flow.interpolant": "linear", "flow.output": "residual", "flow.times": "logit_normal"},
    {"flow.interpolant": "bridge", "flow.weight": "velocity", "data.context": "log"},
    {"train.accumulate": 2, "train.recompute": True},
    {"model.name": "convnet", "train.recompute": True, "data.context": "recent:3"},
    {"model.out_norm": "bn"},
    LEVERS,
    {**LEVERS, "flow.noise": 0.2, "train.own": 2, "train.own_steps": 2, "train.accumulate": 2},
    {**LEVERS, "train.optimizer": "muon", "flow.interpolant": "linear"},
]


@pytest.mark.parametrize("options", UPDATES, ids=str)
def test_an_update_waits_for_nothing(gpu, latents, monkeypatch, options):
    config = small_config(**options)
    run_updates(config, LatentTriples(config, latents, GPU), monkeypatch)


@pytest.mark.parametrize("fits", [True, False])
def test_latents_reach_the_gpu_without_a_wait(gpu, latents, monkeypatch, fits):
    if not fits:
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1000, 1000))
    config = small_config()
    source = LatentTriples(config, latents, GPU)
    assert (source.store.parts[0].device == GPU) == fits
    run_updates(config, source, monkeypatch)


@pytest.mark.parametrize("fits", [True, False])
def test_fields_reach_the_gpu_without_a_wait(gpu, tmp_path, monkeypatch, fits):
    if not fits:
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1000, 1000))
    with shards.ShardWriter(tmp_path, "fields") as writer:
        writer.add(np.zeros((200, *LATENT.shape), np.float32))
    config = small_config(**{"vqvae.kind": "none"})
    source = LatentTriples(config, tmp_path, GPU)
    assert (source.store.parts[0].device == GPU) == fits
    run_updates(config, source, monkeypatch)


@pytest.mark.parametrize(
    "mode, name", [("stream", "uvit"), ("stream", "joint"), ("offline", "joint")]
)
def test_an_update_on_a_stream_waits_for_nothing(gpu, latents, monkeypatch, mode, name):
    config = small_config(
        **{"data.mode": mode, "model.name": name, "data.clip": 8, "data.condition": 4}
    )
    run_updates(config, StreamTriples(config, latents, GPU), monkeypatch)


def test_jittered_frames_are_encoded_without_a_wait(gpu):
    settings = configs.Data(brightness=0.1, contrast=0.1, saturation=0.1, hue=0.25)
    jitter = draw_jitter(settings, 4, np.random.default_rng(0))
    frames = torch.rand(4, 3, 3, 16, 16, device=GPU)
    with no_host_waits():
        assert apply_jitter(frames, jitter).device == GPU


# -------------------------------------------------------------------- a roll-out
def small_autoencoder():
    module = autoencoders.build("small", downsample=8, channels=4, codes=16, width=8, depth=1)
    return vqvae.freeze(module, GPU, "auto")


def run_roll_out(**options) -> int:
    """Roll out two frames. Returns the number of operations on the GPU."""
    config = small_config(**{"vqvae.kind": "small", "vqvae.ckpt": "", **options})
    net = build_net(config, GPU).eval()
    forecaster = Forecaster(config, net, small_autoencoder(), GPU)
    given = torch.randn(2, 6, *LATENT.shape, device=GPU)
    forecaster.prepare(2)
    with no_host_waits() as found:
        future = forecaster.roll_out(given, 2, ("key",))
    assert future.device == GPU and future.shape == (2, 2, *LATENT.shape)
    return found.launches


STEPPERS = [name for name in (*solvers.ANY, *solvers.ODE, *solvers.SDE) if name != "dopri5"]


@pytest.mark.parametrize("interpolant", interpolants.TABLE)
@pytest.mark.parametrize("solver", STEPPERS)
def test_a_roll_out_waits_for_nothing(gpu, solver, interpolant):
    diffusions = {"0"} if solver in solvers.ODE else {"sigma", "follmer"}
    for diffusion in diffusions:
        for output in ("drift", "residual"):
            sampler = {"sample.solver": solver, "sample.diffusion": diffusion}
            run_roll_out(**sampler, **{"flow.output": output, "flow.interpolant": interpolant})


ROLL_OUTS = [
    {"sample.reencode": True, "sample.redraw": "frame", "sample.context": "log"},
    {"sample.warm_start": 0.2, "sample.grid": "cosine", "model.name": "convnet"},
    {
        "data.mode": "stream",
        "model.name": "joint",
        "data.clip": 8,
        "data.condition": 4,
        "sample.reencode": True,
    },
]


@pytest.mark.parametrize("options", ROLL_OUTS, ids=str)
def test_roll_outs_of_all_kinds_wait_for_nothing(gpu, options):
    run_roll_out(**options)


def test_solver_coefficients_launch_nothing(gpu):
    """Both solvers evaluate the network once per step. `exact` has more coefficients than `euler`
    and launches at most four operations more per step."""
    linear = {"flow.interpolant": "linear", "sample.steps": 4, "sample.diffusion": "0"}
    euler = run_roll_out(**linear, **{"sample.solver": "euler"})
    exact = run_roll_out(**linear, **{"sample.solver": "exact"})
    evaluations = 2 * 4
    assert abs(exact - euler) <= 4 * evaluations


# -------------------------------------------------------------------- autoencoders
@pytest.mark.parametrize("kind", autoencoders.KINDS)
def test_an_autoencoder_waits_for_nothing(gpu, kind):
    if kind == "small":
        module = small_autoencoder()
    else:
        with torch.device(GPU):
            module = vqvae.freeze(autoencoders.build(kind), GPU, "auto")
    channels = 8 if kind == "taming_f16" else 4
    latent = torch.randn(2, channels, 4, 4, device=GPU)
    size = 64 if kind == "taming_f16" else 32
    stored = kind in ("latents", "none")
    pixels = latent if stored else torch.rand(2, 3, size, size, device=GPU)
    with torch.no_grad(), no_host_waits():
        z, x = module.encode(pixels), module.decode(latent)
    assert z.device == x.device == GPU
    assert z.shape == latent.shape and x.dtype == torch.float32


# -------------------------------------------------------------------- planted errors
CAUGHT = (HostWait, DataDependentOutputException, RuntimeError)


def plant_host_copy(value: torch.Tensor) -> torch.Tensor:
    return value.cpu().to(value.device)


def plant_cpu_tensor(value: torch.Tensor) -> torch.Tensor:
    return value * torch.ones(value.shape)


def plant_item(value: torch.Tensor) -> torch.Tensor:
    return value * value.sum().item()


PLANTS = [plant_host_copy, plant_cpu_tensor, plant_item]


@pytest.mark.parametrize("plant", PLANTS)
def test_a_wait_planted_in_the_update_is_found(gpu, latents, monkeypatch, plant):
    weight = interpolants.Interpolant.weight
    monkeypatch.setattr(interpolants.Interpolant, "weight", lambda it, s: plant(weight(it, s)))
    config = small_config()
    with pytest.raises(CAUGHT):
        run_updates(config, LatentTriples(config, latents, GPU), monkeypatch)


@pytest.mark.parametrize("plant", PLANTS)
def test_a_wait_planted_in_the_roll_out_is_found(gpu, monkeypatch, plant):
    normal = solvers.draw_normal
    monkeypatch.setattr(
        solvers, "draw_normal", lambda like, generator: plant(normal(like, generator))
    )
    with pytest.raises(CAUGHT):
        run_roll_out(**{"flow.interpolant": "follmer"})


@pytest.mark.parametrize("plant", PLANTS)
def test_a_wait_planted_in_an_autoencoder_is_found(gpu, monkeypatch, plant):
    encode = autoencoders.taming.Taming.to_latents
    monkeypatch.setattr(
        autoencoders.taming.Taming, "to_latents", lambda module, x: plant(encode(module, x))
    )
    with pytest.raises(CAUGHT):
        test_an_autoencoder_waits_for_nothing(None, "taming_f8_small")
