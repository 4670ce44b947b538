"""README.md and docs/*.md name only files, links, settings, flags and datasets that exist."""

import re
from pathlib import Path

import pytest
import torch
from conftest import REPO

import configs
from evaluation.protocols import PROTOCOLS, Protocol
from interpolants import TABLE, Interpolant, broadcast

README = (REPO / "README.md").read_text()
DOCUMENTS = [REPO / "README.md", *sorted((REPO / "docs").glob("*.md"))]
EVERY_DOCUMENT = pytest.mark.parametrize("document", DOCUMENTS, ids=lambda file: file.name)
PACKAGES = {file.parent.name for file in REPO.glob("*/__init__.py")}
# Folders of the map that are not packages.
OTHER_FOLDERS = {"tests", "docs", "pretrained"}
# prepare.plaicraft makes these flags from the names of the splits.
SPLIT_FLAGS = {"test_players", "val_players"}
# Flags of torchrun and srun.
FOREIGN_FLAGS = {"standalone", "nproc_per_node", "nnodes", "max-restarts", "gpus-per-task"}


def section(text: str, title: str) -> str:
    """The text between a heading of level 2 and the next one."""
    (found,) = re.findall(rf"^## {re.escape(title)}\n(.*?)(?=^## |\Z)", text, re.M | re.S)
    return found


def anchors(document: Path) -> set[str]:
    """The anchors that GitHub gives the headings of a document."""
    titles = re.findall(r"^#+ (.*)", document.read_text(), re.M)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


def test_the_readme_is_short():
    assert len(README.splitlines()) <= 200


def test_ci_runs_the_test_command_of_the_readme():
    assert "pip install -r requirements.txt && python main.py\n" in README
    assert "pip install -r requirements.txt && pytest\n" in README
    assert '"pip install -r requirements.txt && pytest"' in (REPO / ".ci/run").read_text()


# ------------------------------------------------------------------------------------------ files
def test_the_map_is_the_tree():
    listed = re.findall(r"^([\w/.]+)  ", section(README, "Where things are"), re.M)
    folders = {f"{name}/" for name in PACKAGES | OTHER_FOLDERS}
    files = {file.name for file in REPO.glob("*.py")}
    assert sorted(listed) == sorted(files | folders)
    for name in OTHER_FOLDERS:
        assert (REPO / name).is_dir(), name


def test_the_map_lists_every_page_of_the_docs():
    (line,) = re.findall(r"^docs/ +(.*)", README, re.M)
    assert sorted(line.split(", ")) == sorted(file.stem for file in DOCUMENTS[1:])


@EVERY_DOCUMENT
def test_links_and_pictures_exist(document):
    for target in re.findall(r"\]\(([^)\s]+)\)", document.read_text()):
        if target.startswith("https://"):
            continue
        path, _, anchor = target.partition("#")
        file = document.parent / path if path else document
        assert file.exists(), target
        assert not anchor or anchor in anchors(file), target


def test_every_page_of_the_docs_is_linked_in_the_readme():
    for document in DOCUMENTS[1:]:
        assert f"](docs/{document.name})" in README, document.name


@EVERY_DOCUMENT
def test_files_and_modules_named_exist(document):
    text = document.read_text()
    for name in re.findall(r"(?<![\w/.])([\w/]+\.py)\b", text):
        assert (REPO / name).is_file(), name
    for name in re.findall(r"(?<![\w/.])([\w/]+\.sbatch)\b", text):
        assert (REPO / "scripts/slurm" / Path(name).name).is_file(), name
    for name in re.findall(r"(?<![\w/.])((?:prepare|benchmarks|scripts)\.\w+)", text):
        assert (REPO / name.replace(".", "/")).with_suffix(".py").is_file(), name


# ----------------------------------------------------------------------------- settings and flags
@EVERY_DOCUMENT
def test_settings_named_exist(document):
    known = configs.settable()
    groups = "|".join(sorted({name.partition(".")[0] for name in known}))
    # Files such as train.py and model.pth look like settings.
    names = re.findall(rf"(?<![\w/.])((?:{groups})\.[a-z]\w*)", document.read_text())
    for name in names:
        if name.rpartition(".")[2] not in ("py", "pth", "sbatch"):
            assert name in known, name


@EVERY_DOCUMENT
def test_datasets_interpolants_and_protocols_named_exist(document):
    text = document.read_text()
    for flag, known in (
        ("dataset", configs.DATASETS),
        ("interpolant", TABLE),
        ("protocol", PROTOCOLS),
    ):
        for name in re.findall(rf"--{flag} ([a-z]\w*)", text):
            assert name in known, name


def test_the_table_of_datasets_is_complete():
    rows = re.findall(r"^\| (`.*?) \|", section(README, "Datasets"), re.M)
    listed = re.findall(r"`(\w+)`", " ".join(rows))
    assert sorted(listed) == sorted(configs.DATASETS)


def test_the_table_of_interpolants_is_complete():
    text = section((REPO / "docs/sampling.md").read_text(), "What the network learns")
    assert sorted(re.findall(r"^\| `(\w+)`", text, re.M)) == sorted(TABLE)


def test_the_table_of_protocols_is_complete():
    text = section((REPO / "docs/evaluation.md").read_text(), "Protocols")
    rows = re.findall(r"^\| (`\w.*?) \|", text, re.M)
    assert sorted(re.findall(r"`(\w+)`", " ".join(rows))) == sorted(PROTOCOLS)


def test_flags_of_main_exist():
    text = section(README, "Settings")
    commands = "\n".join(re.findall(r"^.*python main\.py.*", README, re.M))
    flags = set(re.findall(r"--(\w+)", text + commands)) - {"help"}
    source = (REPO / "main.py").read_text()
    assert {"dataset", "interpolant", "set", "overfit", "ckpt", "dry_run"} <= flags
    for flag in flags:
        assert f'"--{flag}"' in source, flag


@EVERY_DOCUMENT
def test_flags_of_every_command_exist(document):
    files = [*REPO.glob("*.py"), *(file for name in PACKAGES for file in REPO.glob(f"{name}/*.py"))]
    source = "\n".join(file.read_text() for file in files)
    # sample.py and evaluate.py make flags from these names.
    known = {*configs.SAMPLING_FLAGS, *Protocol.__dataclass_fields__, "help"}
    known |= SPLIT_FLAGS | FOREIGN_FLAGS
    for flag in re.findall(r"(?<![\w-])--([a-z][\w-]*)", document.read_text()):
        assert flag in known or f'"--{flag}"' in source, flag


# ---------------------------------------------------------------------------------------- example
def test_the_interpolant_that_the_docs_add_works():
    text = (REPO / "docs/sampling.md").read_text()
    code = re.search(r"```python\n(.*?)```", text, re.S).group(1)
    scope = {"Interpolant": Interpolant, "torch": torch, "TABLE": {}}
    exec(code, scope)
    it = scope["TABLE"]["follmer_fast"](c=0.7)

    # Its derivatives are those of its coefficients.
    s = torch.linspace(0.1, 0.9, 5, dtype=torch.float64, requires_grad=True)
    for name in ("alpha", "beta", "sigma"):
        (gradient,) = torch.autograd.grad(getattr(it, name)(s).sum(), s)
        assert torch.allclose(gradient, getattr(it, f"d_{name}")(s))

    # What follows from the coefficients agrees with closed forms.
    x0, x1, eps = torch.randn(3, 5, 2, dtype=torch.float64)
    s = s.detach()
    x, target = it.interpolate(s, x0, x1, eps)
    assert torch.allclose(it.denoise(target, x, s, x0), x1)
    end = torch.ones_like(s)
    assert torch.allclose(it.velocity(it.interpolate(end, x0, x1, eps)[1], x1, end, x0), x1 - x0)
    # g^2 = 2 s sigma (sigma / s - sigma') - sigma^2
    closed_form = it.c * ((1 - s) ** 3 * (1 + 3 * s)).sqrt()
    assert torch.allclose(it.diffusion("follmer", s), closed_form)
    noise = x - broadcast(1 - s, x) * x0 - broadcast(s, x) * x1
    assert torch.allclose(broadcast(it.gamma(s), x) * eps, noise)
