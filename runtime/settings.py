"""Settings, as a frozen dataclass whose fields are groups: parse and check `--set
group.field=value`, list all settings for --help, convert to and from a nested dict.

A group is a frozen dataclass that derives from Group. Fields of the outer dataclass that are not
groups cannot be set.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import inspect
import re
import shutil
import textwrap
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Annotated, Any, Literal, NamedTuple, get_args, get_origin, get_type_hints

from runtime.console import UserError

INDENT = "      "  # of the comments in --help


# -------------------------------------------------------------------------------------------- rules
class Rule(NamedTuple):
    """A rule for the values of a setting, given in the type of the field:
    Annotated[int, Rule(...)]."""

    text: str  # completes the sentence `sample.steps must be ...`
    holds: Callable[[Any], Any]


def at_least(low: float) -> Rule:
    return Rule(f">= {low}", lambda value: value >= low)


def matches(pattern: str, text: str) -> Rule:
    return Rule(text, re.compile(pattern).fullmatch)


Positive = Annotated[int, at_least(1)]
NonNegative = Annotated[int, at_least(0)]
OpenUnit = Annotated[float, Rule("in (0, 1)", lambda x: 0 < x < 1)]
HalfOpenUnit = Annotated[float, Rule("in [0, 1)", lambda x: 0 <= x < 1)]
ClosedUnit = Annotated[float, Rule("in [0, 1]", lambda x: 0 <= x <= 1)]


def check(ok: Any, name: str, rule: str, value: object) -> None:
    """Raise UserError unless `ok`: `name must be rule, got value`."""
    if not ok:
        raise UserError(f"{name} must be {rule}, got {value!r}")


def check_choice(name: str, value: object, choices: Iterable) -> None:
    """Raise UserError unless `value` is one of the choices."""
    choices = list(choices)
    *others, last = [str(choice) or "empty" for choice in choices]
    check(value in choices, name, f"{', '.join(others)} or {last}", value)


class Group:
    """Base class of a group of settings. The name of the class, in lower case, is the group's name.

    Every field has a default, and a comment behind it or in the lines above it. Values are checked
    against the type of the field: a Literal by its choices, an Annotated type by its rules.
    """

    def __post_init__(self):
        group = type(self).__name__.lower()
        for attribute, kind in get_type_hints(type(self), include_extras=True).items():
            name, value = f"{group}.{attribute}", getattr(self, attribute)
            if get_origin(kind) is Literal:
                check_choice(name, value, get_args(kind))
            for rule in getattr(kind, "__metadata__", ()):
                check(rule.holds(value), name, rule.text, value)


# ----------------------------------------------------------------------------- reading and changing
def preset(*presets: dict[str, Any], **groups: dict[str, Any]) -> dict[str, Any]:
    """Merge presets and group={field: value} into {"group.field": value}. The last value counts."""
    values = {}
    for earlier in presets:
        values |= earlier
    for group, fields in groups.items():
        for name, value in fields.items():
            values[f"{group}.{name}"] = value
    return values


def groups_of(config: type) -> dict[str, type]:
    """{group: class} of the groups of a config class."""
    hints = get_type_hints(config)
    return {name: kind for name, kind in hints.items() if issubclass(kind, Group)}


def settable(config: type) -> dict[str, type]:
    """{"group.field": type} of every field that --set can set."""
    kinds = {}
    for group, cls in groups_of(config).items():
        for name, kind in get_type_hints(cls).items():
            # All choices of a Literal have the same type.
            choices = get_args(kind) if get_origin(kind) is Literal else ()
            kinds[f"{group}.{name}"] = type(choices[0]) if choices else kind
    return kinds


def parse_overrides(config: type, items: list[str]) -> dict[str, Any]:
    """["train.lr=1e-3", …] -> {"train.lr": 0.001, …}.

    UserError for an unknown field, with the nearest known one, and for a value of another type.
    """
    kinds = settable(config)
    values = {}
    for item in items:
        name, equals, text = item.partition("=")
        if not equals:
            raise UserError(f"--set takes group.field=value, got {item!r}")
        if name not in kinds:
            close = difflib.get_close_matches(name, kinds, 1, cutoff=0.0)[0]
            raise UserError(f"no field `{name}`; nearest known: {close}")
        values[name] = parse_value(name, text, kinds[name])
    return values


def parse_value(name: str, text: str, kind: type) -> Any:
    """Convert the text of a setting to its type: int, float, bool or str."""
    try:
        if kind is bool:
            return {"1": True, "true": True, "0": False, "false": False}[text.lower()]
        return kind(text.replace("_", "")) if kind in (int, float) else text
    except (KeyError, ValueError):
        raise UserError(f"{name} takes {kind.__name__}, got {text!r}") from None


def update(config: Any, values: dict[str, Any]) -> Any:
    """Copy a config with other values, {"group.field": value}. The copy is checked."""
    groups: dict[str, dict] = {}
    for name, value in values.items():
        group, attribute = name.split(".")
        groups.setdefault(group, {})[attribute] = value
    changed = {name: replace(getattr(config, name), **values) for name, values in groups.items()}
    return replace(config, **changed)


def differences(old: Any, new: Any, groups: tuple[str, ...]) -> list[str]:
    """The fields of these groups in which two configs differ, as `group.field: old -> new`."""
    found = []
    for group in groups:
        before = dataclasses.asdict(getattr(old, group))
        after = dataclasses.asdict(getattr(new, group))
        for name, value in before.items():
            if value != after[name]:
                found.append(f"{group}.{name}: {value!r} -> {after[name]!r}")
    return found


def from_dict(config: type, values: dict[str, Any]) -> Any:
    """The inverse of dataclasses.asdict. A field that is absent from `values` has its default.

    UserError for a field of a group that the config class does not have.
    """
    built = {}
    for name, kind in get_type_hints(config).items():
        value = values.get(name)
        if value is None:
            continue
        if dataclasses.is_dataclass(kind):
            known = {field.name for field in dataclasses.fields(kind)}
            if unknown := sorted(set(value) - known):
                raise UserError(
                    f"the checkpoint's config has {name}.{unknown[0]}, which this version does "
                    "not know"
                )
            # Fields that hold several values are tuples; JSON and checkpoints may hold lists.
            value = kind(**{k: tuple(v) if isinstance(v, list) else v for k, v in value.items()})
        built[name] = value
    return config(**built)


# ----------------------------------------------------------------------------------------- --help
def describe(config: type) -> str:
    """List every setting with its default and its comment, by group, for --help."""
    width = shutil.get_terminal_size().columns - 2
    lines = [
        "settings for --set, with their defaults",
        "(a dataset may change them; --dry_run 1 prints the values of a run):",
    ]
    for group, cls in groups_of(config).items():
        lines += ["", f"{group}:"]
        for name, comment in comments_of(cls).items():
            lines.append(f"  {group}.{name}={getattr(cls, name)}")
            lines.append(
                textwrap.fill(comment, width, initial_indent=INDENT, subsequent_indent=INDENT)
            )
    return "\n".join(lines)


def comments_of(cls: type) -> dict[str, str]:
    """{field: comment} of a dataclass: the comment lines directly above a field, or the comment
    behind it."""
    source = inspect.getsource(cls)
    lines = source.split("\n")
    comments = {}
    for item in ast.parse(source).body[0].body:
        if not isinstance(item, ast.AnnAssign):
            continue
        above = []
        # The line above the field: lineno counts from 1.
        at = item.lineno - 2
        while lines[at].strip().startswith("#"):
            above.insert(0, lines[at].strip().removeprefix("# "))
            at -= 1
        behind = lines[item.end_lineno - 1][item.end_col_offset :].strip()
        comments[item.target.id] = " ".join(above) or behind.removeprefix("# ")
    return comments
