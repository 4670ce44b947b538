"""The networks that metrics use: I3D, whose logits FVD and KVD compare, and LPIPS.

`python -m prepare.metric_weights` writes their weights as safetensors files.
"""

from __future__ import annotations

import warnings
from collections import OrderedDict
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from tqdm import tqdm

from runtime import checkpoints
from runtime.console import UserError, first_line
from runtime.process import uses_bf16

COMMAND = "python -m prepare.metric_weights"
# I3D: height and width in pixels, minimum number of frames, Kinetics classes.
SIDE, MIN_FRAMES, CLASSES = 224, 10, 400
# Backbone of LPIPS -> minimum height and width in pixels.
NETS = {"alex": 31, "vgg": 16}

# Block of I3D -> channels: input, branch 0, branch 1 (two convolutions), branch 2 (two), branch 3.
MIXED = {
    "Mixed_3b": (192, 64, 96, 128, 16, 32, 32),
    "Mixed_3c": (256, 128, 128, 192, 32, 96, 64),
    "Mixed_4b": (480, 192, 96, 208, 16, 48, 64),
    "Mixed_4c": (512, 160, 112, 224, 24, 64, 64),
    "Mixed_4d": (512, 128, 128, 256, 24, 64, 64),
    "Mixed_4e": (512, 112, 144, 288, 32, 64, 64),
    "Mixed_4f": (528, 256, 160, 320, 32, 128, 128),
    "Mixed_5b": (832, 256, 160, 320, 32, 128, 128),
    "Mixed_5c": (832, 384, 192, 384, 48, 128, 128),
}
# Block -> kernel and stride of the max-pool before it.
POOLED = {
    "Mixed_3b": ((1, 3, 3), (1, 2, 2)),
    "Mixed_4b": ((3, 3, 3), (2, 2, 2)),
    "Mixed_5b": ((2, 2, 2), (2, 2, 2)),
}


# ---------------------------------------------------------------------------------------------- I3D
def same_padding(size: int, kernel: int, stride: int) -> tuple[int, int]:
    """Padding (before, after) of TensorFlow's "SAME": ceil(size / stride) windows fit, and an odd
    pixel goes after.
    """
    total = max(0, (-(-size // stride) - 1) * stride + kernel - size)
    return total // 2, total - total // 2


def same_max_pool(x: Tensor, kernel: tuple[int, ...], stride: tuple[int, ...]) -> Tensor:
    """Max-pool of (B, C, T, H, W) with "SAME" padding, which is never the maximum. ceil_mode adds
    the odd pixel after the end.
    """
    before = [same_padding(size, k, s)[0] for size, k, s in zip(x.shape[2:], kernel, stride)]
    return F.max_pool3d(x, kernel, stride, before, ceil_mode=True)


class Unit(nn.Module):
    """Convolution with "SAME" padding, batch normalisation without scale, ReLU."""

    def __init__(self, width: int, out: int, kernel: int = 1, stride: int = 1):
        super().__init__()
        self.stride, self.folded = stride, False
        self.weight = nn.Parameter(torch.empty(out, width, kernel, kernel, kernel))
        self.bias = nn.Parameter(torch.empty(out))
        self.register_buffer("mean", torch.empty(out))
        self.register_buffer("var", torch.empty(out))

    @torch.no_grad()
    def fold(self) -> None:
        """Merge the batch normalisation into weight and bias, in float64."""
        scale = (self.var.double() + 1e-3).rsqrt()
        self.weight.copy_(self.weight.double() * scale.view(-1, 1, 1, 1, 1))
        self.bias.copy_(self.bias.double() - self.mean.double() * scale)
        self.folded = True

    def forward(self, x: Tensor) -> Tensor:
        kernel = self.weight.shape[-1]
        last = x.is_contiguous(memory_format=torch.channels_last_3d)
        # With channels last, a 1x1x1 convolution is a matrix product, without a copy of x.
        if kernel == 1 and self.folded and last:
            x = F.linear(x.movedim(1, -1), self.weight.flatten(1), self.bias)
            return x.movedim(-1, 1).relu_()
        pads = [same_padding(size, kernel, self.stride) for size in x.shape[2:]]
        padding = [before for before, _ in pads]
        # conv3d pads both sides alike, so unequal padding is added to x itself.
        if any(before != after for before, after in pads):
            x, padding = F.pad(x, [pad for pair in reversed(pads) for pad in pair]), 0
        x = F.conv3d(x, self.weight, self.bias if self.folded else None, self.stride, padding)
        if not self.folded:
            x = F.batch_norm(x, self.mean, self.var, None, self.bias, eps=1e-3)
        # With one thread, conv3d returns another memory layout, in which later layers are slower.
        return (x.contiguous(memory_format=torch.channels_last_3d) if last else x).relu_()


def chain(**modules: nn.Module) -> nn.Sequential:
    return nn.Sequential(OrderedDict(modules))


class Mixed(nn.Module):
    """Four parallel branches, concatenated along the channels."""

    def __init__(self, width: int, out0: int, in1: int, out1: int, in2: int, out2: int, out3: int):
        super().__init__()
        self.Branch_0 = chain(Conv3d_0a_1x1=Unit(width, out0))
        self.Branch_1 = chain(Conv3d_0a_1x1=Unit(width, in1), Conv3d_0b_3x3=Unit(in1, out1, 3))
        self.Branch_2 = chain(Conv3d_0a_1x1=Unit(width, in2), Conv3d_0b_3x3=Unit(in2, out2, 3))
        self.Branch_3 = chain(Conv3d_0b_1x1=Unit(width, out3))

    def forward(self, x: Tensor) -> Tensor:
        pooled = same_max_pool(x, (3, 3, 3), (1, 1, 1))
        return torch.cat(
            [self.Branch_0(x), self.Branch_1(x), self.Branch_2(x), self.Branch_3(pooled)], 1
        )


class I3D(nn.Module):
    """Inception-I3D for RGB, trained on Kinetics-400 (Carreira and Zisserman, arXiv 1705.07750)."""

    bf16, layout = False, torch.contiguous_format

    def __init__(self):
        super().__init__()
        self.Conv3d_1a_7x7 = Unit(3, 64, 7, stride=2)
        self.Conv3d_2b_1x1, self.Conv3d_2c_3x3 = Unit(64, 64), Unit(64, 192, 3)
        for name, sizes in MIXED.items():
            self.add_module(name, Mixed(*sizes))
        self.Logits = chain(Conv3d_0c_1x1=nn.Conv3d(1024, CLASSES, 1))

    def fold(self) -> I3D:
        """Merge all batch normalisations into the convolutions."""
        for module in self.modules():
            if isinstance(module, Unit) and not module.folded:
                module.fold()
        return self

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, T, 224, 224) in [-1, 1], T >= 9 -> logits (B, 400), averaged over time."""
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.bf16), exact_convolutions():
            x = self.Conv3d_1a_7x7(x.contiguous(memory_format=self.layout))
            x = same_max_pool(x, (1, 3, 3), (1, 2, 2))
            x = self.Conv3d_2c_3x3(self.Conv3d_2b_1x1(x))
            for name in MIXED:
                x = getattr(self, name)(same_max_pool(x, *POOLED[name]) if name in POOLED else x)
            with torch.autocast(x.device.type, enabled=False):
                return self.Logits(F.avg_pool3d(x.float(), (2, 7, 7), 1)).mean((2, 3, 4))


def exact_convolutions():
    """Disable TF32 on GPUs, so that features can be compared between machines."""
    return torch.backends.cudnn.flags(enabled=True, benchmark=False, allow_tf32=False)


def read_weights(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file."""
    if not path.is_file():
        raise UserError(f"{path}: no such file; make it by `{COMMAND}`")
    try:
        return load_file(path)
    except SafetensorError as error:
        raise UserError(
            f"{path}: not a safetensors file ({first_line(error)[:120]}); delete it and run "
            f"`{COMMAND}`"
        ) from None


def load_i3d(
    path: str | Path, device: torch.device | str = "cpu", precision: str = "float32"
) -> nn.Module:
    """Load the frozen I3D from i3d.safetensors: (B, 3, T, 224, 224) in [-1, 1] -> logits (B, 400).

    precision: as train.precision. Published figures need float32 features.
    """
    path, device = Path(path), torch.device(device)
    weights, model = read_weights(path), I3D()
    checkpoints.load_weights(model, weights, path)
    model.bf16 = uses_bf16(precision, device)
    # On a CPU this layout takes half the time; on GPUs cuDNN has few float32 kernels for it.
    if device.type == "cpu":
        model.layout = torch.channels_last_3d
    return model.fold().to(device, memory_format=model.layout).eval().requires_grad_(False)


def resize_for_i3d(videos: np.ndarray, device: torch.device | str = "cpu") -> Tensor:
    """Resize videos (B, T, H, W, 3) uint8 for I3D -> (B, 3, T, 224, 224) in [-1, 1].

    Bilinear with half-pixel centres and without antialiasing (F.interpolate, align_corners=False),
    as in PyTorch implementations of FVD. TensorFlow 1 has no half-pixel centres: its frames are
    shifted by (224 / H - 1) / 2 pixels, which changed the logits of a 64-pixel clip by a fifth of
    their norm. Do not compare FVDs computed with the two conventions.
    """
    B, T, H, W, _ = videos.shape
    frames = torch.tensor(videos).to(device).view(B * T, H, W, 3).permute(0, 3, 1, 2)
    frames = F.interpolate(frames.float(), (SIDE, SIDE), mode="bilinear", align_corners=False)
    return frames.mul_(2 / 255).sub_(1).unflatten(0, (B, T)).transpose(1, 2)


def i3d_features(
    model: nn.Module,
    videos: np.ndarray,
    device: torch.device | str = "cpu",
    batch: int = 8,
    bar: tqdm | None = None,
) -> np.ndarray:
    """I3D's logits of videos (N, T, H, W, 3) uint8, T >= 10 -> (N, 400) float32.

    batch: videos per call; each needs about 4 MB per frame. bar: progress bar, counted in videos.
    """
    if videos.dtype != np.uint8 or videos.ndim != 5 or videos.shape[-1] != 3:
        raise ValueError(f"videos must be (N, T, H, W, 3) uint8, not {videos.shape} {videos.dtype}")
    if videos.shape[1] < MIN_FRAMES:
        raise UserError(
            f"I3D needs videos of at least {MIN_FRAMES} frames, these have {videos.shape[1]}; "
            "forecast more frames"
        )
    features = np.empty((len(videos), CLASSES), np.float32)
    with torch.inference_mode():
        for start in range(0, len(videos), batch):
            part = slice(start, start + batch)
            features[part] = model(resize_for_i3d(videos[part], device)).float().cpu().numpy()
            if bar is not None:
                bar.update(len(features[part]))
    return features


# -------------------------------------------------------------------------------------------- LPIPS
def load_lpips(dir: str | Path, net: str = "alex", device: torch.device | str = "cpu") -> nn.Module:
    """Load the frozen LPIPS v0.1 (Zhang et al., arXiv 1801.03924) from lpips_<net>.safetensors in
    `dir`: two images (B, 3, H, W) in [-1, 1] -> (B, 1, 1, 1).

    net: alex (the usual choice for publications) or vgg. Nothing is downloaded.
    """
    if net not in NETS:
        raise UserError(f"LPIPS has no network {net!r}; choose one of {', '.join(NETS)}")
    path = Path(dir) / f"lpips_{net}.safetensors"
    weights = read_weights(path)
    with torch.device("meta"), warnings.catch_warnings():
        # lpips uses deprecated names of torchvision.
        warnings.simplefilter("ignore")
        try:
            # Imported late, because lpips imports scipy.
            import lpips
        except ModuleNotFoundError:
            raise UserError(
                "LPIPS needs the package lpips, which is not installed: pip install lpips==0.1.4, "
                "or choose --metrics without lpips"
            ) from None
        model = lpips.LPIPS(pretrained=False, net=net, pnet_rand=True, verbose=False)
    # lpips.LPIPS registers each linear head under two names, lin0 and lins.0.
    heads = {}
    for name, value in weights.items():
        if name.startswith("lin"):
            heads[f"lins.{name[3:]}"] = value
    scaling = model.scaling_layer.state_dict(prefix="scaling_layer.")
    checkpoints.load_weights(model, {**weights, **heads, **scaling}, path, assign=True)
    return model.to(device).eval().requires_grad_(False)


def lpips_distance(
    model: nn.Module,
    a: np.ndarray,
    b: np.ndarray,
    device: torch.device | str = "cpu",
    batch: int = 32,
) -> np.ndarray:
    """LPIPS between corresponding frames of a and b, both (N, H, W, 3) uint8 -> (N,) float32."""
    if (
        a.shape != b.shape
        or a.ndim != 4
        or a.shape[-1] != 3
        or a.dtype != np.uint8
        or b.dtype != np.uint8
    ):
        raise ValueError(
            f"frames must be (N, H, W, 3) uint8 of equal shapes, got {a.shape} {a.dtype} and "
            f"{b.shape} {b.dtype}"
        )
    # Smaller frames would vanish in the strides of the backbone.
    least = NETS[model.pnet_type]
    if min(a.shape[1:3]) < least:
        raise UserError(
            f"LPIPS ({model.pnet_type}) needs frames of at least {least} pixels, these are "
            f"{a.shape[1]}x{a.shape[2]}"
        )
    distance = np.empty(len(a), np.float32)
    with torch.inference_mode(), exact_convolutions():
        for start in range(0, len(a), batch):
            part = slice(start, start + batch)
            pair = [torch.tensor(x[part]).to(device).permute(0, 3, 1, 2) for x in (a, b)]
            pair = [x.float().mul_(2 / 255).sub_(1) for x in pair]
            distance[part] = model(*pair).flatten().cpu().numpy()
    return distance
