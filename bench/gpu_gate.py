"""Everything in the project that needs a GPU, in one command of at most nine minutes.

    python -m bench.gpu_gate [--only STAGE] [--minutes N] [--results FOLDER]

Needs the repository, a GPU, and a Python with torch and triton; what else a stage wants and does not find (two small
packages, msgspec and ruamel.yaml, are behind most) is said in its line, and the stage counts as skipped. Stages, each
in a process of its own with a limit of its own:

    extension   the CUDA extension, built in place where nvcc, pybind11 and ninja are found, and imported
    tests       tests/gpu under pytest
    sanitizer   compute-sanitizer (memcheck) on the smallest cases of the tests
    kernels     bench.kernels: every fused op against eager PyTorch and torch.compile
    attention   bench.attention: ours against PyTorch's backends, the joint call against two evaluations
    optimizer   bench.optimizer: the update of every model against PyTorch's, the official loop and apex
    step        bench.step: the step of B/4 and L/2 against the six-call step, plain and compiled, and MeanFlow's
    memory      bench.memory: predicted activations of B/4 and L/2 against those the allocator gives out
    training    the digits for a few hundred steps on the GPU, losses and time: the fused ops, captured or not, and in
                bf16, against the reference ops in float32
    data        bench.data: waiting for data behind DiT-B/2
    encode      bench.encode: decoding by DALI against Pillow on all cores

What the time does not suffice for is skipped, and the call with --only that makes up for it named. Prints a short table
last and writes one JSON file, with machine, versions and commit, into bench/results/. Exits 1 when a stage failed, 2
where there is no GPU.
"""

import argparse
import json
import math
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime, timezone
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from bench.extension import find_nvcc
from bench.figures import keep
from bench.machine import installed_version

ROOT = Path(__file__).parents[1]
GATE_MODELS = ("DiT-B/4", "DiT-L/2")
MODEL_OPTIONS = [text for model in GATE_MODELS for text in ("--model", model)]
WATCHED_LOADERS = ("plain float16", "dali float16")
# all of them take minutes: torch.compile of many layers, and batches that do not fit
LARGE_VARIANTS = ("engine", "six calls")
TRAINING_OVERRIDES = ("engine.device=cuda", "engine.threads=null", "train.total_steps=300", "train.sample_every=0")
# the trainings draw the same numbers; their losses part by rounding only, which training amplifies slowly
TRAINING_TOLERANCE = 0.05
MAX_WAITING, MIN_DECODING = 0.01, 3.0  # of a step, over Pillow on all cores
# on an H100: of copy bandwidth, and over others; a miss is said, and fails nothing
KERNEL_OF_COPY, NORM_BACKWARD_RATIO = 0.8, 1.5
UPDATE_OF_COPY, UPDATE_RATIO = 0.8, 1.2
STEP_RATIO = {"six calls": 2.5, "six calls, bf16 compiled": 1.25}
MFU = {"DiT-B/4": 0.40, "DiT-L/2": 0.45}
MEMORY_RATIO = 3.0
TRAININGS = {
    "reference": ("engine.ops=reference",),
    "fused": ("engine.ops=fused", "engine.cuda_graph=off"),
    "captured": ("engine.ops=fused",),
    "bf16": ("engine.ops=fused", "engine.precision=bf16"),
}
# of the tests: each holds a CUDA context of its own
MAX_WORKERS = 8
# enough of the tests to run every kernel once, small enough for a tool that slows it a hundredfold
SANITIZED = (
    "as_precise_as_eager and (2x3x24 or 5x2x3x7 or 2x3x2x4 or 1x67x1x20) and float32 or more_tokens_than_a_block"
    " or random_numbers or draw_is_that or follows_moved or many_tensors"
)


MINUTES = 8.5
OUT_OF_TIME = "no time left"


@dataclass
class Stage:
    """What came of one stage: passed, failed or skipped, why, how long it took, and its figures."""

    name: str
    status: str
    detail: str
    seconds: float = 0.0
    figures: dict[str, Any] = field(default_factory=dict)


class BenchError(Exception):
    """A benchmark that failed: the last line it said, and the figures it wrote all the same."""

    def __init__(self, detail: str, figures: dict[str, Any]) -> None:
        super().__init__(detail)
        self.detail, self.figures = detail, figures


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
    timeout = min(limit_s, Clock.left_s())
    with subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            output, _ = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            # with all that it started: what went on would disturb the figures of the next stage
            os.killpg(process.pid, signal.SIGKILL)
            output, _ = process.communicate()
            return 124, f"{output}\ncut off after {timeout:.0f} s\n"
        except BaseException:
            # in a session of its own it does not hear of what ends this one
            os.killpg(process.pid, signal.SIGKILL)
            raise
    return process.returncode, output


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
    """The CUDA extension, built in place where that can be, lest an old one be tested; and imported."""
    missing = [name for name in ("setuptools", "pybind11") if not is_installed(name)]
    missing += [] if is_installed("ninja") or shutil.which("ninja") else ["ninja"]
    missing += [] if find_nvcc() else ["nvcc"]
    origin = "built"
    if not missing:
        command = ["env", "SOFLOW_BUILD_CUDA=1", sys.executable, "setup.py", "build_ext", "--inplace"]
        code, output = run(command, limit_s=120)
        if code != 0:
            print(output[-4000:], flush=True)
            return Stage("extension", "failed", last_line(output))
    elif is_installed("_soflow_C"):
        origin = f"found; not built anew for want of {', '.join(missing)}"
    else:
        return Stage("extension", "skipped", f"not installed: {', '.join(missing)}")
    code, output = run([sys.executable, "-c", "import _soflow_C"], limit_s=20)
    return Stage("extension", "passed" if code == 0 else "failed", origin if code == 0 else last_line(output))


def tests() -> Stage:
    """tests/gpu under pytest, by several processes where it can: most of the time is Triton's compiler."""
    workers = ["-n", str(min(MAX_WORKERS, os.cpu_count() or 1)), "--dist", "loadgroup"] if is_installed("xdist") else []
    # a file that cannot be imported is an error, but no reason to leave the others out
    options = ["-q", "--continue-on-collection-errors", *workers]
    code, output = run([sys.executable, "-m", "pytest", *options, "tests/gpu"], limit_s=200)
    print(output, flush=True)
    return Stage("tests", "passed" if code == 0 else "failed", last_line(output))


def sanitizer() -> Stage:
    """compute-sanitizer on the smallest cases of the tests."""
    tool = shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")
    if tool is None:
        return Stage("sanitizer", "skipped", "not installed: compute-sanitizer")
    # the caching allocator would hide accesses beyond a tensor inside its blocks
    command = ["env", "PYTORCH_NO_CUDA_MEMORY_CACHING=1", tool, "--tool", "memcheck", "--error-exitcode", "9"]
    # not what PyTorch asks the driver in vain; and Python may take its time until it asks for the GPU
    command += ["--report-api-errors", "no", "--target-processes", "all", "--launch-timeout", "60"]
    files = ["tests/gpu/test_kernels.py", "tests/gpu/test_multi_tensor.py"]
    selection = ["-m", "pytest", "-q", "-x", *files, "-k", SANITIZED]
    code, output = run([*command, sys.executable, *selection], limit_s=150)
    summaries = [line.strip() for line in output.splitlines() if "ERROR SUMMARY" in line or " passed" in line]
    # tests that it did not watch pass too
    passed = code == 0 and any("ERROR SUMMARY: 0 errors" in line for line in summaries)
    if not passed:
        print(output[-4000:], flush=True)
    return Stage("sanitizer", "passed" if passed else "failed", "; ".join(summaries) or last_line(output))


def kernels() -> Stage:
    """Every fused op against eager PyTorch and torch.compile."""
    figures = figures_of("kernels", "--quick", limit_s=200)
    rows = {(row["op"], row["shape"], row["direction"]): row for row in figures["rows"]}
    slower = sum(row["compiled_ms"] < row["fused_ms"] for row in rows.values())
    reached = []
    for (op, shape, direction), row in rows.items():
        if direction == "forward" and not op.startswith("attention"):
            reached.append((f"{op} {shape}", row["fraction_of_copy"], KERNEL_OF_COPY))
        elif op.endswith("norm"):
            ms = {way: row[way] - rows[op, shape, "forward"][way] for way in ("fused_ms", "compiled_ms")}
            reached.append((f"{op} {shape} backward", ms["compiled_ms"] / ms["fused_ms"], NORM_BACKWARD_RATIO))
    detail = f"{len(rows)} rows, {slower} slower than torch.compile; {misses(reached)}"
    return Stage("kernels", "passed", detail, figures=figures)


def attention() -> Stage:
    """Ours against PyTorch's backends, and the joint call against two evaluations."""
    figures = figures_of("attention", "--quick", limit_s=100)
    ahead = []
    for shape in {tuple(row["shape"]) for row in figures["attention"]}:
        ms = {
            row["way"]: row["both_ms"]
            for row in figures["attention"]
            if tuple(row["shape"]) == shape and "both_ms" in row
        }
        ours = ms.pop("ours")
        ordered = [value for way, value in ms.items() if "ordered" in way]
        of_best = [f"{min(some) / ours:.2f}" if some else "alone" for some in (ms.values(), ordered)]
        ahead.append(f"{shape[1]}x{shape[3]} {' and '.join(of_best)}")
    detail = f"times the best of PyTorch, and its best without atomics: {', '.join(sorted(ahead))}"
    return Stage("attention", "passed", detail, figures=figures)


def optimizer() -> Stage:
    """The update of every model against PyTorch's, the official loop and apex."""
    figures = figures_of("optimizer", limit_s=120)
    models = {row["model"] for row in figures["rows"]}
    ms = {(row["model"], row["way"]): row["ms"] for row in figures["rows"]}
    of_copy = [row["of_copy"] for row in figures["rows"] if row["way"] == "fused"]
    ahead = min(ms[model, "torch"] / ms[model, "fused"] for model in models)
    missed = misses([("of copy", min(of_copy), UPDATE_OF_COPY), ("over torch", ahead, UPDATE_RATIO)])
    detail = f"{len(models)} models, at least {min(of_copy):.0%} of copy bandwidth and {ahead:.2f} times torch's fused"
    detail += f"; {missed}"
    return Stage("optimizer", "passed", detail, figures=figures)


def training() -> Stage:
    """The digits on the GPU in several ways, from the same seed, against the reference ops."""
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
    """Loaders of latents behind DiT-B/2, which may wait 1 % of the time."""
    loaders = [text for loader in ("official 2", *WATCHED_LOADERS) for text in ("--loader", loader)]
    options = ("--device", "cuda", "--samples", "8192", "--seconds", "2", "--rounds", "1")
    figures = figures_of("data", *options, *loaders, limit_s=150)
    waiting = {row["loader"]: row["waiting"] for row in figures["rows"] if row["loader"] in WATCHED_LOADERS}
    shares = ", ".join(f"{loader} waits {share:.1%}" for loader, share in waiting.items())
    return Stage("data", "passed" if max(waiting.values()) <= MAX_WAITING else "failed", shares, figures=figures)


def encode() -> Stage:
    """Decoding by DALI against Pillow on all cores."""
    figures = figures_of("encode", "--device", "cuda", limit_s=150)
    status = "passed" if figures["ratio"] >= MIN_DECODING else "failed"
    return Stage("encode", status, f"{figures['ratio']:.1f} times Pillow", figures=figures)


def step() -> Stage:
    """The step of a small and a large model against the straightforward ones; of the large one against one of them."""
    small, large = GATE_MODELS
    few = [text for variant in LARGE_VARIANTS for text in ("--variant", variant)]
    measured: list[dict[str, Any]] = []
    failures = []
    for model, options in ((small, []), (large, few)):
        try:
            measured += figures_of("step", "--model", model, *options, limit_s=200)["rows"]
        except BenchError as error:
            measured += error.figures.get("rows", [])
            failures.append(error.detail)
    figures = {"rows": measured}
    if failures:
        raise BenchError("; ".join(failures), figures)
    parts, reached = [], []
    for model in GATE_MODELS:
        rows = [row for row in measured if row["model"] == model]
        per_image = {row["variant"]: row["seconds"] / row["batch"] for row in rows}
        engine = rows[0]
        ratios = {name: value / per_image["engine"] for name, value in per_image.items() if name != "engine"}
        reached += [(f"{model} {name}", ratios[name], target) for name, target in STEP_RATIO.items() if name in ratios]
        said = [f"{ratio:.2f} times {name}" for name, ratio in ratios.items()]
        if "mfu" in engine:
            said.append(f"MFU {engine['mfu']:.0%}")
            reached.append((f"{model} MFU", engine["mfu"], MFU[model]))
        parts.append(f"{model} at batch {engine['batch']}: {', '.join(said)}")
    return Stage("step", "passed", "; ".join([*parts, misses(reached)]), figures=figures)


def memory() -> Stage:
    """Predicted and allocated memory of a small and a large model."""
    figures = figures_of("memory", *MODEL_OPTIONS, "--batch", "64", "--measure", limit_s=120)
    apart = [abs(row["activations"] / row["measured"] - 1) for row in figures["rows"] if row["measured"]]
    sizes = {(row["model"], row["variant"]): row["activations"] for row in figures["rows"]}
    saved = [
        (f"{model} MeanFlow over engine", sizes[model, "MeanFlow, one JVP"] / sizes[model, "engine"], MEMORY_RATIO)
        for model in GATE_MODELS
    ]
    detail = f"{len(apart)} of {len(figures['rows'])} variants measured, at most {max(apart, default=0):.1%} apart"
    detail += f"; {misses(saved)}"
    return Stage("memory", "passed", detail, figures=figures)


def misses(reached: list[tuple[str, float, float]]) -> str:
    """Return which figures (name, value, target) are below their targets, for the line of a stage."""
    missed = [f"{name} {value:.2f} of {target:.2f}" for name, value, target in reached if value < target]
    return f"below target: {', '.join(missed)}" if missed else "all targets met"


def figures_of(bench: str, *options: str, limit_s: int) -> dict[str, Any]:
    """Return what `python -m bench.NAME` writes as JSON; BenchError where it ends with another exit code than 0."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "figures.json"
        code, output = run([sys.executable, "-m", f"bench.{bench}", *options, "--json", str(file)], limit_s=limit_s)
        print(output, flush=True)
        figures: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    if code != 0:
        raise BenchError(last_line(output), figures)
    return figures


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
    "encode": encode,
}
# beyond torch, triton and numpy
ENGINE = ("msgspec", "ruamel.yaml", "safetensors", "PIL")
NEEDS = {
    "tests": ("pytest",),
    "sanitizer": ("pytest",),
    "optimizer": ("_soflow_C",),
    "step": ENGINE,
    "memory": ENGINE,
    "training": (*ENGINE, "sklearn", "tensorboard", "tqdm"),
    "data": (*ENGINE, "h5py"),
    "encode": (*ENGINE, "nvidia.dali"),
}


def carry_out(name: str) -> Stage:
    """Return what came of the stage, which is skipped where the time is over or a package is missing."""
    out_of_time = Stage(name, "skipped", OUT_OF_TIME)
    if not Clock.left_s():
        return out_of_time
    if missing := [package for package in NEEDS.get(name, ()) if not is_installed(package)]:
        return Stage(name, "skipped", f"not installed: {', '.join(missing)}")
    try:
        stage = STAGES[name]()
    except BenchError as error:
        stage = Stage(name, "failed", error.detail, figures=error.figures)
    except Exception as error:  # noqa: BLE001  # the other stages are measured all the same
        traceback.print_exc()
        stage = Stage(name, "failed", f"{type(error).__name__}: {error}")
    if stage.status == "failed" and not Clock.left_s():
        return replace(out_of_time, figures=stage.figures)
    return stage


def machine() -> dict[str, Any]:
    """Return what the figures depend on: GPU, driver, versions and commit."""
    query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total,clocks.max.sm", "--format=csv,noheader"]
    versions = {"python": platform.python_version(), "torch": torch.__version__, "cuda": torch.version.cuda}
    versions |= {package: installed_version(package) for package in ("triton", "numpy")}
    return {
        "gpu": torch.cuda.get_device_name(),
        "capability": ".".join(map(str, torch.cuda.get_device_capability())),
        "nvidia-smi": run(query, 20)[1].strip() if shutil.which("nvidia-smi") else None,
        "versions": versions,
        "commit": git("rev-parse", "HEAD"),
        "changed": None if (changes := git("status", "--porcelain")) is None else bool(changes),
    }


def git(*arguments: str) -> str | None:
    """Return what git says of the repository, None where there is no git or no repository of ours."""
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        return None
    code, output = run(["git", *arguments], 20)
    return output.strip() if code == 0 else None


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
    # as a scheduler or a time limit ends it: with the stage that runs
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    Clock.end = time.monotonic() + 60.0 * args.minutes
    now = datetime.now(timezone.utc)
    result = {"time": now.isoformat(timespec="seconds"), **machine()}
    args.results.mkdir(parents=True, exist_ok=True)
    gpu = "-".join(torch.cuda.get_device_name().lower().split())
    file = args.results / f"gpu-gate-{gpu}-{now:%Y%m%d-%H%M%S}.json"
    stages: list[Stage] = []
    for name in args.only or STAGES:
        print(f"== {name}", flush=True)
        start = time.perf_counter()
        stage = carry_out(name)
        stage.seconds = time.perf_counter() - start
        stages.append(stage)
        keep(file, result | {"stages": [asdict(stage) for stage in stages]})
    print(f"\n{result['gpu']}, torch {torch.__version__}, {file}")
    for stage in stages:
        print(f"{stage.name:12}{stage.status:9}{stage.seconds:6.0f} s  {stage.detail}")
    if late := [stage.name for stage in stages if stage.detail == OUT_OF_TIME]:
        print(f"for the rest: python -m bench.gpu_gate {' '.join(f'--only {name}' for name in ('extension', *late))}")
    return 1 if any(stage.status == "failed" for stage in stages) else 0


if __name__ == "__main__":
    sys.exit(main())
