"""What works on this machine, what is missing, what is broken, and why: the facts that `soflow doctor` prints.

Checks of what is optional use it, because many a package fails only at its first call; the required packages and the
CUDA extension are imported. Importing this module imports nothing that it checks.
"""

import importlib
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from importlib.machinery import PathFinder
from importlib.util import find_spec
from types import ModuleType
from typing import Literal

# Distribution and module of what the package cannot run without.
REQUIRED = {
    "matplotlib": "matplotlib",
    "msgspec": "msgspec",
    "numpy": "numpy",
    "pillow": "PIL",
    "ruamel.yaml": "ruamel.yaml",
    "safetensors": "safetensors",
    "scikit-learn": "sklearn",
    "tensorboard": "tensorboard",
    "torch": "torch",
    "tqdm": "tqdm",
}
# The same of the extra `latents`.
LATENTS = {"diffusers": "diffusers", "h5py": "h5py"}
# What importing a damaged package, and its first call, raise.
CHECK_ERRORS = (
    ImportError,
    OSError,
    RuntimeError,
    AttributeError,
    AssertionError,
    LookupError,
    TypeError,
    ValueError,
    SyntaxError,
    subprocess.SubprocessError,
)
APEX_HOME = "https://github.com/NVIDIA/apex"


class MissingError(Exception):
    """What a check looks for is not there; the message says so, and how to get it."""


@dataclass(frozen=True)
class Finding:
    """One component: whether it works, its version where it has one, and what was tried or what went wrong."""

    name: str
    required: bool
    status: Literal["works", "missing", "broken"]
    version: str | None
    detail: str


@dataclass(frozen=True)
class Gpu:
    """One CUDA device: its compute capability as 'major.minor', its memory in GiB."""

    index: int
    name: str
    capability: str
    memory_gib: float


@dataclass(frozen=True)
class Report:
    """Everything `examine` found; cuda is the version torch was built for, if any."""

    python: str
    platform: str
    cuda: str | None
    gpus: list[Gpu]
    findings: list[Finding]

    @property
    def ok(self) -> bool:
        """Whether everything required works."""
        return all(finding.status == "works" for finding in self.findings if finding.required)


Outcome = tuple[str | None, str]  # version and detail


def examine() -> Report:
    """Check this machine; whatever fails becomes a finding, never an error."""
    required = [
        run_check(name, lambda name=name: check_required(name), required=True)  # type: ignore[misc]
        for name in REQUIRED
    ]
    torch_works = any(finding.name == "torch" and finding.status == "works" for finding in required)
    latents = [
        run_check(name, lambda name=name: check_latents(name))  # type: ignore[misc]
        for name in LATENTS
    ]
    driver = run_check("NVIDIA driver", check_driver)
    gpu = run_check("GPU", lambda: check_gpus(driver))
    optional = [
        run_check("triton", check_triton),
        run_check("nvidia-dali", check_dali),
        run_check("NVIDIA apex", check_apex),
        run_check("CUDA extension", check_extension),
    ]
    return Report(
        python=platform.python_version(),
        platform=platform.platform(),
        cuda=sys.modules["torch"].version.cuda if torch_works else None,
        gpus=list_gpus() if gpu.status == "works" else [],
        findings=[*required, driver, gpu, *optional, *latents],
    )


def run_check(name: str, check: Callable[[], Outcome], required: bool = False) -> Finding:
    """Return what `check` finds: it returns version and detail, raises MissingError, or any of CHECK_ERRORS."""
    try:
        version, detail = check()
    except MissingError as error:
        return Finding(name, required, "missing", None, str(error))
    except CHECK_ERRORS as error:
        return Finding(name, required, "broken", None, f"{type(error).__name__}: {error}")
    return Finding(name, required, "works", version, detail)


def check_required(name: str) -> Outcome:
    """Import the module of the distribution `name`, no older than the metadata ask for."""
    module = _import(REQUIRED[name], f"pip install {name}")
    _require_floor(name, module)
    detail = ""
    if name == "torch":
        detail = f"built for CUDA {module.version.cuda}" if module.version.cuda else "built without CUDA"
    return _version(module), detail


def check_latents(name: str) -> Outcome:
    """The same for what encodes and reads latents."""
    module = _import(LATENTS[name], "pip install 'soflow[latents]'")
    _require_floor(name, module)
    return _version(module), "for latents"


def check_driver() -> Outcome:
    """Ask nvidia-smi for the version of the driver."""
    program = shutil.which("nvidia-smi")
    if program is None:
        raise MissingError("no nvidia-smi: no driver, or a container without access to it")
    command = [program, "--query-gpu=driver_version", "--format=csv,noheader"]
    answer = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    if answer.returncode != 0:
        raise RuntimeError((answer.stdout + answer.stderr).strip())
    return answer.stdout.split()[0], ""


def check_gpus(driver: Finding) -> Outcome:
    """Multiply matrices on every GPU."""
    torch = _import("torch", "pip install torch")
    if torch.version.cuda is None:
        raise MissingError("torch is built without CUDA")
    try:
        torch.cuda.init()
    except RuntimeError as error:
        if driver.status == "missing":
            raise MissingError(str(error)) from error
        raise
    gpus = list_gpus()
    for gpu in gpus:
        x = torch.ones(64, 64, device=f"cuda:{gpu.index}")
        if (x @ x).sum().item() != 64.0**3:
            raise RuntimeError(f"GPU {gpu.index}: wrong matrix product")
    return None, f"{len(gpus)} found, matrix product right on each"


def list_gpus() -> list[Gpu]:
    """Return the GPUs that torch sees."""
    import torch

    gpus = []
    for index in range(torch.cuda.device_count()):
        found = torch.cuda.get_device_properties(index)
        gpus.append(Gpu(index, found.name, f"{found.major}.{found.minor}", found.total_memory / 2**30))
    return gpus


def check_triton() -> Outcome:
    """Compile a kernel, and run it where there is a GPU (or where TRITON_INTERPRET makes Python run it)."""
    triton = _import("triton", "it comes with the CUDA builds of torch")
    torch = _import("torch", "pip install torch")
    tl = importlib.import_module("triton.language")
    compiler = importlib.import_module("triton.compiler")
    target = importlib.import_module("triton.backends.compiler").GPUTarget("cuda", 90, 32)

    @triton.jit  # type: ignore[untyped-decorator]
    def add_one(x_ptr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def, name-defined]
        offs = tl.arange(0, BLOCK)
        tl.store(x_ptr + offs, tl.load(x_ptr + offs) + 1)

    on_gpu, interpreted = torch.cuda.is_available(), not isinstance(add_one, triton.JITFunction)
    x = torch.zeros(16, device="cuda" if on_gpu else "cpu")
    try:
        if not on_gpu and not interpreted:
            source = compiler.ASTSource(add_one, {"x_ptr": "*fp32", "BLOCK": "constexpr"}, {"BLOCK": 16})
            triton.compile(source, target=target)
            return _version(triton), "compiled a kernel for sm_90; no GPU to run it on"
        add_one[(1,)](x, BLOCK=16)
    except triton.TritonError as error:
        raise RuntimeError(str(error)) from error
    if x.sum().item() != 16:
        raise RuntimeError("a kernel computed wrong numbers")
    return _version(triton), "interpreted a kernel" if interpreted else "compiled and ran a kernel"


def check_dali() -> Outcome:
    """Send a batch through a pipeline: to the GPU where there is one, else on the CPU."""
    dali = _import("nvidia.dali", "pip install nvidia-dali-cuda130 nvidia-npp")
    numpy = _import("numpy", "pip install numpy")
    torch = _import("torch", "pip install torch")
    fn = importlib.import_module("nvidia.dali.fn")
    on_gpu = torch.cuda.is_available()
    batch = numpy.arange(6, dtype=numpy.float32).reshape(2, 3)
    pipeline = dali.Pipeline(batch_size=2, num_threads=1, device_id=0 if on_gpu else None)
    with pipeline:
        x = fn.external_source(source=lambda: batch, batch=True)
        pipeline.set_outputs(x.gpu() if on_gpu else x)
    pipeline.build()
    (out,) = pipeline.run()
    if not numpy.array_equal((out.as_cpu() if on_gpu else out).as_array(), batch):
        raise RuntimeError("a pipeline changed its data")
    return _version(dali), f"ran a pipeline on the {'GPU' if on_gpu else 'CPU'}"


def check_apex() -> Outcome:
    """Construct FusedAdam, which fails where apex was built without its CUDA extensions."""
    spec = find_spec("apex")
    if spec is None:
        raise MissingError(f"not installed: build it from {APEX_HOME}; the package that PyPI calls apex is another one")
    folders = list(spec.submodule_search_locations or [])
    if PathFinder.find_spec("apex.optimizers", folders) is None:
        where = ", ".join(folders) or spec.origin
        raise MissingError(
            f"the apex in {where} is not NVIDIA's but another package, such as the web toolkit that PyPI calls apex; "
            f"build NVIDIA's from {APEX_HOME}"
        )
    torch = _import("torch", "pip install torch")
    fused_adam = importlib.import_module("apex.optimizers").FusedAdam
    fused_adam([torch.nn.Parameter(torch.zeros(1, device="cuda" if torch.cuda.is_available() else "cpu"))])
    return _version(importlib.import_module("apex")), "constructed FusedAdam"


def check_extension() -> Outcome:
    """Import the CUDA extension of this package."""
    module = _import("_soflow_C", "pip install builds it where it finds nvcc; SOFLOW_BUILD_CUDA=1 says why it does not")
    return _version(module), "imported"


def _import(module: str, remedy: str) -> ModuleType:
    try:
        found = find_spec(module) is not None
    except ModuleNotFoundError:  # a parent package is not there
        found = False
    if not found:
        raise MissingError(f"not installed: {remedy}")
    return importlib.import_module(module)


def _version(module: ModuleType) -> str | None:
    return getattr(module, "__version__", None)


def _require_floor(name: str, module: ModuleType) -> None:
    try:
        wanted = metadata.requires("soflow") or []
    except metadata.PackageNotFoundError:  # a checkout that is not installed
        return
    found = _version(module)
    for line in wanted:
        floor = re.match(rf"{re.escape(name)}>=([\d.]+)", line)
        if floor and found and _numbers(found) < _numbers(floor[1]):
            raise RuntimeError(f"got version {found}, expected at least {floor[1]}")


def _numbers(version: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", version.partition("+")[0])]
