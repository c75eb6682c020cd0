"""The layers of the architecture: who may import whom, and the one seam between the reference and the kernels."""

import ast
import graphlib
import inspect
import re
import sys
from pathlib import Path

import pytest

import soflow.kernels
import soflow.kernels.reference

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]

# The layer of each module of soflow; a package stands for all its modules, "" is soflow/__init__.py.
LAYERS = {
    1: {"kernels", "config", "paths", "streams", "times"},
    2: {
        "augment",
        "capture",
        "determinism",
        "draw",
        "flow",
        "flow_matching",
        "guidance",
        "meanflow",
        "models",
        "objective",
        "precision",
        "rounding",
        "sampling",
        "slope",
        "",
    },
    3: {
        "checkpoint",
        "config_file",
        "data",
        "distributed",
        "doctor",
        "ema",
        "export",
        "images",
        "log",
        "meters",
        "metrics",
        "monitor",
        "official_config",
        "optim",
        "sharding",
        "watchdog",
        "vae",
    },
    4: {"assembly", "audit", "audit_report", "memory", "run_folder", "step", "trainer"},
    5: {"arguments", "cli", "cli_data", "cli_sample", "cli_trained"},
}
LAYER_OF = {unit: layer for layer, units in LAYERS.items() for unit in units}
OUTSIDE = {"bench", "tests", "train"}
DISTRIBUTIONS = {"PIL": "pillow", "ruamel": "ruamel.yaml", "sklearn": "scikit-learn", "nvidia": "nvidia-dali-cuda130"}
OF_KERNELS = {"_soflow_C", "triton"}  # built here, and brought by torch


def sources() -> dict[str, Path]:
    """Module name to file, for every module of soflow, soflow.kernels included."""
    folders = [(ROOT / "soflow", "soflow"), (ROOT / "kernels", "soflow.kernels")]
    modules = {}
    for folder, package in folders:
        for file in folder.rglob("*.py"):
            if folder / "kernels" not in file.parents:
                parts = [package, *file.relative_to(folder).with_suffix("").parts]
                modules[".".join(parts).removesuffix(".__init__")] = file
    return modules


MODULES = sources()


def imports(source: str, module: str, is_package: bool) -> set[str]:
    """Full names of what `source` imports: a name of a module counts as that module, any other as its home."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            home = node.module or ""
            if node.level:
                package = module.split(".") if is_package else module.split(".")[:-1]
                home = ".".join(package[: len(package) - node.level + 1] + ([home] if home else []))
            full = {f"{home}.{alias.name}" for alias in node.names}
            found |= full & MODULES.keys()
            if full - MODULES.keys():
                found.add(home)
    return found


IMPORTS = {
    name: imports(file.read_text(encoding="utf-8"), name, file.name == "__init__.py") for name, file in MODULES.items()
}


def unit(module: str) -> str:
    """The entry of LAYERS that a module of soflow belongs to."""
    return module.split(".")[1] if "." in module else ""


def layer(module: str) -> int:
    """The layer of a module of soflow; one that LAYERS forgot fails its own test."""
    return LAYER_OF.get(unit(module), 5)


def own(names: set[str]) -> set[str]:
    return {name for name in names if name.split(".")[0] == "soflow"}


def third_party(names: set[str]) -> set[str]:
    return {name.split(".")[0] for name in names} - sys.stdlib_module_names - {"soflow"}


def violations(imported: dict[str, set[str]]) -> list[str]:
    """One line per import that goes up in the layers."""
    lines = []
    for module, names in imported.items():
        for name in sorted(own(names) | {name for name in names if name.split(".")[0] in OUTSIDE}):
            height = layer(name) if name in own(names) else 5
            if height > layer(module):
                lines.append(f"{module} (layer {layer(module)}) imports {name} (layer {height})")
    return lines


def test_every_module_has_a_layer():
    assert {unit(module) for module in MODULES} - LAYER_OF.keys() == set()
    assert {"soflow.kernels.reference", "soflow.models.dit", "soflow.config", "soflow"} <= MODULES.keys()


def test_lower_layers_never_import_higher_ones():
    assert violations(IMPORTS) == []


def test_imports_have_no_cycle():
    graphlib.TopologicalSorter({name: own(names) - {name} for name, names in IMPORTS.items()}).prepare()


@pytest.mark.parametrize(
    ("module", "source", "expected"),
    [
        ("soflow.paths", "from soflow.models import DiT", "soflow.paths (layer 1) imports soflow.models (layer 2)"),
        ("soflow.paths", "from soflow import sampling", "soflow.paths (layer 1) imports soflow.sampling (layer 2)"),
        ("soflow.paths", "from . import data", "soflow.paths (layer 1) imports soflow.data (layer 3)"),
        (
            "soflow.models.dit",
            "from ..trainer import f",
            "soflow.models.dit (layer 2) imports soflow.trainer (layer 4)",
        ),
        ("soflow.config", "def f():\n import soflow.cli", "soflow.config (layer 1) imports soflow.cli (layer 5)"),
        ("soflow.data", "import bench.digits", "soflow.data (layer 3) imports bench.digits (layer 5)"),
        ("soflow.trainer", "from train import main", "soflow.trainer (layer 4) imports train (layer 5)"),
    ],
)
def test_a_wrong_import_is_seen(module: str, source: str, expected: str):
    assert violations({module: imports(source, module, is_package=False)}) == [expected]


@pytest.mark.parametrize("module", [name for name in MODULES if layer(name) <= 2])
def test_low_layers_need_only_torch(module: str):
    assert third_party(IMPORTS[module]) <= {"torch"} | (OF_KERNELS if unit(module) == "kernels" else set())


@pytest.mark.parametrize("module", [name for name in MODULES if layer(name) < 4 and unit(name) != "kernels"])
def test_only_layer_4_chooses_kernels(module: str):
    allowed = {"soflow.kernels.reference"} | ({"soflow.kernels.multi_tensor"} if unit(module) == "optim" else set())
    assert {name for name in own(IMPORTS[module]) if unit(name) == "kernels"} <= allowed


def test_third_party_imports_are_declared_dependencies():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    requirements = project["dependencies"] + extras["gpu"] + extras["latents"]
    declared = {re.match(r"[A-Za-z0-9._-]+", requirement)[0] for requirement in requirements}
    used = set().union(*map(third_party, IMPORTS.values())) - OF_KERNELS
    assert {DISTRIBUTIONS.get(name, name) for name in used} <= declared


def test_kernels_and_reference_export_the_same_names_and_signatures():
    kernels, reference = soflow.kernels, soflow.kernels.reference
    assert len(reference.__all__) == len(set(reference.__all__)) > 0
    assert sorted(kernels.__all__) == sorted(reference.__all__)
    for name in reference.__all__:
        ours, spec = getattr(kernels, name), getattr(reference, name)
        if callable(spec):
            assert inspect.signature(ours) == inspect.signature(spec), name
        else:
            assert ours == spec, name
