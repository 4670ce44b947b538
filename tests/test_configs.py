"""configs.py: the settings of every dataset, their checks, and conversion to and from a dict."""

import pytest

import configs
from runtime.console import UserError


def test_every_dataset_builds_and_survives_a_checkpoint():
    for dataset in configs.DATASETS:
        config = configs.build(dataset)
        assert config.dataset == dataset
        assert configs.from_dict(configs.to_dict(config)) == config


@pytest.mark.parametrize(
    "dataset, size, clip, skip, condition, predict, augmented",
    [("kth", 64, 40, 0, 10, 30, False), ("clevrer", 128, 16, 4, 2, 14, True)],
)
def test_settings_of_kth_and_clevrer_are_the_published_ones(
    dataset, size, clip, skip, condition, predict, augmented
):
    config = configs.build(dataset)
    data, model, train = config.data, config.model, config.train
    assert (data.image_size, data.clip, data.skip) == (size, clip, skip)
    assert (data.condition, data.predict, data.augmented) == (condition, predict, augmented)
    assert (model.name, model.width, model.depth, model.mid_depth) == ("uvit", 768, 4, 5)
    assert (train.batch_size, train.steps) == (256, 400_000)
    assert (train.lr, train.warmup, train.schedule) == (2e-4, 10_000, "constant")
    assert (train.clip_norm, train.weight_decay, train.ema) == (1.0, 0.0, 0.9999)
    flow = config.flow
    assert (flow.c, flow.output, flow.normalize, flow.s_min) == (0.1, "drift", False, 1e-4)
    assert (config.sample.steps, data.context, config.sample.context) == (100, "uniform", "uniform")
    assert data.image_size // config.vqvae.downsample == {"kth": 8, "clevrer": 16}[dataset]


@pytest.mark.parametrize(
    "dataset, size, latent, norm", [("bair_64", 64, (4, 8), "ln"), ("bair_256", 256, (8, 16), "bn")]
)
def test_settings_of_river_for_bair(dataset, size, latent, norm):
    config = configs.build(dataset)
    data, train = config.data, config.train
    assert (data.image_size, data.clip, data.condition, data.predict) == (size, 16, 1, 15)
    assert (config.vqvae.channels, size // config.vqvae.downsample) == latent
    assert config.model.out_norm == norm
    assert (train.lr, train.warmup, train.steps) == (1e-4, 5000, 300_000)
    assert train.weight_decay == 5e-6


@pytest.mark.parametrize(
    "item, message",
    [
        ("train.stepz=3", "no field `train.stepz`; nearest known: train.steps"),
        ("latent.delta=3", "no field `latent.delta`"),
        ("sample.steps=0", "sample.steps must be >= 1, got 0"),
        (
            "data.context=recent:0",
            "data.context must be uniform, log, last, recent:N or at:N,N,… with N >= 1",
        ),
        ("data.image_size=30", "data.image_size must be a multiple of vqvae.downsample = 4"),
        ("model.heads=3", "model.width must be a multiple of model.heads"),
        ("flow.interpolant=folmer", "no interpolant `folmer`; nearest known: follmer"),
        ("sample.diffusion=-1", "sample.diffusion must be"),
        ("train.precision=fp8", "train.precision must be auto, bf16 or float32, got 'fp8'"),
        ("model.size=M", "model.size must be empty, S, B, L, XL, unet or unet_small, got 'M'"),
        ("model.out_norm=bn", "model.out_norm must be ln for trunk, got 'bn'"),
    ],
)
def test_a_wrong_setting_is_refused_in_one_line(item, message):
    with pytest.raises(UserError) as caught:
        configs.build("ball_stn", configs.parse_overrides([item]))
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_an_unknown_dataset_is_refused_and_the_nearest_named():
    with pytest.raises(UserError, match="no dataset `ball_st`; nearest known: ball_stn"):
        configs.build("ball_st")


def test_a_config_with_an_unknown_field_is_refused():
    values = configs.to_dict(configs.build())
    values["train"]["momentum"] = 0.9
    with pytest.raises(UserError, match="train.momentum"):
        configs.from_dict(values)


def test_help_lists_every_setting_with_default_and_comment():
    lines = configs.describe_settings().splitlines()
    values = configs.to_dict(configs.Config())
    for name in configs.settable():
        group, attribute = name.split(".")
        at = lines.index(f"  {name}={values[group][attribute]}")
        assert lines[at + 1].strip(), f"{name} lacks a comment"


def test_network_sizes_are_the_keywords_of_the_network():
    shared = {"width", "depth", "mid_depth", "heads", "dropout"}
    assert set(configs.build("ball_stn").network_sizes) == shared | {"contexts"}
    assert set(configs.build("kth").network_sizes) == shared | {"contexts", "out_norm"}
    joint = configs.build("ball_stn", {"data.mode": "stream", "model.name": "joint"})
    assert set(joint.network_sizes) == shared | {"given", "future"}


@pytest.mark.parametrize("contexts, message", [(0, ">= 1, got 0"), (2, "1 for model.name=joint")])
def test_contexts_are_checked(contexts, message):
    values = {"data.mode": "stream", "model.name": "joint", "data.contexts": contexts}
    with pytest.raises(UserError, match=f"data.contexts must be {message}"):
        configs.build("ball_stn", values)
