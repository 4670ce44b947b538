"""A small VQVAE, which we train for data without published weights."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.autoencoders.layers import lookup, nearest, nearest_index


class ResBlock(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.norm1 = nn.GroupNorm(8, width)
        self.conv1 = nn.Conv2d(width, width, 3, padding=1)
        self.norm2 = nn.GroupNorm(8, width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)
        nn.init.zeros_(self.conv2.weight)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        return x + self.conv2(F.silu(self.norm2(h)))


def count_codes(index: Tensor, codes: int) -> Tensor:
    """The number of times each code was chosen, (codes,) float32, exact up to 2^24.

    Unlike bincount, index_add_ does not synchronise with the GPU.
    """
    ones = torch.ones(len(index), device=index.device)
    return torch.zeros(codes, device=index.device).index_add_(0, index, ones)


def contrast(x: Tensor, window: int = 4) -> Tensor:
    """Root mean square of the detail of x (B, C, H, W) in windows: (B, 1, H / window, W / window).

    The detail is the difference from the mean over 3 x 3 pixels, summed over the channels.
    """
    detail = x - F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)
    power = detail.square().sum(1, keepdim=True)
    # The constant, an amplitude of 0.01, bounds the gradient of the root where x is flat.
    return (F.avg_pool2d(power, window) + 1e-4).sqrt()


class Codebook(nn.Module):
    """K codes of C dimensions, updated without gradients.

    Each code is an exponential moving average of the latents assigned to it (van den Oord et al.
    2017, appendix A.1). A code that has not been chosen for a long time restarts at a latent of
    the batch.
    """

    def __init__(self, codes: int, dim: int, decay: float = 0.99):
        super().__init__()
        self.decay = decay
        self.register_buffer("codes", torch.randn(codes, dim))
        self.register_buffer("count", torch.zeros(codes))
        self.register_buffer("total", torch.zeros(codes, dim))

    @torch.no_grad()
    def update(
        self, z: Tensor, index: Tensor, count: Tensor, generator: torch.Generator | None
    ) -> None:
        """z: (B, C, h, w). index: from nearest_index. count: from count_codes."""
        flat = z.movedim(1, -1).reshape(-1, z.shape[1]).float()
        # In the first update all codes restart, because the initial ones are far from the latents.
        # A tensor, not a bool: a bool would synchronise with the GPU at every update.
        first = ~self.count.any()
        total = torch.zeros_like(self.total).index_add_(0, index, flat)
        self.count.lerp_(count, 1 - self.decay)
        self.total.lerp_(total, 1 - self.decay)
        mean = self.count.mean()
        dead = first | (self.count < 0.01 * mean)
        pick = torch.randint(len(flat), (len(self.codes),), generator=generator, device=flat.device)
        # A restarted code takes the mean count, so that it is not dead again at the next update.
        self.total.copy_(torch.where(dead[:, None], flat[pick] * mean, self.total))
        self.count.copy_(torch.where(dead, mean, self.count))
        self.codes.copy_(self.total / self.count[:, None])


class SmallVQVAE(nn.Module):
    """A VQVAE that trains on two cores in two minutes: all blocks work at latent resolution.

    (B, 3, H, W) in [-1, 1] <-> (B, channels, H / downsample, W / downsample).
    codes: entries of the codebook; 0: none, so that latents are decoded as they are. noise: see
    `disturb`. sharpness: weight in the loss of the squared error of `contrast`. fields: number of
    channels of fields, which are encoded instead of RGB frames; 0: RGB frames. Fields are
    normalised per channel, by `set_statistics`, and not clamped.
    """

    def __init__(
        self,
        downsample: int = 4,
        channels: int = 4,
        codes: int = 1024,
        width: int = 96,
        depth: int = 2,
        noise: float = 0.0,
        sharpness: float = 0.0,
        fields: int = 0,
    ):
        super().__init__()
        f = downsample
        planes = fields or 3
        # Patches overlap by half their stride on each side, so that no shape is cut at a border.
        self.encoder = nn.Sequential(
            nn.Conv2d(planes, width, 2 * f, stride=f, padding=f // 2),
            *[ResBlock(width) for _ in range(depth)],
            nn.GroupNorm(8, width),
            nn.SiLU(),
            nn.Conv2d(width, channels, 1),
        )
        self.codebook = Codebook(codes, channels) if codes else None
        self.noise, self.sharpness = noise, sharpness
        self.decoder = nn.Sequential(
            nn.Conv2d(channels, width, 3, padding=1),
            *[ResBlock(width) for _ in range(depth + 1)],
            nn.GroupNorm(8, width),
            nn.SiLU(),
            nn.Conv2d(width, planes * f * f, 3, padding=1),
            nn.PixelShuffle(f),
        )
        self.of_fields = fields > 0
        if self.of_fields:
            self.register_buffer("mean", torch.zeros(fields, 1, 1))
            self.register_buffer("std", torch.ones(fields, 1, 1))

    def set_statistics(self, mean: Tensor, std: Tensor) -> None:
        """Set the mean and the standard deviation (C,) by which fields are normalised."""
        self.mean.copy_(mean.view(-1, 1, 1))
        self.std.copy_(std.view(-1, 1, 1))

    def normalize(self, x: Tensor) -> Tensor:
        return (x - self.mean) / self.std if self.of_fields else x

    @property
    def blocks(self) -> list[ResBlock]:
        """The residual blocks, whose matrices Muon updates."""
        return [part for part in self.modules() if isinstance(part, ResBlock)]

    def encode(self, x: Tensor) -> Tensor:
        return self.encoder(self.normalize(x))

    def decode(self, z: Tensor) -> Tensor:
        x = self.decoder(z if self.codebook is None else nearest(z, self.codebook.codes))
        return x * self.std + self.mean if self.of_fields else x.clamp(-1, 1)

    def squared_error(self, x: Tensor) -> Tensor:
        """Mean squared error of the reconstruction of each item of x (B, C, H, W) -> (B,).

        Of RGB frames in units of [0, 1], whose peak is 1. Of fields, normalised: 1 is the error of
        the mean field.
        """
        error = self.decode(self.encode(x)) - x
        if self.of_fields:
            return (error / self.std).square().mean((1, 2, 3))
        # Squared errors in [-1, 1] are four times those in [0, 1].
        return error.square().mean((1, 2, 3)) / 4

    def disturb(self, z: Tensor, generator: torch.Generator | None) -> Tensor:
        """Add noise to latents (B, C, h, w), for training: the decoder learns to remove errors of
        forecasts, and the encoder to place similar frames close together.

        The level is uniform in [0, self.noise] per item, in standard deviations of each channel.
        """
        options = {"generator": generator, "device": z.device}
        level = self.noise * torch.rand(len(z), 1, 1, 1, **options)
        scale = z.detach().std((0, 2, 3), keepdim=True)
        return z + level * scale * torch.randn(z.shape, **options)

    def quantize(
        self, z: Tensor, generator: torch.Generator | None
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """-> (codes, commitment loss, values to log). In training mode, also updates the
        codebook."""
        index = nearest_index(z, self.codebook.codes)
        count = count_codes(index, len(self.codebook.codes))
        if self.training:
            self.codebook.update(z.detach(), index, count, generator)
        code = lookup(index, self.codebook.codes, z)
        share = count / len(index)
        perplexity = torch.exp(-(share * (share + 1e-10).log()).sum())
        # Straight-through estimator: the gradient skips the quantisation.
        return z + (code - z).detach(), F.mse_loss(z, code), {"perplexity": perplexity}

    def loss(
        self, x: Tensor, generator: torch.Generator | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """-> (loss, values to log). The values are the reconstruction MSE, as `squared_error`, and
        the codebook's perplexity, if there is one. In training mode, also updates the codebook."""
        x = self.normalize(x)
        z = self.encoder(x).float()
        if self.codebook is None:
            # Latents of mean 0 and variance 1 per channel, so that their noise has a scale.
            mean, std = z.mean((0, 2, 3)), z.std((0, 2, 3))
            penalty = mean.square().mean() + std.clamp(min=1e-6).log().square().mean()
            code, values = z, {}
        else:
            code, penalty, values = self.quantize(z, generator)
        if self.noise:
            code = self.disturb(code, generator)
        reconstruction = self.decoder(code).float()
        error = F.mse_loss(reconstruction, x)
        # The reconstruction error scales the penalty, whose share of the loss therefore stays the
        # same while the error falls.
        loss = error + 0.25 * error.detach() * penalty
        if self.sharpness:
            # The squared error alone blurs edges whose place is uncertain.
            loss = loss + self.sharpness * F.mse_loss(contrast(reconstruction), contrast(x))
        mse = error.detach() if self.of_fields else error.detach() / 4
        return loss, {"mse": mse, **values}
