"""The settings of any config class: rules, overrides, conversion, --help."""

from dataclasses import dataclass, field
from typing import Annotated, Literal

import pytest

from runtime import settings
from runtime.console import UserError
from runtime.settings import ClosedUnit, HalfOpenUnit, OpenUnit, Positive


@dataclass(frozen=True)
class Oven(settings.Group):
    heat: Positive = 180  # degrees Celsius
    # top: only the upper element.
    # all: every element
    mode: Literal["", "top", "all"] = "all"
    trays: Literal[1, 2] = 1  # number of trays
    fan: bool = False  # turn the fan on
    name: Annotated[str, settings.matches(r"[a-z]*", "lower-case letters")] = ""  # of the oven
    door: ClosedUnit = 0.0  # how far it is open
    damp: HalfOpenUnit = 0.0  # fraction of steam
    dim: OpenUnit = 0.5  # brightness of the lamp


@dataclass(frozen=True)
class Measured:
    weight: tuple[float, ...] = ()


@dataclass(frozen=True)
class Kitchen:
    place: str = "here"
    oven: Oven = field(default_factory=Oven)
    measured: Measured = field(default_factory=Measured)


@pytest.mark.parametrize(
    "values, message",
    [
        ({"heat": 0}, "oven.heat must be >= 1, got 0"),
        ({"mode": "low"}, "oven.mode must be empty, top or all, got 'low'"),
        ({"trays": 3}, "oven.trays must be 1 or 2, got 3"),
        ({"name": "Max"}, "oven.name must be lower-case letters, got 'Max'"),
        ({"door": 1.1}, "oven.door must be in [0, 1], got 1.1"),
        ({"door": float("nan")}, "oven.door must be in [0, 1], got nan"),
        ({"damp": 1.0}, "oven.damp must be in [0, 1), got 1.0"),
        ({"dim": 0.0}, "oven.dim must be in (0, 1), got 0.0"),
    ],
)
def test_a_value_against_its_rule_is_refused(values, message):
    with pytest.raises(UserError) as caught:
        Oven(**values)
    assert str(caught.value) == message


def test_values_at_the_ends_of_a_range_are_accepted():
    assert Oven(heat=1, mode="", trays=2, name="", door=1.0, damp=0.0, dim=0.999)


def test_only_groups_can_be_set():
    kinds = settings.settable(Kitchen)
    assert {name.partition(".")[0] for name in kinds} == {"oven"}
    assert kinds["oven.heat"] is int and kinds["oven.trays"] is int and kinds["oven.mode"] is str


def test_overrides_have_the_types_of_their_fields():
    items = ["oven.heat=1_000", "oven.trays=2", "oven.fan=true", "oven.dim=5e-1", "oven.mode="]
    expected = {
        "oven.heat": 1000,
        "oven.trays": 2,
        "oven.fan": True,
        "oven.dim": 0.5,
        "oven.mode": "",
    }
    assert settings.parse_overrides(Kitchen, items) == expected


@pytest.mark.parametrize(
    "item, message",
    [
        ("oven.heet=3", "no field `oven.heet`; nearest known: oven.heat"),
        ("measured.weight=3", "no field `measured.weight`"),
        ("oven.heat", "--set takes group.field=value, got 'oven.heat'"),
        ("oven.heat=hot", "oven.heat takes int, got 'hot'"),
        ("oven.trays=two", "oven.trays takes int, got 'two'"),
        ("oven.fan=maybe", "oven.fan takes bool, got 'maybe'"),
    ],
)
def test_wrong_overrides_are_named(item, message):
    with pytest.raises(UserError) as caught:
        settings.parse_overrides(Kitchen, [item])
    assert message in str(caught.value)


def test_update_checks_the_new_values():
    changed = settings.update(Kitchen(), {"oven.heat": 200, "oven.fan": True})
    assert (changed.oven.heat, changed.oven.fan, changed.oven.mode) == (200, True, "all")
    with pytest.raises(UserError, match="oven.heat must be >= 1"):
        settings.update(Kitchen(), {"oven.heat": -1})


def test_from_dict_fills_in_defaults_and_restores_tuples():
    values = {"oven": {"heat": 90}, "measured": {"weight": [1.0, 2.0]}}
    expected = Kitchen(oven=Oven(heat=90), measured=Measured((1.0, 2.0)))
    assert settings.from_dict(Kitchen, values) == expected
    with pytest.raises(UserError, match="oven.lid, which this version does not know"):
        settings.from_dict(Kitchen, {"oven": {"lid": 1}})


def test_differences_name_the_fields():
    new = settings.update(Kitchen(), {"oven.heat": 200, "oven.mode": "top"})
    assert settings.differences(Kitchen(), new, ("oven",)) == [
        "oven.heat: 180 -> 200",
        "oven.mode: 'all' -> 'top'",
    ]


def test_a_preset_joins_groups_and_the_last_value_counts():
    base = settings.preset(oven={"heat": 100, "fan": True})
    assert settings.preset(base, oven={"heat": 150}) == {"oven.heat": 150, "oven.fan": True}


def test_comments_stand_behind_a_field_or_above_it():
    comments = settings.comments_of(Oven)
    assert comments["heat"] == "degrees Celsius"
    assert comments["mode"] == "top: only the upper element. all: every element"


def test_help_is_wrapped_to_the_terminal(monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    lines = settings.describe(Kitchen).splitlines()
    at = lines.index("  oven.mode=all")
    assert lines[at + 1 : at + 3] == [
        "      top: only the upper element.",
        "      all: every element",
    ]
