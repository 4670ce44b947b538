"""The small VQVAE: shapes, codebook, the frozen module, training."""

from contextlib import nullcontext

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import configs
import vqvae
from models.autoencoders.layers import nearest, nearest_index
from models.autoencoders.small import Codebook, SmallVQVAE, contrast, count_codes
from runtime import checkpoints
from runtime.console import UserError
from shards import Shards


@pytest.mark.parametrize("downsample", [2, 4, 8])
def test_shapes_and_range(downsample):
    module = vqvae.freeze(SmallVQVAE(downsample, channels=3, codes=16, width=16, depth=1))
    x = torch.rand(2, 3, 32, 16) * 2 - 1
    z = module.encode(x)
    assert z.shape == (2, 3, 32 // downsample, 16 // downsample)
    assert module.decode(z * 100).abs().max() <= 1 and module.decode(z).shape == x.shape
    assert not any(p.requires_grad for p in module.parameters()) and not module.training


def test_decode_replaces_latents_by_the_nearest_codes_and_encode_does_not():
    torch.manual_seed(0)
    module = vqvae.freeze(SmallVQVAE(4, channels=2, codes=8, width=16, depth=1))
    z = module.encode(torch.randn(1, 3, 16, 16))
    flat = z.movedim(1, -1).reshape(-1, 2)
    distance = torch.cdist(flat, module.codebook.codes)
    index = distance.argmin(1)
    assert torch.equal(nearest_index(z, module.codebook.codes), index)
    assert distance.min(1).values.min() > 1e-4
    snapped = nearest(z, module.codebook.codes)
    assert torch.equal(snapped.movedim(1, -1).reshape(-1, 2), module.codebook.codes[index])
    assert torch.equal(module.decode(z), module.decode(snapped))


def test_codes_move_to_their_latents_and_dead_codes_restart():
    torch.manual_seed(0)
    book = Codebook(8, 2, decay=0.5)
    g = torch.Generator().manual_seed(0)
    centres = torch.tensor([[0.0, 0], [5, 0], [0, 5], [5, 5]])
    for step in range(60):
        chosen = centres[torch.randint(4, (256,), generator=g)]
        z = chosen + 0.05 * torch.randn(256, 2, generator=g)
        z = z.view(16, 16, 1, 2).movedim(-1, 1)
        index = nearest_index(z, book.codes)
        book.update(z, index, count_codes(index, 8), g)
        if step == 30:
            # From here on this code is nearest to no latent.
            book.codes[3] = 1000.0
            book.total[3] = 1000.0 * book.count[3]
    assert book.codes.abs().max() < 6
    assert torch.cdist(centres, book.codes).min(1).values.max() < 0.1


def test_the_encoder_gets_gradients_by_the_straight_through_estimator():
    module = SmallVQVAE(4, channels=2, codes=8, width=16, depth=1)
    loss, values = module.loss(torch.rand(2, 3, 16, 16), torch.Generator().manual_seed(0))
    loss.backward()
    assert module.encoder[0].weight.grad.abs().sum() > 0 and 1 <= values["perplexity"] <= 8


def test_without_a_codebook_latents_are_decoded_as_they_are():
    torch.manual_seed(0)
    module = vqvae.freeze(SmallVQVAE(4, channels=2, codes=0, width=16, depth=1))
    z = torch.randn(2, 2, 4, 4)
    assert torch.equal(module.decode(z), module.decoder(z).clamp(-1, 1))
    assert not any("codebook" in name for name in module.state_dict())
    assert "perplexity" not in module.loss(torch.rand(2, 3, 16, 16))[1]


def test_without_a_codebook_the_loss_draws_the_latents_to_mean_0_and_variance_1():
    torch.manual_seed(0)
    module = SmallVQVAE(4, channels=2, codes=0, width=16, depth=1, noise=0.5)
    optimizer = torch.optim.AdamW(module.parameters(), 3e-3)
    frames = torch.rand(64, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    for step in range(150):
        module.loss(frames, torch.Generator().manual_seed(step))[0].backward()
        optimizer.step()
        optimizer.zero_grad()
    z = module.encode(frames)
    assert z.mean((0, 2, 3)).abs().max() < 0.3 and (z.std((0, 2, 3)) - 1).abs().max() < 0.3


def test_noise_has_the_given_level_in_standard_deviations_of_each_channel():
    module = SmallVQVAE(4, channels=2, codes=0, width=16, depth=1, noise=0.6)
    z = torch.randn(3000, 2, 4, 4) * torch.tensor([1.0, 20.0]).view(2, 1, 1)
    added = module.disturb(z, torch.Generator().manual_seed(0)) - z
    levels = added.square().mean((2, 3)).sqrt() / torch.tensor([1.0, 20.0])
    # The level is uniform in [0, 0.6], and the same for both channels of an item.
    assert levels.mean().item() == pytest.approx(0.3, abs=0.02)
    assert levels.square().mean().item() == pytest.approx(0.12, abs=0.01)
    assert torch.corrcoef(levels.T)[0, 1] > 0.8


def test_contrast_is_the_detail_of_each_window():
    x = torch.zeros(1, 3, 32, 32)
    x[:, :, 12:20, 12:20] = 1
    blurred = torch.nn.functional.avg_pool2d(x, 3, 1, 1)
    sharp, soft = contrast(x), contrast(blurred)
    assert sharp.shape == (1, 1, 8, 8)
    # A flat window has none, and blur lowers that of edges.
    assert sharp[0, 0, 0, 0].item() == pytest.approx(0.01)
    assert (soft[0, 0, 3:5, 3:5] < 0.8 * sharp[0, 0, 3:5, 3:5]).all()
    # Where the edge stands within the window does not matter.
    moved = contrast(x.roll(1, -1))[0, 0, 3:5, 3]
    assert torch.allclose(moved, sharp[0, 0, 3:5, 3], rtol=0.15)


def test_the_weight_of_the_error_of_contrast_is_sharpness():
    torch.manual_seed(0)
    x = torch.rand(8, 3, 16, 16) * 2 - 1
    plain = SmallVQVAE(4, channels=2, codes=0, width=16, depth=1)
    sharp = SmallVQVAE(4, channels=2, codes=0, width=16, depth=1, sharpness=2.0)
    sharp.load_state_dict(plain.state_dict())
    difference = sharp.loss(x)[0] - plain.loss(x)[0]
    shown = plain.decoder(plain.encode(x))
    expected = 2 * (contrast(shown) - contrast(x)).square().mean()
    assert difference.item() == pytest.approx(expected.item(), rel=1e-4)


def config(tmp_path, **values):
    base = {
        "data.image_size": 16,
        "vqvae.width": 16,
        "vqvae.depth": 1,
        "vqvae.codes": 32,
        "vqvae.steps": 60,
        "vqvae.batch_size": 16,
        "output.root": str(tmp_path / "outputs"),
    }
    changes = {name.replace("__", "."): value for name, value in values.items()}
    return configs.build(overrides=base | changes)


def test_autocast_does_not_change_the_chosen_codes():
    torch.manual_seed(0)
    book, z = Codebook(256, 4), torch.randn(8, 4, 16, 16)
    plain = nearest_index(z, book.codes)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(nearest_index(z, book.codes), plain)


class TF32(TorchDispatchMode):
    """Rounds the inputs of matrix products to 10 bits of mantissa, as a GPU does in TF32."""

    PRODUCTS = (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.bmm, torch.ops.aten.baddbmm)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.overloadpacket in self.PRODUCTS:
            args = (*args[:-2], self.rounded(args[-2]), self.rounded(args[-1]))
        return function(*args, **(kwargs or {}))

    @staticmethod
    def rounded(x):
        bits = x.contiguous().view(torch.int32)
        return ((bits + (1 << 12)) & ~((1 << 13) - 1)).view(torch.float32)


@pytest.mark.parametrize("mode, offset", [(TF32, 0.0), (nullcontext, 30.0)])
def test_the_chosen_codes_are_those_of_float64(mode, offset):
    torch.manual_seed(0)
    codes = torch.randn(4096, 4) + offset
    z = torch.randn(16, 4, 16, 16) + offset
    with mode():
        index = nearest_index(z, codes)
    flat = z.double().movedim(1, -1).reshape(-1, 4)
    exact = "donot_use_mm_for_euclid_dist"
    assert torch.equal(index, torch.cdist(flat, codes.double(), compute_mode=exact).argmin(1))


def test_the_host_does_not_wait_for_an_update_of_the_codebook():
    # A fake tensor has no values, so any operation that needs one on the host raises: bool(x), and
    # bincount.
    with FakeTensorMode(), torch.device("cuda"):
        module = SmallVQVAE(4, channels=2, codes=8, width=16, depth=1)
        loss, values = module.loss(torch.empty(2, 3, 16, 16))
    assert loss.device.type == values["perplexity"].device.type == "cuda"


def test_a_resumed_training_equals_an_uninterrupted_one(make_shards, tmp_path, monkeypatch):
    shards = Shards(make_shards([60, 40], size=16))
    cpu = torch.device("cpu")
    path = vqvae.train(config(tmp_path / "a", train__save_every=20), shards, shards, cpu)
    whole = checkpoints.load_checkpoint(path)
    cfg = config(tmp_path / "b", train__save_every=20)
    save = checkpoints.save_checkpoint

    def save_and_stop(dir, state, keep):
        save(dir, state, keep)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(checkpoints, "save_checkpoint", save_and_stop)
        vqvae.train(cfg, shards, shards, cpu)
    assert checkpoints.load_latest(vqvae.run_dir(cfg, shards))["step"] == 20
    parts = checkpoints.load_checkpoint(vqvae.train(cfg, shards, shards, cpu))
    assert parts["step"] == 60
    for name in whole["model"]:
        assert torch.equal(parts["model"][name], whole["model"][name])


def test_training_learns_and_a_finished_training_is_not_repeated(make_shards, tmp_path):
    shards = Shards(make_shards([60, 40], size=16))
    cfg = config(tmp_path)
    cpu = torch.device("cpu")
    path = vqvae.train(cfg, shards, shards, cpu)
    whole = checkpoints.load_checkpoint(path)
    # An untrained module reaches about 8 dB on these grey images.
    assert whole["step"] == 60 and whole["psnr"] > 14
    before = path.stat().st_mtime_ns
    assert vqvae.train(cfg, shards, shards, cpu) == path
    assert path.stat().st_mtime_ns == before
    module = vqvae.load(path, "small")
    assert torch.equal(module.encoder[0].weight, whole["model"]["encoder.0.weight"])
    assert vqvae.run_dir(config(tmp_path, vqvae__codes=33), shards) != vqvae.run_dir(cfg, shards)


def test_wrong_files_are_refused_by_name(tmp_path):
    torch.save({"model": {}}, tmp_path / "a.pt")
    with pytest.raises(UserError, match="a.pt: not a VQVAE checkpoint"):
        vqvae.load(tmp_path / "a.pt")
    state = {
        "model": {"encoder.0.weight": torch.zeros(1)},
        "config": configs.to_dict(configs.build()),
    }
    torch.save(state, tmp_path / "b.pt")
    with pytest.raises(UserError, match="b.pt: not weights of this architecture: .* is missing"):
        vqvae.load(tmp_path / "b.pt")


def test_the_pool_of_frames_is_limited_in_size_and_covers_the_split(make_shards):
    shards = Shards(make_shards([90, 70], size=8))
    assert len(vqvae.frame_pool(shards, np.random.default_rng(0))) == 160
    small = vqvae.frame_pool(shards, np.random.default_rng(0), max_bytes=64 * 8 * 8 * 3)
    levels = small[:, 0, 0, 0]
    assert len(small) == 64 and (levels < 90).any() and (levels >= 90).any()
