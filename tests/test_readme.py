"""What the README says is what the repository does."""

import re

import pytest
import torch
from conftest import REPO

import configs
from interpolants import Interpolant, across

README = (REPO / "README.md").read_text()


def test_ci_runs_the_test_command_of_the_readme():
    assert "pip install -r requirements.txt && pytest\n" in README
    assert '"pip install -r requirements.txt && pytest"' in (REPO / ".ci/run").read_text()


def test_pictures_and_files_named_in_the_readme_exist():
    for path in re.findall(r"!\[[^]]*\]\(([^)]*)\)", README):
        assert (REPO / path).is_file(), path
    for name in re.findall(r"`([a-z]+\.py)`", README):
        assert (REPO / name).is_file(), name


def test_every_dataset_and_setting_it_names_exists():
    assert all(f"`{name}`" in README for name in configs.DATASETS)
    for name in re.findall(
        r"\b((?:data|replay|vqvae|model|flow|train|sample|output|wandb)\.[a-z_]+)=", README
    ):
        assert name in configs.settable(), name


def test_the_interpolant_that_it_adds_works():
    code = re.search(r"```python\n(.*?)```", README, re.S).group(1)
    scope = {"Interpolant": Interpolant, "torch": torch, "TABLE": {}}
    exec(code, scope)
    it = scope["TABLE"]["follmer_fast"](c=0.7)
    s = torch.linspace(0.1, 0.9, 5, dtype=torch.float64, requires_grad=True)
    for name in ("alpha", "beta", "sigma"):
        (gradient,) = torch.autograd.grad(getattr(it, name)(s).sum(), s)
        assert torch.allclose(gradient, getattr(it, f"d_{name}")(s))
    x0, x1, eps = torch.randn(3, 5, 2, dtype=torch.float64)
    s = s.detach()
    x, target = it.interpolate(s, x0, x1, eps)
    assert torch.allclose(it.denoise(target, x, s, x0), x1)
    end = torch.ones_like(s)
    assert torch.allclose(it.velocity(it.interpolate(end, x0, x1, eps)[1], x1, end, x0), x1 - x0)
    closed_form = (
        it.c * ((1 - s) ** 3 * (1 + 3 * s)).sqrt()
    )  # 2 s sigma (sigma / s - sigma') - sigma^2
    assert torch.allclose(it.diffusion("follmer", s), closed_form)
    assert torch.allclose(
        across(it.gamma(s), x) * eps, x - across(1 - s, x) * x0 - across(s, x) * x1
    )


@pytest.mark.parametrize(
    "flag",
    [
        "--dataset",
        "--interpolant",
        "--overfit",
        "--ckpt",
        "--wandb_entity",
        "--wandb_project",
        "--dry_run",
        "--set",
    ],
)
def test_flags_of_main_are_described(flag):
    assert flag in README and f'"{flag}"' in (REPO / "main.py").read_text()
