"""Build of the package; its metadata is in pyproject.toml.

SOFLOW_BUILD_CUDA decides on the CUDA extension _soflow_C: `auto` (the default) builds it where nvcc is found, `1`
always, `0` never. nvcc is that of CUDA_HOME, of the PATH, or of /usr/local/cuda, in this order.
"""

import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

SOURCES = ("csrc/module.cpp", "csrc/multi_tensor.cu")
ARCHITECTURES = (80, 90, 100)
FLAGS = ("-O3", "-std=c++17", "-Xcompiler", "-fPIC,-fvisibility=hidden")
REMEDY = "install it, or set SOFLOW_BUILD_CUDA=0 to do without the CUDA extension"
NINJA = """\
rule compile
  command = {nvcc} {flags} {gencode} {defines} -MD -MF $out.d -c $in -o $out
  depfile = $out.d
  deps = gcc
rule link
  command = {nvcc} -shared -cudart static $in -o $out
"""


def find_nvcc() -> str | None:
    """Return the path of nvcc, or None."""
    home = os.environ.get("CUDA_HOME")
    if home and (found := shutil.which("nvcc", path=os.path.join(home, "bin"))):
        return found
    return shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")


def find_ninja() -> str | None:
    """Return the path of ninja, that of its Python package or one on the PATH, or None."""
    try:
        import ninja
    except ModuleNotFoundError:
        return shutil.which("ninja")
    return os.path.join(ninja.BIN_DIR, "ninja")


def wanted() -> bool:
    """Return whether to build the extension; exits where that is asked for and impossible."""
    choice = os.environ.get("SOFLOW_BUILD_CUDA", "auto")
    if choice not in ("auto", "1", "0"):
        sys.exit(f"error: SOFLOW_BUILD_CUDA: got {choice!r}, expected auto, 1 or 0")
    if choice == "1" and find_nvcc() is None:
        sys.exit("error: SOFLOW_BUILD_CUDA: got '1', expected nvcc in CUDA_HOME, on the PATH or in /usr/local/cuda/bin")
    return choice == "1" or (choice == "auto" and find_nvcc() is not None)


def gencode(nvcc: str) -> str:
    """Return nvcc's options: code for every architecture it knows of ours, and PTX of the newest for later ones."""
    listed = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True, check=True).stdout.split()
    known = [number for number in ARCHITECTURES if f"compute_{number}" in listed]
    if not known:
        sys.exit(f"error: {nvcc}: knows {', '.join(listed)}, expected one of {ARCHITECTURES}")
    targets = [f"-gencode arch=compute_{number},code=sm_{number}" for number in known]
    return " ".join([*targets, f"-gencode arch=compute_{known[-1]},code=compute_{known[-1]}"])


def escaped(path: str | Path) -> str:
    """Return a path as ninja reads it in a build statement; in a command it quotes such a path for the shell itself."""
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def quoted(word: str) -> str:
    """Return one word of a command as ninja reads it, for the shell."""
    return shlex.quote(word).replace("$", "$$")


class BuildCuda(build_ext):
    """Compiles with nvcc, by ninja."""

    def build_extension(self, ext: Extension) -> None:
        """Compile and link `ext`."""
        try:
            import pybind11
        except ModuleNotFoundError:
            sys.exit(f"error: no pybind11: {REMEDY}")
        ninja = find_ninja()
        if ninja is None:
            sys.exit(f"error: no ninja: {REMEDY}")
        nvcc = find_nvcc()
        assert nvcc is not None
        root, output = Path(__file__).parent.resolve(), Path(self.get_ext_fullpath(ext.name)).resolve()
        folder = Path(self.build_temp).resolve()
        for made in (folder, output.parent):
            made.mkdir(parents=True, exist_ok=True)
        includes = (pybind11.get_include(), sysconfig.get_paths()["include"])
        defines = (f'-DSOFLOW_VERSION="{self.distribution.get_version()}"', *(f"-I{path}" for path in includes))
        rules = NINJA.format(
            nvcc=quoted(nvcc),
            flags=" ".join(FLAGS),
            gencode=gencode(nvcc),
            defines=" ".join(map(quoted, defines)),
        )
        objects = {source: f"{Path(source).name}.o" for source in ext.sources}
        lines = [f"build {target}: compile {escaped(root / source)}" for source, target in objects.items()]
        lines.append(f"build {escaped(output)}: link {' '.join(objects.values())}")
        (folder / "build.ninja").write_text(rules + "\n".join(lines) + "\n", encoding="utf-8")
        subprocess.run([ninja, "-C", str(folder)], check=True)


setup(
    # here, because setuptools before 77 refuses the string that later ones want in pyproject.toml
    license="MIT",
    ext_modules=[Extension("_soflow_C", list(SOURCES))] if wanted() else [],
    cmdclass={"build_ext": BuildCuda},
)
