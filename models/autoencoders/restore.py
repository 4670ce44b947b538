"""Restore in forecast frames what an autoencoder loses of a scene that does not change.

An autoencoder blurs the fine detail of a background. The last given frame y shows the detail, so
where a decoded forecast equals the decoded last frame, its error y - decode(encode(y)) is added.
Where a forecast differs, it stays as it is: a scene filmed by a moving camera is not changed.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

# Width and height, in pixels, of the window over which frames are compared.
WINDOW = 5


def restore(x: Tensor, decoded: Tensor, last: Tensor, level: float) -> Tensor:
    """Forecast frames with the detail of the last given frame, (n, 3, H, W) in [-1, 1].

    x: the decoded forecasts. decoded, last: the last given frame of each, decoded and as given, all
    (n, 3, H, W) in [-1, 1]. level: where x and decoded differ by `level`, exp(-1/2) of the detail
    is added. The difference is a root mean square over the window and the channels, in units of the
    range of values.
    """
    difference = (x - decoded).square().mean(1, keepdim=True) / 4
    difference = F.avg_pool2d(difference, WINDOW, 1, WINDOW // 2, count_include_pad=False)
    share = (-difference / (2 * level**2)).exp()
    return (x + share * (last - decoded)).clamp(-1, 1)
