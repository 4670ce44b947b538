"""data.augment: transforms of albumentations by name, the same for all frames of a clip."""

import numpy as np
import pytest

import configs
from batches.frames import FrameTriples
from batches.transforms import ClipTransform, parse_transforms
from runtime.console import UserError
from shards import Shards, ShardWriter

pytest.importorskip("albumentations")


def test_names_and_parameters_are_parsed():
    parsed = parse_transforms(
        "HorizontalFlip:p=0.5 RandomResizedCrop:scale=0.8,1:p=1 Blur:a=true:b=x"
    )
    assert parsed == [
        ("HorizontalFlip", {"p": 0.5}),
        ("RandomResizedCrop", {"scale": (0.8, 1), "p": 1}),
        ("Blur", {"a": True, "b": "x"}),
    ]


def test_all_frames_of_a_clip_get_the_same_transform():
    frame = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    clip = np.stack([frame] * 3)
    transform = ClipTransform("HorizontalFlip:p=0.5 RandomResizedCrop:scale=0.3,0.9", 16)
    results = [transform(clip, seed) for seed in range(8)]
    for result in results:
        assert result.shape == clip.shape
        assert (result == result[0]).all()
    assert len({result.tobytes() for result in results}) > 4
    assert np.array_equal(transform(clip, 3), results[3])


def test_a_flip_reverses_the_columns():
    clip = np.random.default_rng(0).integers(0, 256, (2, 8, 8, 3), dtype=np.uint8)
    assert np.array_equal(ClipTransform("HorizontalFlip:p=1", 8)(clip, 0), clip[:, :, ::-1])


@pytest.mark.parametrize(
    "text, message",
    [
        ("HorizontalFlop", "no transform 'HorizontalFlop'; nearest known: HorizontalFlip"),
        ("HorizontalFlip:q=1", "HorizontalFlip does not take {'q': 1}"),
        ("RandomResizedCrop:scale=2,3", "RandomResizedCrop does not take"),
        ("HorizontalFlip:p", "must be NAME or NAME:KEY=VALUE"),
        ("Compose", "no transform 'Compose'"),
    ],
)
def test_a_wrong_transform_is_refused_in_one_line(text, message):
    with pytest.raises(UserError) as caught:
        ClipTransform(text, 16)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_transform_that_changes_the_size_is_refused():
    transform = ClipTransform("CenterCrop:height=4:width=4", 8)
    with pytest.raises(UserError, match="must stay uint8"):
        transform(np.zeros((2, 8, 8, 3), np.uint8), 0)


def test_augmentation_does_not_depend_on_the_number_of_processes(tmp_path):
    """Also: either all frames of a clip are flipped or none."""
    # A ramp from left to right, so that a flip changes the first column.
    frame = np.broadcast_to(np.arange(16, dtype=np.uint8)[None, :, None], (16, 16, 3))
    with ShardWriter(tmp_path / "train") as writer:
        writer.add(np.stack([frame] * 20))
    values = {"data.image_size": 16, "data.clip": 4, "train.batch_size": 16}
    values["data.augment"] = "HorizontalFlip:p=0.5"
    config = configs.build(overrides=values)
    assert config.data.augmented
    shards = Shards(tmp_path / "train")
    whole, _ = FrameTriples(config, shards)[3]
    half, _ = FrameTriples(config, shards, rank=1, world=2)[3]
    assert np.array_equal(whole[8:], half)
    flipped = whole[:, :, 0, 0, 0] == 15
    assert (flipped == flipped[:, :1]).all()
    assert 0 < flipped[:, 0].sum() < 16
