"""Everything in the project that needs a GPU, in one command of at most nine minutes.

    python -m bench.gpu_gate [--only STAGE] [--minutes N] [--results FOLDER]

Needs the repository, a GPU, and a Python with torch and triton; what else a stage wants and does not find is said in
its line, and the stage counts as skipped. Stages, each in a process of its own with a limit of its own:

    extension   the CUDA extension, built in place where nvcc, pybind11 and ninja are found
    tests       tests/gpu under pytest
    sanitizer   compute-sanitizer (memcheck) on the smallest cases of the tests
    kernels     bench.kernels: every fused op against eager PyTorch and torch.compile
    attention   bench.attention: ours against PyTorch's backends, the joint call against two evaluations
    optimizer   bench.optimizer: the update of every model against PyTorch's, the official loop and apex
    step        bench.step: the step of B/4 and L/2 against the six-call step, plain and compiled, and MeanFlow's
    memory      bench.memory: predicted activations of B/4 and L/2 against those the allocator gives out
    training    the digits for a few hundred steps on the GPU, losses and time: the fused ops, captured or not, and in
                bf16, against the reference ops in float32
    data        bench.data and bench.encode: waiting for data behind DiT-B/2, decoding against Pillow

What the time does not suffice for is skipped and named: a second call with --only makes up for it. Prints a short table
last and writes one JSON file, with machine, versions and commit, into bench/results/. Exits 1 when a stage failed, 2
where there is no GPU.
"""

import argparse
import json
import math
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[1]
GATE_MODELS = ("DiT-B/4", "DiT-L/2")
TRAINING_OVERRIDES = ("engine.device=cuda", "engine.threads=null", "train.total_steps=300", "train.sample_every=0")
# the trainings draw the same numbers; their losses part by rounding only, which training amplifies slowly
TRAINING_TOLERANCE = 0.05
MAX_WAITING, MIN_DECODING = 0.01, 3.0  # of a step, over Pillow on all cores
TRAININGS = {
    "reference": ("engine.ops=reference",),
    "fused": ("engine.ops=fused", "engine.cuda_graph=off"),
    "captured": ("engine.ops=fused",),
    "bf16": ("engine.ops=fused", "engine.precision=bf16"),
}
# enough of the tests to run every kernel once, small enough for a tool that slows it a hundredfold
SANITIZED = (
    "as_precise_as_eager and (2x3x24 or 5x2x3x7) and float32 or (random_numbers and normal)"
    " or follows_moved or many_tensors"
)


MINUTES = 8.5


@dataclass
class Stage:
    """What came of one stage: passed, failed or skipped, why, how long it took, and its figures."""

    name: str
    status: str
    detail: str
    seconds: float = 0.0
    figures: dict[str, Any] = field(default_factory=dict)


class Clock:
    """Until when the stages may run: one for the process, because every command of every stage heeds it."""

    end = math.inf

    @classmethod
    def left_s(cls) -> float:
        """Return the seconds that are left, at least 0."""
        return max(0.0, cls.end - time.monotonic())


def run(command: list[str], limit_s: int) -> tuple[int, str]:
    """Return exit code and output (stdout and stderr together) of `command`, run at the root; 124 past the limit.

    On the GPU, not in Triton's interpreter, whatever the environment says; never longer than the clock says.
    """
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    try:
        done = subprocess.run(
            command,
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=min(limit_s, Clock.left_s()),
            check=False,
        )
    except subprocess.TimeoutExpired as expired:
        output = expired.stdout or ""
        return 124, output if isinstance(output, str) else output.decode(errors="replace")
    return done.returncode, done.stdout


def is_installed(name: str) -> bool:
    """Return whether a module can be found, without importing more than the packages it lies in."""
    try:
        return find_spec(name) is not None
    except ModuleNotFoundError:
        return False


def last_line(output: str) -> str:
    """Return the last line of `output` that is not empty."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    return lines[-1] if lines else "no output"


def extension() -> Stage:
    """The CUDA extension, built in place unless it can be imported."""
    if find_spec("_soflow_C") is not None:
        return Stage("extension", "passed", "installed")
    missing = [name for name in ("setuptools", "pybind11", "ninja") if find_spec(name) is None]
    if missing or (shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")) is None:
        return Stage("extension", "skipped", f"not installed: {', '.join(missing) or 'nvcc'}")
    code, output = run(
        ["env", "SOFLOW_BUILD_CUDA=1", sys.executable, "setup.py", "build_ext", "--inplace"], limit_s=120
    )
    if code != 0:
        print(output[-4000:], flush=True)
    return Stage("extension", "passed" if code == 0 else "failed", last_line(output))


def tests() -> Stage:
    """tests/gpu under pytest."""
    if find_spec("pytest") is None:
        return Stage("tests", "skipped", "pytest is not installed")
    code, output = run([sys.executable, "-m", "pytest", "-q", "tests/gpu"], limit_s=200)
    print(output, flush=True)
    return Stage("tests", "passed" if code == 0 else "failed", last_line(output))


def sanitizer() -> Stage:
    """compute-sanitizer on the smallest cases of the tests."""
    tool = shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")
    if tool is None or find_spec("pytest") is None:
        return Stage("sanitizer", "skipped", "compute-sanitizer or pytest is not installed")
    # the caching allocator would hide accesses beyond a tensor inside its blocks
    command = ["env", "PYTORCH_NO_CUDA_MEMORY_CACHING=1", tool, "--tool", "memcheck", "--error-exitcode", "9"]
    files = ["tests/gpu/test_kernels.py", "tests/gpu/test_multi_tensor.py"]
    selection = ["-m", "pytest", "-q", "-x", *files, "-k", SANITIZED]
    code, output = run([*command, sys.executable, *selection], limit_s=150)
    if code != 0:
        print(output[-4000:], flush=True)
    summaries = [line for line in output.splitlines() if "ERROR SUMMARY" in line or " passed" in line]
    return Stage("sanitizer", "passed" if code == 0 else "failed", "; ".join(summaries) or last_line(output))


def kernels() -> Stage:
    """Every fused op against eager PyTorch and torch.compile."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernels.json"
        code, output = run([sys.executable, "-m", "bench.kernels", "--quick", "--json", str(file)], limit_s=150)
        print(output, flush=True)
        if code != 0:
            return Stage("kernels", "failed", last_line(output))
        figures = json.loads(file.read_text(encoding="utf-8"))
    ratios = [row["compiled_ms"] / row["fused_ms"] for row in figures["rows"]]
    slower = sum(ratio < 1 for ratio in ratios)
    return Stage("kernels", "passed", f"{len(ratios)} rows, {slower} slower than torch.compile", figures=figures)


def attention() -> Stage:
    """Ours against PyTorch's backends, and the joint call against two evaluations."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "attention.json"
        code, output = run([sys.executable, "-m", "bench.attention", "--quick", "--json", str(file)], limit_s=100)
        print(output, flush=True)
        if code != 0:
            return Stage("attention", "failed", last_line(output))
        figures = json.loads(file.read_text(encoding="utf-8"))
    ahead = []
    for shape in {tuple(row["shape"]) for row in figures["attention"]}:
        ms = {
            row["way"]: row["both_ms"]
            for row in figures["attention"]
            if tuple(row["shape"]) == shape and "both_ms" in row
        }
        ours = ms.pop("ours")
        ahead.append(f"{shape[1]}x{shape[3]} {min(ms.values()) / ours:.2f}" if ms else f"{shape[1]}x{shape[3]} alone")
    detail = f"times the best of PyTorch: {', '.join(sorted(ahead))}"
    return Stage("attention", "passed", detail, figures=figures)


def optimizer() -> Stage:
    """The update of every model against PyTorch's, the official loop and apex."""
    if find_spec("_soflow_C") is None:
        return Stage("optimizer", "skipped", "the CUDA extension is not built")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "optimizer.json"
        code, output = run([sys.executable, "-m", "bench.optimizer", "--json", str(file)], limit_s=120)
        print(output, flush=True)
        if code != 0:
            return Stage("optimizer", "failed", last_line(output))
        figures = json.loads(file.read_text(encoding="utf-8"))
    models = {row["model"] for row in figures["rows"]}
    ms = {(row["model"], row["way"]): row["ms"] for row in figures["rows"]}
    of_copy = [row["of_copy"] for row in figures["rows"] if row["way"] == "fused"]
    ahead = min(ms[model, "torch"] / ms[model, "fused"] for model in models)
    detail = f"{len(models)} models, at least {min(of_copy):.0%} of copy bandwidth and {ahead:.2f} times torch's fused"
    return Stage("optimizer", "passed", detail, figures=figures)


def training() -> Stage:
    """The digits on the GPU in several ways, from the same seed, against the reference ops."""
    missing = [name for name in ("msgspec", "ruamel.yaml", "safetensors", "sklearn") if find_spec(name) is None]
    if missing:
        return Stage("training", "skipped", f"not installed: {', '.join(missing)}")
    figures: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, settings in TRAININGS.items():
            overrides = [*TRAINING_OVERRIDES, *settings, f"name={name}", f"output_dir={json.dumps(folder)}"]
            code, output = run([sys.executable, "train.py", "configs/digits.yaml", *overrides], limit_s=60)
            if code != 0:
                print(output[-4000:], flush=True)
                return Stage("training", "failed", f"{name}: {last_line(output)}")
            lines = (Path(folder) / name / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
            figures[name] = json.loads(lines[-1])
    mse = {name: line["loss/velocity_mse"] for name, line in figures.items()}
    apart = max(abs(value / mse["reference"] - 1) for value in mse.values())
    seconds = ", ".join(f"{name} {line['time/step_s']:.4f}" for name, line in figures.items())
    detail = f"velocity mse at most {apart:.1%} apart; seconds a step: {seconds}"
    return Stage("training", "passed" if apart < TRAINING_TOLERANCE else "failed", detail, figures=figures)


def data() -> Stage:
    """Loaders of latents behind DiT-B/2, which may wait 1 % of the time, and decoding against Pillow on all cores."""
    missing = [name for name in ("h5py", "msgspec", "nvidia.dali") if not is_installed(name)]
    if missing:
        return Stage("data", "skipped", f"not installed: {', '.join(missing)}")
    figures: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for module, options in (("data", ["--samples", "8192", "--seconds", "2"]), ("encode", [])):
            file = Path(folder) / f"{module}.json"
            command = [sys.executable, "-m", f"bench.{module}", "--device", "cuda", "--json", str(file), *options]
            code, output = run(command, limit_s=150)
            print(output, flush=True)
            if code != 0:
                return Stage("data", "failed", f"{module}: {last_line(output)}")
            figures[module] = json.loads(file.read_text(encoding="utf-8"))
    ours = {row["loader"]: row for row in figures["data"]["rows"] if not row["loader"].startswith("official")}
    waiting = {name: ours[name]["waiting"] for name in ("plain float16", "dali float16")}
    fits = max(waiting.values()) <= MAX_WAITING and figures["encode"]["ratio"] >= MIN_DECODING
    shares = ", ".join(f"{name} waits {share:.1%}" for name, share in waiting.items())
    detail = f"{shares}; decoding {figures['encode']['ratio']:.1f} times Pillow"
    return Stage("data", "passed" if fits else "failed", detail, figures=figures)


def step() -> Stage:
    """The step of a small and a large model against the straightforward ones."""
    code, output, rows = rows_of("bench.step", limit_s=200)
    if code != 0:
        return Stage("step", "failed", last_line(output))
    parts = []
    for model in GATE_MODELS:
        per_image = {row["variant"]: row["seconds"] / row["batch"] for row in rows if row["model"] == model}
        engine = next(row for row in rows if row["model"] == model)
        ratios = [f"{per_image[name] / per_image['engine']:.2f} times {name}" for name in per_image if name != "engine"]
        mfu = f", MFU {engine['mfu']:.0%}" if "mfu" in engine else ""
        parts.append(f"{model} at batch {engine['batch']}: {', '.join(ratios)}{mfu}")
    return Stage("step", "passed", "; ".join(parts), figures={"rows": rows})


def memory() -> Stage:
    """Predicted and allocated memory of a small and a large model; a tenth apart is a failure."""
    code, output, rows = rows_of("bench.memory", "--batch", "64", "--measure", limit_s=120)
    if not rows:
        return Stage("memory", "failed", last_line(output))
    pairs = [(row["activations"], row["measured"]) for row in rows if row["measured"]]
    apart = max((abs(predicted / measured - 1) for predicted, measured in pairs), default=0.0)
    detail = f"{len(pairs)} of {len(rows)} variants measured, at most {apart:.1%} from the prediction"
    return Stage("memory", "passed" if code == 0 else "failed", detail, figures={"rows": rows})


def rows_of(module: str, *options: str, limit_s: int) -> tuple[int, str, list[dict[str, Any]]]:
    """Return exit code, output and rows of a benchmark of the models of the gate."""
    models = [text for model in GATE_MODELS for text in ("--model", model)]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "rows.json"
        code, output = run([sys.executable, "-m", module, *models, *options, "--json", str(file)], limit_s=limit_s)
        print(output, flush=True)
        rows = json.loads(file.read_text(encoding="utf-8"))["rows"] if file.exists() else []
    return code, output, rows


STAGES: dict[str, Callable[[], Stage]] = {
    "extension": extension,
    "tests": tests,
    "sanitizer": sanitizer,
    "kernels": kernels,
    "attention": attention,
    "optimizer": optimizer,
    "step": step,
    "memory": memory,
    "training": training,
    "data": data,
}


def machine() -> dict[str, Any]:
    """Return what the figures depend on: GPU, driver, versions and commit."""
    query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total,clocks.max.sm", "--format=csv,noheader"]
    versions = {"python": platform.python_version(), "torch": torch.__version__, "cuda": torch.version.cuda}
    for package in ("triton", "numpy"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = None
    return {
        "gpu": torch.cuda.get_device_name(),
        "capability": ".".join(map(str, torch.cuda.get_device_capability())),
        "nvidia-smi": run(query, 20)[1].strip() if shutil.which("nvidia-smi") else None,
        "versions": versions,
        "commit": run(["git", "rev-parse", "HEAD"], 20)[1].strip() if (ROOT / ".git").exists() else None,
        "changed": bool(run(["git", "status", "--porcelain"], 20)[1].strip()) if (ROOT / ".git").exists() else None,
    }


def main() -> int:
    """Run the stages, write the JSON file, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=STAGES, action="append", help="this stage, not all; may be repeated")
    parser.add_argument("--minutes", type=float, default=MINUTES, help=f"for all stages (default {MINUTES})")
    parser.add_argument("--results", type=Path, default=ROOT / "bench" / "results", help="folder of the JSON file")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("error: got no GPU, expected one: bench.gpu_gate runs what needs it", file=sys.stderr)
        return 2
    Clock.end = time.monotonic() + 60.0 * args.minutes
    stages = []
    for name in args.only or STAGES:
        print(f"== {name}", flush=True)
        start = time.perf_counter()
        out_of_time = Stage(name, "skipped", f"no time left: --only {name} makes up for it")
        stage = STAGES[name]() if Clock.left_s() else out_of_time
        if stage.status == "failed" and not Clock.left_s():
            stage = out_of_time
        stage.seconds = time.perf_counter() - start
        stages.append(stage)
    now = datetime.now(timezone.utc)
    result = {"time": now.isoformat(timespec="seconds"), **machine(), "stages": [asdict(stage) for stage in stages]}
    args.results.mkdir(parents=True, exist_ok=True)
    gpu = "-".join(torch.cuda.get_device_name().lower().split())
    file = args.results / f"gpu-gate-{gpu}-{now:%Y%m%d-%H%M%S}.json"
    file.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(f"\n{result['gpu']}, torch {torch.__version__}, {file}")
    for stage in stages:
        print(f"{stage.name:12}{stage.status:9}{stage.seconds:6.0f} s  {stage.detail}")
    return 1 if any(stage.status == "failed" for stage in stages) else 0


if __name__ == "__main__":
    sys.exit(main())
