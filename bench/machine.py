"""What the figures of a benchmark depend on besides its code."""

import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch


def machine() -> dict[str, str | None]:
    """Return processor or GPU, and the versions that count; None for what is not installed."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else (models or [platform.machine()])[0]
    packages = {name: installed_version(name) for name in ("torch", "numpy", "scikit-learn")}
    return {"device": device, "system": platform.system(), "python": platform.python_version(), **packages}


def installed_version(package: str) -> str | None:
    """Return the version of a package, None where it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None
