"""The layout of the repository: what stands at the top level, and who may import whom."""

import ast
from pathlib import Path

import pytest
from conftest import REPO

# From the ground up: a module may import those of its own layer and of the layers before it.
LAYERS = [
    ["runtime.console", "runtime.folders", "interpolants", "evaluation.metrics"],
    ["shards", "solvers", "models"],
    ["configs"],
    ["runtime"],
    ["batches"],
    ["data"],
    ["vqvae"],
    ["forecaster"],
    ["evaluation"],
    ["report"],
    ["train"],
    ["sample", "evaluate"],
    ["main"],
]
# Where the rule above allows more than it should.
ONLY = {
    ("train", "report"): {"report.videos"},
    ("train", "evaluation"): {"evaluation.metrics"},
    ("evaluation", "prepare"): {"prepare.balls"},
    ("data", "prepare"): set(),  # by name, late: importlib
}
PREPARE_MAY = {"shards", "runtime.console", "runtime.folders", "prepare"}
PACKAGES = {
    "batches",
    "evaluation",
    "models",
    "prepare",
    "report",
    "runtime",
    "scripts",
    "benchmarks",
}


def python_files() -> list[Path]:
    folders = [REPO, *(REPO / name for name in PACKAGES), REPO / "models/autoencoders"]
    return sorted(file for folder in folders for file in folder.glob("*.py"))


def module_of(file: Path) -> str:
    name = str(file.relative_to(REPO).with_suffix("")).replace("/", ".")
    return name.removesuffix(".__init__")


MODULES = {module_of(file): file for file in python_files()}


def imported(module: str) -> set[str]:
    """The modules of ours that a module imports anywhere in its file."""
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
    named = [
        (len(place), k) for k, layer in enumerate(LAYERS) for place in layer if is_in(module, place)
    ]
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
            assert layer <= layer_of(module), f"{module} imports {other}, which stands above it"


@pytest.mark.parametrize("module", [name for name in MODULES if is_in(name, "prepare")])
def test_prepare_stands_on_shards_console_and_folders(module):
    for other in imported(module):
        assert any(is_in(other, place) for place in PREPARE_MAY), f"{module} imports {other}"
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
