"""Velocity networks: U-ViT against its reference output, and properties of all networks."""

import json

import numpy as np
import pytest
import torch
from conftest import DATA, reference_weights

import models
from models import uvit


def test_uvit_has_the_published_names_shapes_and_output():
    names = json.loads((DATA / "vector_field_regressor.json").read_text())
    net = models.build("uvit", latent_shape=(4, 8, 8)).eval()
    assert {name: list(p.shape) for name, p in net.state_dict().items()} == names
    net.load_state_dict(reference_weights(names))
    arrays = np.load(DATA / "reference_io.npz")
    keys = ("z", "t", "ref", "ctx", "gap", "out")
    parts = (torch.from_numpy(arrays[f"v8_{key}"]) for key in keys)
    z, s, reference, context, gap, expected = parts
    with torch.no_grad():
        out = net(z, s, reference, context[:, None], gap[:, None])
    error = (out - expected).norm() / expected.norm()
    assert error < 1e-4, error


@pytest.mark.parametrize("K", [1, 3])
@pytest.mark.parametrize("name", ["convnet", "uvit"])
def test_the_output_depends_on_every_input(name, K):
    torch.manual_seed(0)
    net = models.build(
        name,
        latent_shape=(3, 6, 4),
        width=32,
        depth=2,
        mid_depth=2,
        heads=2,
        dropout=0.0,
        contexts=K,
    )
    # Some weights are zero at the start, which hides inputs.
    for p in net.parameters():
        p.data.add_(0.05 * torch.randn_like(p))
    net.double().eval()
    z, ref = torch.randn(2, 5, 3, 6, 4, dtype=torch.float64).unbind(0)
    contexts = torch.randn(5, K, 3, 6, 4, dtype=torch.float64)
    s = torch.rand(5, dtype=torch.float64)
    gaps = torch.randint(1, 6, (5, K)).double()
    one = torch.zeros(K, dtype=torch.float64)
    one[-1] = 1
    out = net(z, s, ref, contexts, gaps)
    assert out.shape == (5, 3, 6, 4)
    assert torch.equal(net(z, s, ref, contexts, gaps, noise=None), out)
    for changed in [
        (z + 1, s, ref, contexts, gaps),
        (z, s / 2, ref, contexts, gaps),
        (z, s, ref + 1, contexts, gaps),
        (z, s, ref, contexts + one.view(K, 1, 1, 1), gaps),
        (z, s, ref, contexts, gaps + one),
    ]:
        assert not torch.allclose(net(*changed), out, atol=1e-6)


def test_the_first_output_of_the_convnet_is_zero_and_items_do_not_mix():
    torch.manual_seed(0)
    net = models.build("convnet", latent_shape=(4, 8, 8), width=16, depth=1, mid_depth=1, heads=2)
    x = torch.randn(3, 2, 4, 8, 8)
    s, contexts, gaps = torch.rand(2), x[2][:, None], torch.tensor([[1.0], [2.0]])
    assert net(x[0], s, x[1], contexts, gaps).abs().max() == 0
    for p in net.parameters():
        p.data.add_(0.1 * torch.randn_like(p))
    both = net(x[0], s, x[1], contexts, gaps)
    alone = net(x[0, :1], s[:1], x[1, :1], contexts[:1], gaps[:1])
    assert torch.allclose(both[:1], alone, atol=1e-5)


@pytest.mark.parametrize("name", ["convnet", "uvit"])
def test_activation_checkpointing_gives_the_same_gradient_with_less_memory(name):
    torch.manual_seed(0)
    net = models.build(
        name, latent_shape=(4, 8, 8), width=32, depth=2, mid_depth=2, heads=2, dropout=0.1
    )
    x, s, gaps = torch.randn(3, 2, 4, 8, 8), torch.rand(2), torch.tensor([[1.0], [2.0]])
    found = {}
    for net.recompute in (False, True):
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t, kept=kept: kept.append(t.nbytes) or t, lambda t: t
        ):
            torch.manual_seed(1)
            loss = (net(x[0], s, x[1], x[2][:, None], gaps) + 1).square().mean()
        net.zero_grad()
        loss.backward()
        found[net.recompute] = sum(kept), [p.grad.clone() for p in net.parameters()]
    assert found[True][0] < 0.5 * found[False][0]
    assert all(torch.equal(a, b) for a, b in zip(found[True][1], found[False][1]))
    assert len(net.blocks) == 6


def test_attention_in_bf16_agrees_with_the_fused_kernel():
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 3, 65, 16).bfloat16().requires_grad_() for _ in range(3))
    with torch.no_grad():
        fused = uvit.attention(q, k, v, 0.0)
    mixed = uvit.attention(q, k, v, 0.0)
    assert mixed.dtype == torch.bfloat16 and (mixed - fused).norm() < 0.01 * fused.norm()
    mixed.float().square().sum().backward()
    assert q.grad.isfinite().all() and q.grad.abs().max() > 0
