"""Random transforms of clips by albumentations, as `data.augment` names them."""

from __future__ import annotations

import inspect
import os
import warnings
from types import ModuleType

import numpy as np

from runtime.console import UserError, first_line, nearest


def import_albumentations() -> ModuleType:
    """Import albumentations. UserError if it is not installed."""
    # The import contacts the network unless this is set.
    os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"
    try:
        import albumentations
    except ModuleNotFoundError:
        raise UserError(
            "data.augment needs albumentations, which is not installed: "
            "pip install albumentations==2.0.8, or set data.augment="
        ) from None
    return albumentations


def parse_transforms(text: str) -> list[tuple[str, dict[str, object]]]:
    """Parse "HorizontalFlip:p=0.5 RandomResizedCrop:scale=0.8,1" into (name, parameters) pairs.

    Parameters follow the name, separated by colons. A value is a number, a comma-separated tuple
    of numbers, true, false, or a string. UserError for a parameter without a value.
    """
    parsed = []
    for item in text.split():
        name, *pairs = item.split(":")
        parameters = {}
        for pair in pairs:
            key, equals, value = pair.partition("=")
            if not (key and equals and value):
                raise UserError(f"data.augment: {item!r} must be NAME or NAME:KEY=VALUE:KEY=VALUE")
            values = tuple(parse_value(part) for part in value.split(","))
            parameters[key] = values if len(values) > 1 else values[0]
        parsed.append((name, parameters))
    return parsed


def parse_value(text: str) -> bool | int | float | str:
    if text in ("true", "false"):
        return text == "true"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


class ClipTransform:
    """The transforms of `data.augment` in order, with the same random parameters for all frames
    of a clip."""

    def __init__(self, text: str, image_size: int):
        albumentations = import_albumentations()
        transforms = []
        for name, parameters in parse_transforms(text):
            transform = getattr(albumentations, name, None)
            # `apply_to_images` is the method that transforms all frames of a clip alike.
            if not (inspect.isclass(transform) and hasattr(transform, "apply_to_images")):
                known = [known for known in dir(albumentations) if known[0].isupper()]
                close = nearest(name, known).partition(" (all:")[0]
                raise UserError(f"data.augment: albumentations has no transform {name!r}{close}")
            if "size" in inspect.signature(transform.__init__).parameters:
                parameters = {"size": (image_size, image_size), **parameters}
            transforms.append(build_transform(transform, name, parameters))
        self.compose = albumentations.Compose(transforms)
        self.image_size = image_size

    def __call__(self, frames: np.ndarray, seed: int) -> np.ndarray:
        """Transform a clip (T, H, W, 3) uint8 -> the same shape and type.

        seed: of the random parameters.
        """
        self.compose.set_random_seed(seed % 2**32)
        transformed = self.compose(images=frames)["images"]
        if transformed.shape != frames.shape or transformed.dtype != frames.dtype:
            raise UserError(
                f"data.augment: frames become {transformed.dtype} {transformed.shape[1:]}, but "
                f"must stay {frames.dtype} {frames.shape[1:]}"
            )
        return transformed


def build_transform(transform: type, name: str, parameters: dict[str, object]) -> object:
    """Build a transform. UserError for parameters that it does not take."""
    try:
        with warnings.catch_warnings():
            # albumentations warns of an unknown parameter and ignores it.
            warnings.simplefilter("error")
            return transform(**parameters)
    except (TypeError, ValueError, UserWarning) as error:
        why = " ".join(str(error).split())[:160] or first_line(error)
        raise UserError(f"data.augment: {name} does not take {parameters}: {why}") from None
