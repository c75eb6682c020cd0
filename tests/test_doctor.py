"""The doctor's checks against packages that work, are absent, are damaged, or are not what their name says."""

import importlib
import os
import re
import stat
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from soflow import doctor

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]


@pytest.fixture
def packages(tmp_path, monkeypatch):
    """A folder in front of sys.path; what is imported from it is forgotten afterwards."""
    monkeypatch.delitem(sys.modules, "_soflow_C", raising=False)
    before = set(sys.modules)
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    ours = {path.stem for path in tmp_path.iterdir()}
    for name in set(sys.modules) - before:
        if name.partition(".")[0] in ours:
            del sys.modules[name]


def write(folder: Path, files: dict[str, str]) -> None:
    for name, source in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(source))
    importlib.invalidate_caches()


def test_required_packages_are_those_of_the_project():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert sorted(doctor.REQUIRED) == sorted(re.match(r"[\w.-]+", line)[0] for line in project["dependencies"])
    latents = project["optional-dependencies"]["latents"]
    assert sorted(doctor.LATENTS) == sorted(re.match(r"[\w.-]+", line)[0] for line in latents)


@pytest.mark.parametrize("name", doctor.REQUIRED)
def test_required_packages_work_here(name):
    finding = doctor.run_check(name, lambda: doctor.check_required(name), required=True)
    assert finding.status == "works", finding.detail
    assert re.match(r"\d+\.\d+", finding.version)


@pytest.mark.parametrize(
    ("floor", "status"), [("4.9", "works"), ("4.66", "works"), ("4.66.1", "broken"), ("5", "broken")]
)
def test_a_package_that_is_too_old_is_broken(monkeypatch, floor, status):
    monkeypatch.setattr("importlib.metadata.requires", lambda name: ["tqdm-other>=9", f"tqdm>={floor}", "h5py>=3"])
    monkeypatch.setattr("tqdm.__version__", "4.66.0")
    finding = doctor.run_check("tqdm", lambda: doctor.check_required("tqdm"), required=True)
    assert finding.status == status
    if status == "broken":
        assert finding.detail == f"RuntimeError: got version 4.66.0, expected at least {floor}"


def test_without_the_extra_latents_the_doctor_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(doctor.LATENTS, "h5py", "soflow_nowhere")
    finding = doctor.run_check("h5py", lambda: doctor.check_latents("h5py"))
    assert (finding.status, finding.detail) == ("missing", "not installed: pip install 'soflow[latents]'")


def test_a_package_that_is_absent_is_missing(monkeypatch):
    monkeypatch.setitem(doctor.REQUIRED, "nowhere", "soflow_nowhere.inside")
    finding = doctor.run_check("nowhere", lambda: doctor.check_required("nowhere"), required=True)
    assert (finding.status, finding.detail) == ("missing", "not installed: pip install nowhere")


@pytest.mark.parametrize(
    ("source", "detail"),
    [
        ("import soflow_nowhere", "ModuleNotFoundError: No module named 'soflow_nowhere'"),
        ("raise OSError('libx.so.1: cannot open shared object file')", "OSError: libx.so.1: cannot open"),
        ("def broken(:", "SyntaxError: "),
        ("import os; os.no_such_thing", "AttributeError: module 'os' has no attribute 'no_such_thing'"),
        ("raise RuntimeError('needs CUDA 13')", "RuntimeError: needs CUDA 13"),
    ],
)
def test_a_package_that_does_not_import_is_broken(packages, source, detail):
    write(packages, {"_soflow_C.py": source})
    finding = doctor.run_check("CUDA extension", doctor.check_extension)
    assert (finding.status, finding.version) == ("broken", None)
    assert finding.detail.startswith(detail)


def test_the_extension_works_when_it_imports(packages):
    write(packages, {"_soflow_C.py": "__version__ = '1.2'"})
    finding = doctor.run_check("CUDA extension", doctor.check_extension)
    assert (finding.status, finding.version) == ("works", "1.2")


FUSED_ADAM = """
    class FusedAdam:
        def __init__(self, parameters):
            {body}
"""


@pytest.mark.parametrize(
    ("files", "status", "detail"),
    [
        ({"apex/__init__.py": "import pyramid_that_is_absent"}, "missing", "is not NVIDIA's but another package"),
        ({"apex.py": ""}, "missing", "is not NVIDIA's but another package"),
        (
            {
                "apex/__init__.py": "",
                "apex/optimizers.py": FUSED_ADAM.format(
                    body="raise RuntimeError('FusedAdam requires cuda extensions')"
                ),
            },
            "broken",
            "RuntimeError: FusedAdam requires cuda extensions",
        ),
        (
            {"apex/__init__.py": "", "apex/optimizers.py": "from amp_C import multi_tensor_adam"},
            "broken",
            "No module named 'amp_C'",
        ),
        ({"apex/__init__.py": "", "apex/optimizers.py": "pass"}, "broken", "no attribute 'FusedAdam'"),
        (
            {"apex/__init__.py": "", "apex/optimizers.py": FUSED_ADAM.format(body="assert len(parameters) == 1")},
            "works",
            "constructed FusedAdam",
        ),
    ],
)
def test_apex(packages, files, status, detail):
    write(packages, files)
    finding = doctor.run_check("NVIDIA apex", doctor.check_apex)
    assert finding.status == status
    assert detail in finding.detail


def test_triton_compiles_a_kernel():
    pytest.importorskip("triton", reason="triton comes with the CUDA builds of torch")
    finding = doctor.run_check("triton", doctor.check_triton)
    assert finding.status == "works", finding.detail
    assert "a kernel" in finding.detail


def test_triton_that_cannot_compile_is_broken(monkeypatch):
    triton = pytest.importorskip("triton", reason="triton comes with the CUDA builds of torch")

    class Kernel:
        def __getitem__(self, grid):
            raise triton.TritonError("no ptxas")

    monkeypatch.setattr(triton, "jit", lambda function: Kernel())
    finding = doctor.run_check("triton", doctor.check_triton)
    assert (finding.status, finding.detail) == ("broken", "RuntimeError: no ptxas")


DALI = """
    __version__ = "2.4.0"
    class Output:
        def __init__(self, array):
            self.array = array
        def as_array(self):
            return self.array
    class Pipeline:
        def __init__(self, batch_size, num_threads, device_id):
            assert device_id is None
        def __enter__(self):
            return self
        def __exit__(self, *error):
            pass
        def set_outputs(self, x):
            self.x = x
        def build(self):
            pass
        def run(self):
            return (Output(self.x() {change}),)
"""


@pytest.mark.parametrize(
    ("change", "status", "detail"),
    [("", "works", "ran a pipeline on the CPU"), ("+ 1", "broken", "RuntimeError: a pipeline changed its data")],
)
def test_dali_has_to_return_its_data(packages, monkeypatch, change, status, detail):
    functions = "def external_source(source, batch): return source"
    pipeline = DALI.format(change=change)
    write(packages, {"nvidia/__init__.py": "", "nvidia/dali/__init__.py": pipeline, "nvidia/dali/fn.py": functions})
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    # the package as well, or it would keep the false one as its attribute
    for name in [name for name in sys.modules if name.partition(".")[0] == "nvidia"]:
        monkeypatch.delitem(sys.modules, name)
    finding = doctor.run_check("nvidia-dali", doctor.check_dali)
    assert (finding.status, finding.detail) == (status, detail)


@pytest.fixture
def nvidia_smi(tmp_path, monkeypatch):
    """Put a program of that name, with the given shell script, first in PATH."""

    def install(script: str) -> None:
        program = tmp_path / "nvidia-smi"
        program.write_text(f"#!/bin/sh\n{script}\n")
        program.chmod(program.stat().st_mode | stat.S_IXUSR)
        monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")

    return install


def test_driver_version(nvidia_smi):
    nvidia_smi("echo 580.95.05; echo 580.95.05")
    finding = doctor.run_check("NVIDIA driver", doctor.check_driver)
    assert (finding.status, finding.version) == ("works", "580.95.05")


def test_a_driver_that_answers_with_an_error_is_broken(nvidia_smi):
    nvidia_smi("echo 'Failed to initialize NVML: Driver/library version mismatch'; exit 18")
    finding = doctor.run_check("NVIDIA driver", doctor.check_driver)
    assert finding.status == "broken"
    assert "version mismatch" in finding.detail


def test_no_driver(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert doctor.run_check("NVIDIA driver", doctor.check_driver).status == "missing"


@pytest.mark.parametrize(("driver", "status"), [("missing", "missing"), ("works", "broken")])
def test_a_gpu_that_torch_cannot_use_is_broken_only_where_there_is_a_driver(monkeypatch, driver, status):
    def init():
        raise RuntimeError("Found no NVIDIA driver on your system")

    monkeypatch.setattr("torch.version.cuda", "13.0")
    monkeypatch.setattr("torch.cuda.init", init)
    finding = doctor.run_check(
        "GPU", lambda: doctor.check_gpus(doctor.Finding("NVIDIA driver", False, driver, None, ""))
    )
    assert finding.status == status
    assert "Found no NVIDIA driver" in finding.detail


def test_only_what_is_required_decides():
    works = doctor.Finding("a", True, "works", "1", "")
    optional = doctor.Finding("b", False, "broken", None, "")
    required = doctor.Finding("c", True, "missing", None, "")
    assert doctor.Report("3", "x", None, [], [works, optional]).ok
    assert not doctor.Report("3", "x", None, [], [works, optional, required]).ok


def test_an_error_in_the_doctor_itself_is_not_taken_for_a_broken_package():
    with pytest.raises(ZeroDivisionError):
        doctor.run_check("x", lambda: (None, str(1 / 0)))


def test_examine_reports_everything_once():
    report = doctor.examine()
    names = [finding.name for finding in report.findings]
    optional = ["NVIDIA driver", "GPU", "triton", "nvidia-dali", "NVIDIA apex", "CUDA extension"]
    assert names == [*doctor.REQUIRED, *optional, *doctor.LATENTS]
    assert report.ok
    assert all(finding.detail for finding in report.findings if finding.status != "works")
    gpu = next(finding for finding in report.findings if finding.name == "GPU")
    assert bool(report.gpus) == (gpu.status == "works")


@pytest.mark.parametrize(("entry", "status"), [(1.0, "works"), (1.5, "broken")])
def test_a_gpu_has_to_multiply(monkeypatch, entry, status):
    monkeypatch.setattr("torch.version.cuda", "13.0")
    monkeypatch.setattr("torch.cuda.init", lambda: None)
    monkeypatch.setattr(doctor, "list_gpus", lambda: [doctor.Gpu(0, "x", "9.0", 80.0)])
    monkeypatch.setattr("torch.ones", lambda *shape, device: torch.full(shape, entry))
    works = doctor.Finding("NVIDIA driver", False, "works", None, "")
    assert doctor.run_check("GPU", lambda: doctor.check_gpus(works)).status == status


def test_triton_has_to_compute(monkeypatch):
    triton = pytest.importorskip("triton", reason="triton comes with the CUDA builds of torch")

    class Kernel:
        def __getitem__(self, grid):
            return lambda x, BLOCK: None

    monkeypatch.setattr(triton, "jit", lambda function: Kernel())
    finding = doctor.run_check("triton", doctor.check_triton)
    assert (finding.status, finding.detail) == ("broken", "RuntimeError: a kernel computed wrong numbers")
