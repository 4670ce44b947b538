"""Protocols by name: their fields, changes of fields, and the names of changed protocols."""

import pytest

import configs
from evaluation import protocols
from runtime.console import UserError


def test_every_protocol_has_its_name_and_a_description():
    for name, protocol in protocols.PROTOCOLS.items():
        said = protocols.describe(protocol.to_metadata(["fvd", "lpips"]))
        assert protocol.name == name and protocol.source and str(protocol.videos) in said[0]
    kth = configs.build("kth")
    assert (
        protocols.get("srvp_kth", kth, {}).fvd_given
        and not protocols.get("river_kth", kth, {}).fvd_given
    )
    assert protocols.get("bair", configs.build("bair_64"), {}).compared == 100


def test_a_description_covers_only_the_measured_metrics():
    protocol = protocols.PROTOCOLS["srvp_kth"]
    told = protocol.to_metadata(["psnr", "fvd"])
    assert told["fvd_given"] is True and told["samples_per_video"] == 100
    assert set(told) == protocols.FIELDS - {"datasets", "stream", "frames", "oracle"}
    assert "fvd" in "".join(protocols.describe(told)) and "fvd" not in "".join(
        protocols.describe(protocol.to_metadata(["psnr"]))
    )


def test_own_takes_the_checkpoints_task():
    protocol = protocols.get("own", configs.build("clevrer"), {})
    assert (protocol.condition, protocol.predict) == (2, 14)


def test_a_changed_protocol_has_another_name():
    config = configs.build("ball_stn")
    changed = protocols.get(
        "lifelong_ball", config, {"videos": 16, "samples": None, "rule": "best"}
    )
    assert changed.name == "lifelong_ball-rule_best-videos_16" and changed.samples == 4
    assert protocols.get("lifelong_ball", config, {"videos": 64}).name == "lifelong_ball"


@pytest.mark.parametrize(
    "name, changes, message",
    [
        ("lifelong_bal", {}, "no protocol `lifelong_bal`; nearest known: lifelong_ball"),
        ("srvp_kth", {}, "protocol srvp_kth is for kth, the checkpoint is of ball_stn"),
        ("own", {"videos": 0}, "videos must be >= 1, got 0"),
        ("own", {"rule": "worst"}, "rule must be one of mean, first, best"),
        ("own", {"fvd_chunk": 4}, "must be 0 or >= 10 .I3D needs 10 frames., got 4"),
        ("own", {"fvd_samples": -1}, "fvd_samples must be >= 0"),
    ],
)
def test_mistakes_are_named(name, changes, message):
    with pytest.raises(UserError, match=message):
        protocols.get(name, configs.build("ball_stn"), changes)
