"""What the CUDA extension needs of the hardware: registers, shared memory and spills of every kernel.

    python -m bench.extension [--json FILE]

Needs nvcc but no GPU: csrc/ is compiled for sm_80, sm_90 and sm_100, and what ptxas reports is printed. A row per
kernel and architecture; exits 1 when a kernel spills, 2 without nvcc.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

from bench.figures import keep

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "csrc" / "multi_tensor.cu"
ARCHITECTURES = (80, 90, 100)
ENTRY = re.compile(r"Compiling entry function '(?P<symbol>\w+)' for '(?P<arch>\w+)'")
SPILLS = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
USAGE = re.compile(r"Used (\d+) registers(?:.*?(\d+) bytes smem)?")


@dataclass(frozen=True)
class Resources:
    """What ptxas reports for one kernel on one architecture. shared, spills: bytes; spills with the stack frame."""

    kernel: str
    arch: str
    registers: int
    shared: int
    spills: int


def find_nvcc() -> str | None:
    """Return the path of nvcc, or None."""
    home = os.environ.get("CUDA_HOME")
    if home and (found := shutil.which("nvcc", path=os.path.join(home, "bin"))):
        return found
    return shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")


def measure(nvcc: str, arch: int) -> list[Resources]:
    """Return a row for every kernel, compiled for sm_`arch`."""
    with tempfile.TemporaryDirectory() as folder:
        command = [nvcc, "-O3", "-std=c++17", f"-arch=sm_{arch}", "-Xptxas", "-v", "-cubin", str(SOURCE)]
        done = subprocess.run(
            [*command, "-o", str(Path(folder) / "kernels.cubin")], capture_output=True, text=True, check=False
        )
    if done.returncode != 0:
        raise RuntimeError(done.stderr)
    return parse(done.stderr)


def parse(report: str) -> list[Resources]:
    """Return the rows of what ptxas -v prints; its lines on device functions that are no kernels are left out."""
    rows = []
    kernel, arch, spills = "", "", 0
    for line in report.splitlines():
        if match := ENTRY.search(line):
            (kernel,) = re.findall(r"\d([a-z]+_kernel)E", match["symbol"])
            arch, spills = match["arch"], 0
        elif match := SPILLS.search(line):
            spills += sum(map(int, match.groups()))
        elif match := USAGE.search(line):
            rows.append(Resources(kernel, arch, int(match[1]), int(match[2] or 0), spills))
    return rows


def main() -> int:
    """Print the table, write it as JSON where asked, and return 1 when a kernel spills."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows and the compiler's version there")
    args = parser.parse_args()
    nvcc = find_nvcc()
    if nvcc is None:
        print("error: got no nvcc, expected one in CUDA_HOME, on the PATH or in /usr/local/cuda/bin", file=sys.stderr)
        return 2
    rows = [row for arch in ARCHITECTURES for row in measure(nvcc, arch)]
    print(f"{'kernel':16}{'arch':8}{'registers':>10}{'shared':>8}{'spills':>8}")
    for row in rows:
        print(f"{row.kernel:16}{row.arch:8}{row.registers:10}{row.shared:8}{row.spills:8}")
    if args.json is not None:
        version = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
        result = {"nvcc": version.splitlines()[-1], "rows": [asdict(row) for row in rows]}
        keep(args.json, result)
    return 1 if any(row.spills for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
