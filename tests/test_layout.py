"""The layout of the repository: what stands at the top level, and who may import whom."""

import ast
import json
import os
import sys
from pathlib import Path

import pytest
from conftest import REPO, TINY, run_group

# From the ground up: a module may import those of its own layer and of the layers before it.
LAYERS = [
    [
        "runtime.console",
        "runtime.folders",
        "runtime.settings",
        "runtime.tables",
        "interpolants",
        "evaluation.metrics",
    ],
    ["shards", "solvers", "models"],
    ["configs"],
    ["runtime"],
    ["batches"],
    ["data"],
    ["vqvae"],
    ["forecaster"],
    ["objectives"],
    ["evaluation"],
    ["report"],
    ["train"],
    ["sample", "evaluate"],
    ["main"],
]
# Exceptions: (package or module, package that it imports from) -> the only modules it may import.
ONLY = {
    ("train", "report"): {"report.videos"},
    ("train", "evaluation"): {"evaluation.metrics"},
    ("evaluation", "prepare"): {"prepare.balls", "prepare.heat", "prepare.trajectories"},
    # data imports prepare's modules by name when it calls them (importlib).
    ("data", "prepare"): set(),
}
PREPARE_MAY = {"shards", "runtime.console", "runtime.folders", "prepare"}
PACKAGES = {
    "batches",
    "evaluation",
    "models",
    "objectives",
    "prepare",
    "report",
    "runtime",
    "scripts",
    "benchmarks",
}


MAX_COLUMNS = 100
# No run needs these before its training is over.
AFTER_TRAINING = ("report.page", "report.plots", "evaluate")
# Runs main.py up to the end of train.fit and writes the names of all modules loaded by then.
RECORD_MODULES = """
import json, sys
from pathlib import Path

import train

fit = train.fit

def fit_and_record(*args, **kwargs):
    fit(*args, **kwargs)
    Path("modules.json").write_text(json.dumps(sorted(sys.modules)))
    raise SystemExit(0)

train.fit = fit_and_record

import main

main.main()
"""


def python_files(*more: str) -> list[Path]:
    """Every module; with more: those of these folders, too."""
    names = [".", *PACKAGES, "models/autoencoders", "benchmarks/gpu_steps", *more]
    return sorted(file for name in names for file in (REPO / name).glob("*.py"))


def module_of(file: Path) -> str:
    name = str(file.relative_to(REPO).with_suffix("")).replace("/", ".")
    return name.removesuffix(".__init__")


MODULES = {module_of(file): file for file in python_files()}


def imported(module: str) -> set[str]:
    """The modules of this repository that a module imports anywhere in its file."""
    found = set()
    for node in ast.walk(ast.parse(MODULES[module].read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                found.add(inner if inner in MODULES else node.module)
    return found & set(MODULES)


def is_in(module: str, place: str) -> bool:
    return module == place or module.startswith(place + ".")


def layer_of(module: str) -> int | None:
    """None for a module outside the layers: prepare, scripts, benchmarks."""
    named = []
    for k, layer in enumerate(LAYERS):
        named += [(len(place), k) for place in layer if is_in(module, place)]
    # The longest name decides: runtime.console is below runtime.
    return max(named)[1] if named else None


@pytest.mark.parametrize("module", [name for name in MODULES if layer_of(name) is not None])
def test_a_module_imports_no_layer_above_its_own(module):
    for other in imported(module):
        place = other.partition(".")[0]
        allowed = ONLY.get((module.partition(".")[0], place))
        if allowed is not None:
            assert other in allowed, f"{module} imports {other}"
        else:
            layer = layer_of(other)
            assert layer is not None, f"{module} imports {other}"
            assert layer <= layer_of(module), f"{module} imports {other}, a layer above its own"


@pytest.mark.parametrize("module", [name for name in MODULES if is_in(name, "prepare")])
def test_prepare_imports_shards_console_and_folders_only(module):
    for other in imported(module):
        assert any(is_in(other, place) for place in PREPARE_MAY), f"{module} imports {other}"
    # No torch when the module is loaded. Functions may import torch when they are called.
    for node in ast.parse(MODULES[module].read_text()).body:
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module] if isinstance(node, ast.ImportFrom) else []
        assert not any(is_in(name, "torch") for name in names), f"{module} imports torch"


@pytest.mark.parametrize("module", [name for name in MODULES if is_in(name, "scripts")])
def test_scripts_import_no_benchmark(module):
    assert not any(is_in(other, "benchmarks") for other in imported(module))


def test_the_top_level_is_small():
    assert len(list(REPO.glob("*.py"))) <= 11


def test_empty_packages():
    assert (REPO / "runtime/__init__.py").read_text().strip() == ""


def test_lines_are_short():
    long = []
    for file in python_files("tests"):
        for number, line in enumerate(file.read_text().splitlines(), 1):
            if len(line) > MAX_COLUMNS:
                long.append(f"{file.relative_to(REPO)}:{number}: {len(line)} columns")
    assert not long, "\n".join(long)


def test_training_loads_no_pages_and_no_plots(tmp_path):
    # With a preview of forecasts during training, which needs report.videos.
    settings = [*TINY, "train.sample_every=6"]
    done = run_group(
        [sys.executable, "-c", RECORD_MODULES, "--set", *settings],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(REPO)},
        timeout=280,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    loaded = set(json.loads((tmp_path / "modules.json").read_text()))
    assert {"train", "data", "forecaster"} <= loaded
    assert sorted(loaded.intersection(AFTER_TRAINING)) == []
