"""The roles of the axes of an array of fields: video, time, channel, y and x."""

from __future__ import annotations

from prepare.arrays import Stored
from runtime.console import UserError

# The roles of axes, and the names of dimensions that have them, in lower case.
ROLES = {
    "video": ("video", "sample", "trajectory", "run", "member", "number", "realization"),
    "time": ("time", "t", "valid_time", "frame", "step"),
    "channel": ("channel", "channels", "c", "level", "lev", "plev", "pressure_level", "band"),
    "y": ("y", "lat", "latitude", "nav_lat", "height", "row", "j", "south_north", "rlat"),
    "x": ("x", "lon", "longitude", "nav_lon", "width", "column", "i", "west_east", "rlon"),
}
# The axes of an array without names of dimensions, by their number.
USUAL = {
    3: ("time", "y", "x"),
    4: ("time", "channel", "y", "x"),
    5: ("video", "time", "channel", "y", "x"),
}
# An axis without a name that is longer than this is rather time than channels.
MANY_CHANNELS = 32


def find_roles(path: str, array: Stored, axes: str | None) -> tuple[str, ...]:
    """Find the role of each axis of an array: by --axes, by the names of its dimensions, or by
    their number. UserError if this is not clear."""
    where = f"{path}: {array.name} {array.shape}"
    example = "--axes time,channel,y,x (or video, time, channel, y, x in another order)"
    if axes:
        roles = tuple(axes.split(","))
        if len(roles) != len(array.shape):
            raise UserError(f"{where}: --axes {axes} names {len(roles)} axes")
    elif any(array.dims):
        roles = tuple(role_of(name, length) for name, length in zip(array.dims, array.shape))
        if None in roles:
            dims = [name or "(no name)" for name in array.dims]
            raise UserError(
                f"{where}: what is the dimension {dims[roles.index(None)]} of {', '.join(dims)}? "
                f"Name all axes: {example}"
            )
        roles = drop_single(roles, array.shape)
    else:
        roles = USUAL.get(len(array.shape))
        if roles is None:
            raise UserError(f"{where}: {len(array.shape)} axes; name them: {example}")
        channels = array.shape[roles.index("channel")] if "channel" in roles else 1
        if array.shape[-1] <= 4 < channels:
            raise UserError(
                f"{where}: do the channels come last? Name the axes: --axes "
                f"{'video,' if len(roles) == 5 else ''}time,y,x,channel, or {','.join(roles)}"
            )
        if channels > MANY_CHANNELS:
            raise UserError(
                f"{where}: are these {channels} channels? Name the axes: --axes {','.join(roles)}, "
                "or video,time,y,x"
            )
    named = [role for role in roles if role]
    if len(set(named)) < len(named) or not {"time", "y", "x"} <= set(named):
        raise UserError(
            f"{where}: its axes are {', '.join(role or 'one' for role in roles)}, but time, y and "
            f"x are needed, each once; name them: {example}"
        )
    return roles


def drop_single(roles: tuple[str, ...], shape: tuple[int, ...]) -> tuple[str, ...]:
    """Drop the role of an axis of one element, such as a height of 2 m, where a longer axis has the
    same role."""
    kept = []
    for role, length in zip(roles, shape):
        kept.append("" if length == 1 and roles.count(role) > 1 else role)
    return tuple(kept)


def role_of(name: str, length: int) -> str | None:
    """The role of a dimension by its name. Without a known name: "" for one element, else None."""
    for role, names in ROLES.items():
        if name.lower() in names:
            return role
    return "" if length == 1 else None
