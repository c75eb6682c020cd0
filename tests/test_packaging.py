"""What an installation gets: the wheel by either route, the locks, the image."""

import importlib.machinery
import inspect
import os
import runpy
import shlex
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import setuptools
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import soflow
from bench.extension import find_nvcc

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
PYTHONS = ("3.10", "3.11", "3.12", "3.13")
LOCKS = {"runtime": (), "gpu": ("gpu", "latents"), "dev": ("dev",)}  # the extras of each
BUILD_SDIST = "import sys; from setuptools import build_meta; print(build_meta.build_sdist(sys.argv[1]))"


def run(*command: str | Path, cwd: Path, **environment: str) -> str:
    """Return what a command prints; it sees no PYTHONPATH but the one given."""
    inherited = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    result = subprocess.run(command, cwd=cwd, env=inherited | environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout


def build_wheel(source: Path, folder: Path, cuda: str = "0") -> Path:
    """Build as `pip install` does, but with this environment's setuptools and without a network."""
    pip = (sys.executable, "-m", "pip", "wheel", "--quiet", "--no-index", "--no-deps", "--no-build-isolation")
    settings = {"SOURCE_DATE_EPOCH": "1700000000", "SOFLOW_BUILD_CUDA": cuda}
    run(*pip, "--wheel-dir", folder, source, cwd=folder, **settings)
    (wheel,) = folder.glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what the package is built from: a build leaves files behind."""
    tree = tmp_path_factory.mktemp("tree")
    for name in ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    for name in ("soflow", "kernels", "csrc"):
        shutil.copytree(ROOT / name, tree / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for path in tree.rglob("*"):  # a wheel keeps the modes of its files, which are those of whoever made the checkout
        path.chmod(0o755 if path.is_dir() else 0o644)
    return tree


@pytest.fixture(scope="module")
def wheel(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_wheel(tree, tmp_path_factory.mktemp("wheel"))


def test_kernels_are_a_relative_link():
    assert os.readlink(ROOT / "soflow" / "kernels") == os.path.join("..", "kernels")


def test_wheel_holds_every_module_once(wheel: Path):
    expected = {f"soflow/{path.relative_to(ROOT / 'soflow')}" for path in (ROOT / "soflow").rglob("*.py")}
    expected |= {f"soflow/kernels/{path.relative_to(ROOT / 'kernels')}" for path in (ROOT / "kernels").rglob("*.py")}
    names = zipfile.ZipFile(wheel).namelist()
    assert sorted(name for name in names if name.endswith(".py")) == sorted(expected)
    assert wheel.name == f"soflow-{soflow.__version__}-py3-none-any.whl"


def test_sdist_gives_the_same_wheel_to_the_bit(tree: Path, wheel: Path, tmp_path: Path):
    name = run(sys.executable, "-c", BUILD_SDIST, tmp_path, cwd=tree, SOFLOW_BUILD_CUDA="0").splitlines()[-1]
    folder = tmp_path / "wheel"
    folder.mkdir()
    assert build_wheel(tmp_path / name, folder).read_bytes() == wheel.read_bytes()


@pytest.mark.slow
@pytest.mark.skipif(find_nvcc() is None, reason="needs nvcc")
def test_wheel_with_the_extension(tree: Path, tmp_path: Path):
    """From the sdist, which must hold csrc: the module lies beside the package and imports without a GPU."""
    name = run(sys.executable, "-c", BUILD_SDIST, tmp_path, cwd=tree, SOFLOW_BUILD_CUDA="0").splitlines()[-1]
    folder = tmp_path / "wheel"
    folder.mkdir()
    wheel = build_wheel(tmp_path / name, folder, cuda="1")
    assert not wheel.name.endswith("-none-any.whl")
    files = zipfile.ZipFile(wheel).namelist()
    assert f"_soflow_C{importlib.machinery.EXTENSION_SUFFIXES[0]}" in files
    assert not [file for file in files if file.startswith("csrc")]
    site = tmp_path / "site"
    run(
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-index",
        "--no-deps",
        "--target",
        site,
        wheel,
        cwd=tmp_path,
    )
    code = "import _soflow_C; print(_soflow_C.__file__, _soflow_C.__version__)"
    found = run(sys.executable, "-c", code, cwd=tmp_path, PYTHONPATH=str(site)).split()
    assert found == [str(site / f"_soflow_C{importlib.machinery.EXTENSION_SUFFIXES[0]}"), soflow.__version__]


BUILD = (sys.executable, "setup.py", "build_ext", "--inplace")
STAND_IN = """#!/bin/sh
case "$1" in --list-gpu-arch) echo compute_90; exit;; esac
for word; do [ "$last" = -o ] && echo built > "$word"; last=$word; printf '%s\\n' "$word" >> "$0.words"; done
"""


def test_extension_is_built_in_folders_with_spaces(tree: Path, tmp_path: Path):
    """By the nvcc of CUDA_HOME, here one that only notes what it is told."""
    pytest.importorskip("ninja")
    pytest.importorskip("pybind11")
    checkout, nvcc = tmp_path / "my $checkout", tmp_path / "my cuda" / "bin" / "nvcc"
    shutil.copytree(tree, checkout, symlinks=True, ignore=shutil.ignore_patterns("build", "dist"))
    nvcc.parent.mkdir(parents=True)
    nvcc.write_text(STAND_IN)
    nvcc.chmod(0o755)
    run(*BUILD, cwd=checkout, SOFLOW_BUILD_CUDA="auto", CUDA_HOME=str(tmp_path / "my cuda"))
    module = checkout / f"_soflow_C{importlib.machinery.EXTENSION_SUFFIXES[0]}"
    assert module.read_text() == "built\n"
    words = nvcc.with_name("nvcc.words").read_text().splitlines()
    for word in (checkout / "csrc" / "multi_tensor.cu", f'-DSOFLOW_VERSION="{soflow.__version__}"'):
        assert str(word) in words


def test_ninja_may_be_the_system_s(tree: Path, tmp_path: Path):
    """One on the PATH serves where Python has no package of it; without either the error names it."""
    pytest.importorskip("pybind11")
    checkout, folder = tmp_path / "checkout", tmp_path / "bin"
    shutil.copytree(tree, checkout, symlinks=True, ignore=shutil.ignore_patterns("build", "dist"))
    (tmp_path / "ninja.py").write_text("raise ModuleNotFoundError(name='ninja')")
    folder.mkdir()
    (folder / "nvcc").write_text(STAND_IN)
    (folder / "nvcc").chmod(0o755)
    environment = {"PATH": f"{folder}:/bin", "PYTHONPATH": str(tmp_path), "SOFLOW_BUILD_CUDA": "1", "CUDA_HOME": ""}
    if shutil.which("ninja", path="/bin") is None:
        refused = subprocess.run(BUILD, cwd=checkout, env=environment, capture_output=True, text=True, check=False)
        assert refused.returncode == 1
        assert "error: no ninja: install it, or set SOFLOW_BUILD_CUDA=0" in refused.stderr
    (folder / "ninja").write_text('#!/bin/sh\necho built > "$2/by_ninja"\n')
    (folder / "ninja").chmod(0o755)
    subprocess.run(BUILD, cwd=checkout, env=environment, capture_output=True, check=False)
    assert [path.read_text() for path in checkout.glob("build/*/by_ninja")] == ["built\n"]


def test_benches_look_for_nvcc_where_the_build_does():
    assert inspect.getsource(find_nvcc) in (ROOT / "setup.py").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("choice", "message"), [("1", "expected nvcc in CUDA_HOME"), ("yes", "got 'yes', expected auto, 1 or 0")]
)
def test_extension_that_cannot_be_built_is_an_error(tree: Path, tmp_path: Path, choice: str, message: str):
    if choice == "1" and Path("/usr/local/cuda/bin/nvcc").exists():
        pytest.skip("nvcc is found whatever the PATH")
    environment = os.environ | {"SOFLOW_BUILD_CUDA": choice, "PATH": str(tmp_path), "CUDA_HOME": ""}
    command = (sys.executable, "setup.py", "--version")
    result = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert message in result.stderr


def test_wheel_works_away_from_the_source(wheel: Path, tmp_path: Path):
    site = tmp_path / "site"
    pip = (sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps")
    run(*pip, "--target", site, wheel, cwd=tmp_path)
    code = "import soflow.cli, soflow.kernels.reference as r; print(soflow.__file__); print(r.__file__)"
    files = run(sys.executable, "-c", code, cwd=tmp_path, PYTHONPATH=str(site)).split()
    assert files == [str(site / "soflow" / "__init__.py"), str(site / "soflow" / "kernels" / "reference.py")]
    assert (site / "bin" / "soflow").is_file()


def locked(lock: str) -> Iterator[tuple[Requirement, list[str]]]:
    """Every requirement of a lock, with its options."""
    text = (ROOT / "requirements" / f"{lock}.lock").read_text(encoding="utf-8")
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    for entry in "\n".join(lines).replace("\\\n", " ").splitlines():
        requirement, *options = entry.split(" --")
        yield Requirement(requirement.strip()), options


def versions(lock: str, python: str) -> dict[str, str]:
    """What a lock installs with `python` on 64-bit Linux."""
    linux = {"sys_platform": "linux", "platform_system": "Linux", "platform_machine": "x86_64", "os_name": "posix"}
    environment = default_environment() | linux | {"python_version": python, "python_full_version": f"{python}.0"}
    found: dict[str, str] = {}
    for requirement, _ in locked(lock):
        if requirement.marker is None or requirement.marker.evaluate(environment):
            (specifier,) = requirement.specifier
            assert specifier.operator == "=="
            assert canonicalize_name(requirement.name) not in found
            found[canonicalize_name(requirement.name)] = specifier.version
    return found


@pytest.mark.parametrize("lock", [*LOCKS, "build", "triton"])
def test_locks_hash_public_files_only(lock: str):
    entries = list(locked(lock))
    assert entries
    for requirement, options in entries:
        assert requirement.url is None
        assert "+" not in str(requirement.specifier), "a local build"
        assert options, f"{requirement} has no hash"
        assert all(option.strip().startswith("hash=sha256:") for option in options)
    text = (ROOT / "requirements" / f"{lock}.lock").read_text(encoding="utf-8")
    assert "://" not in text


@pytest.mark.parametrize("python", PYTHONS)
@pytest.mark.parametrize("lock", LOCKS)
def test_locks_satisfy_the_metadata_and_leave_torch_alone(lock: str, python: str):
    chosen = versions(lock, python)
    wanted = [*PROJECT["dependencies"]]
    for extra in LOCKS[lock]:
        wanted += PROJECT["optional-dependencies"][extra]
    for requirement in map(Requirement, wanted):
        name = canonicalize_name(requirement.name)
        applies = requirement.marker is None or requirement.marker.evaluate({"python_version": python})
        if applies and name != "torch":
            assert requirement.specifier.contains(chosen[name]), f"{lock}.lock is old: make lock"
    assert not chosen.keys() & {"torch", "triton", "nvidia-cublas", "nvidia-cudnn-cu13", "nvidia-nccl-cu13"}


@pytest.mark.parametrize("python", PYTHONS)
@pytest.mark.parametrize("lock", ["gpu", "dev"])
def test_locks_agree(lock: str, python: str):
    assert versions("runtime", python).items() <= versions(lock, python).items()


@pytest.fixture
def structure() -> list[tuple[str, str]]:
    """The instructions of the Dockerfile, each with its value."""
    parser = pytest.importorskip("dockerfile_parse").DockerfileParser(str(ROOT / "Dockerfile"))
    return [(step["instruction"], step["value"]) for step in parser.structure if step["instruction"] != "COMMENT"]


def test_image_keeps_the_base_and_installs_by_hash(structure: list[tuple[str, str]]):
    stages = [value.split()[-1] for instruction, value in structure if instruction == "FROM"]
    assert stages == ["base", "build", "test", "runtime"]
    assert structure[0][0] == "ARG"
    assert structure[0][1].startswith("BASE_IMAGE=")
    assert [value for instruction, value in structure if instruction == "USER"] == ["10001", "10001"]
    assert 'PIP_CONSTRAINT=""' in next(value for instruction, value in structure if instruction == "ENV")
    commands = [part for instruction, value in structure if instruction == "RUN" for part in value.split("&&")]
    installs = [command for command in commands if "pip install" in command]
    assert len(installs) == 5
    for command in installs:
        assert "--require-hashes" in command or "--no-index" in command
        assert "torch" not in command
    # neither is understood by every builder
    for _, value in structure:
        assert "<<" not in value
        assert "--link" not in value


def test_image_works_for_any_user_and_under_torchrun(structure: list[tuple[str, str]]):
    environments = [dict(word.split("=", 1) for word in shlex.split(value)) for key, value in structure if key == "ENV"]
    base, runtime = environments
    assert base["PYTHON_EXEC"] == f"{base['VIRTUAL_ENV']}/bin/python"  # torchrun is the base's
    assert runtime == {"HOME": "/tmp", "USER": "soflow"}
    made = structure.index(("RUN", "useradd --create-home --uid 10001 soflow && chmod 755 /home/soflow"))
    assert structure[made - 1] == ("ARG", "SOURCE_DATE_EPOCH")
    last = structure[-1 - [instruction for instruction, _ in reversed(structure)].index("FROM") :]
    copied = max(i for i, (instruction, _) in enumerate(last) if instruction == "COPY")
    assert last[copied + 1][1].startswith("chmod -R u=rwX,go=rX train.py configs launch && ")
    assert last[copied + 1][1].endswith(" && install --directory --owner=10001 --group=10001 runs")
    assert last[copied + 2] == ("USER", "10001")


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="needs the repository")
def test_image_for_tests_holds_the_whole_checkout():
    tracked = {line.partition("/")[0] for line in run("git", "ls-files", cwd=ROOT).splitlines()}
    allowed = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    assert tracked - allowed == {".gitignore", ".pre-commit-config.yaml"}
    assert allowed <= tracked


def test_there_is_code_for_every_architecture_and_for_later_ones(tmp_path, monkeypatch):
    nvcc = tmp_path / "nvcc"
    nvcc.write_text("#!/bin/sh\necho compute_75 compute_80 compute_90 compute_100 compute_120\n")
    nvcc.chmod(0o755)
    monkeypatch.setenv("SOFLOW_BUILD_CUDA", "0")
    monkeypatch.setattr(setuptools, "setup", lambda **settings: None)
    options = runpy.run_path(str(ROOT / "setup.py"))["gencode"](str(nvcc)).split("-gencode ")[1:]
    codes = (
        "compute_80,code=sm_80",
        "compute_90,code=sm_90",
        "compute_100,code=sm_100",
        "compute_100,code=compute_100",
    )
    assert [option.strip() for option in options] == [f"arch={code}" for code in codes]
