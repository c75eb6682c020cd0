import json
import signal
import subprocess
import sys
import time
from contextlib import suppress
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from bench import attention, gpu_gate, kernels
from bench.gpu_gate import Stage


@pytest.fixture
def pretended_gpu(monkeypatch):
    """A machine whose GPU has a name; the stages are the tests' own."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Test GPU 1")
    monkeypatch.setattr(gpu_gate.Clock, "end", float("inf"))  # main() sets it
    monkeypatch.setattr(gpu_gate, "machine", lambda: {"gpu": "Test GPU 1", "commit": "0" * 40})


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
@pytest.mark.parametrize("module", [attention, gpu_gate, kernels])
def test_without_a_gpu_it_says_so(module, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [module.__name__])
    assert module.main() == 2
    assert "got no GPU" in capsys.readouterr().err


@pytest.mark.parametrize(("statuses", "code"), [(("passed", "skipped"), 0), (("passed", "failed", "passed"), 1)])
def test_a_failed_stage_decides_the_exit_code(statuses, code, pretended_gpu, monkeypatch, tmp_path, capsys):
    stages = {
        f"stage{i}": lambda i=i, status=status: Stage(f"stage{i}", status, f"detail {i}", figures={"x": i})
        for i, status in enumerate(statuses)
    }
    monkeypatch.setattr(gpu_gate, "STAGES", stages)
    monkeypatch.setattr(sys, "argv", ["bench.gpu_gate", "--results", str(tmp_path / "results")])
    assert gpu_gate.main() == code
    (file,) = (tmp_path / "results").iterdir()
    assert file.name.startswith("gpu-gate-test-gpu-1-")
    result = json.loads(file.read_text(encoding="utf-8"))
    assert result["commit"] == "0" * 40
    assert [stage["status"] for stage in result["stages"]] == list(statuses)
    assert [stage["figures"]["x"] for stage in result["stages"]] == list(range(len(statuses)))
    table = capsys.readouterr().out
    assert all(f"detail {i}" in table for i in range(len(statuses)))


def test_what_there_is_no_time_for_is_skipped_and_named(pretended_gpu, monkeypatch, tmp_path, capsys):
    """Neither a stage that the end of the time cuts off nor one after it has failed."""
    sleep = [sys.executable, "-c", "import time; time.sleep(60)"]

    def cut_off():
        return Stage("long", "passed" if gpu_gate.run(sleep, limit_s=60)[0] == 0 else "failed", "")

    monkeypatch.setattr(gpu_gate, "STAGES", {"long": cut_off, "next": lambda: pytest.fail("no time was left")})
    monkeypatch.setattr(sys, "argv", ["bench.gpu_gate", "--minutes", "0.02", "--results", str(tmp_path)])
    assert gpu_gate.main() == 0
    (file,) = tmp_path.iterdir()
    stages = json.loads(file.read_text(encoding="utf-8"))["stages"]
    assert [(stage["status"], stage["detail"]) for stage in stages] == [("skipped", "no time left")] * 2
    assert "for the rest: python -m bench.gpu_gate --only extension --only long --only next" in capsys.readouterr().out


def test_a_command_is_cut_off_at_its_limit_with_all_that_it_started(tmp_path):
    script = f"sleep 60 & echo $! > {tmp_path / 'child'}; echo begun; wait"
    code, output = gpu_gate.run(["bash", "-c", script], limit_s=2)
    assert (code, output) == (124, "begun\n\ncut off after 2 s\n")
    assert ends(int((tmp_path / "child").read_text()))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_gate_that_is_ended_ends_its_stage(tmp_path, number):
    stage = f"sleep 60 & echo $! > {tmp_path / 'child'}; wait"
    code = (
        "import sys, torch\nfrom bench import gpu_gate\n"
        "torch.cuda.is_available, torch.cuda.get_device_name = lambda: True, lambda: 'Test GPU 1'\n"
        "gpu_gate.machine = lambda: {'gpu': 'Test GPU 1'}\n"
        f"gpu_gate.STAGES = {{'long': lambda: gpu_gate.run(['bash', '-c', {stage!r}], 60)}}\n"
        f"sys.argv = ['bench.gpu_gate', '--results', {str(tmp_path)!r}]\ngpu_gate.main()"
    )
    # a child of a shell that runs in the background would be deaf to SIGINT
    gate = subprocess.Popen(
        [sys.executable, "-c", f"import signal\nsignal.signal(signal.SIGINT, signal.default_int_handler)\n{code}"],
        cwd=gpu_gate.ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    child = tmp_path / "child"
    while gate.poll() is None and not (child.exists() and child.read_text().strip()):
        time.sleep(0.05)
    gate.send_signal(number)
    assert gate.wait(timeout=30) != 0
    assert ends(int(child.read_text()))


def ends(process: int) -> bool:
    """Whether a process that was killed is soon gone, or a zombie that nobody waits for."""
    stat, end = Path("/proc") / str(process) / "stat", time.monotonic() + 10
    while time.monotonic() < end:
        with suppress(FileNotFoundError, ProcessLookupError):
            if stat.read_text().rpartition(")")[2].split()[0] != "Z":
                time.sleep(0.05)
                continue
        return True
    return False


def test_a_stage_that_the_clock_cuts_off_keeps_what_it_measured(monkeypatch):
    def cut_off():
        monkeypatch.setattr(gpu_gate.Clock, "end", 0.0)
        raise gpu_gate.BenchError("cut off after 9 s", {"rows": [1]})

    monkeypatch.setattr(gpu_gate, "STAGES", {"long": cut_off})
    monkeypatch.setattr(gpu_gate.Clock, "end", float("inf"))
    assert gpu_gate.carry_out("long") == Stage("long", "skipped", "no time left", figures={"rows": [1]})


def test_a_command_keeps_its_exit_code_and_output():
    code, output = gpu_gate.run([sys.executable, "-c", "import sys; print('x', file=sys.stderr); sys.exit(3)"], 20)
    assert (code, output) == (3, "x\n")
    assert gpu_gate.last_line("a\n b \n\n") == "b"


@pytest.mark.slow
def test_training_stage_compares_fused_with_reference(monkeypatch, tmp_path):
    """The very stage, but for its device and length: on the CPU all ops are the reference."""
    overrides = ("engine.device=cpu", "train.total_steps=2", "train.log_every=1", "train.sample_every=0")
    monkeypatch.setattr(gpu_gate, "TRAINING_OVERRIDES", overrides)
    stage = gpu_gate.training()
    assert stage.status == "passed", stage.detail
    assert stage.figures.keys() == set(gpu_gate.TRAININGS)


STEP_ROWS = [
    {
        "model": model,
        "variant": variant,
        "batch": 64,
        "seconds": seconds,
        **({"mfu": 0.5} if variant == "engine" else {}),
    }
    for model in gpu_gate.GATE_MODELS
    for variant, seconds in (("engine", 0.1), ("six calls", 0.25))
]
KERNEL_ROWS = [
    {"op": op, "shape": "DiT-B/4", "direction": direction, "compiled_ms": compiled, "fused_ms": fused, **fraction}
    for op, direction, compiled, fused, fraction in (
        ("modulated_norm", "forward", 2.0, 1.0, {"fraction_of_copy": 0.85}),
        ("modulated_norm", "forward + backward", 4.8, 3.0, {"fraction_of_copy": 0.7}),
        ("attention_difference", "forward", 1.0, 2.0, {"fraction_of_copy": 0.1}),
        ("gelu", "forward", 1.0, 1.0, {"fraction_of_copy": 0.75}),
    )
]
ATTENTION_ROWS = [
    {"shape": [256, 64, 12, 64], "way": way, "both_ms": both_ms}
    for way, both_ms in (("ours", 1.0), ("cudnn", 1.5), ("flash", 1.6), ("flash, ordered", 1.75))
] + [{"shape": [256, 256, 16, 72], "way": "ours", "both_ms": 1.0}]
OPTIMIZER_ROWS = [
    {"model": "DiT-B/4", "way": way, "ms": ms, "of_copy": of_copy}
    for way, ms, of_copy in (("fused", 1.0, 0.85), ("torch", 1.25, 0.6))
]
MEMORY_ROWS = [
    {"model": model, "variant": variant, "activations": activations, "measured": measured}
    for model in gpu_gate.GATE_MODELS
    for variant, activations, measured in (("engine", 1.05, 1.0), ("MeanFlow, one JVP", 3.0, None))
]
LOADER_ROWS = [{"loader": "official 2", "waiting": 0.5}, {"loader": "plain float16", "waiting": 0.001}]


@pytest.fixture
def pretended_bench(monkeypatch):
    """Return a function that lets every benchmark end with an exit code and write figures."""

    def pretend(code, figures):
        def run(command, limit_s):
            models = [after for option, after in pairwise(command) if option == "--model"]
            rows = [row for row in figures.get("rows", []) if row.get("model") in models or not models]
            written = figures | ({"rows": rows} if rows else {})
            Path(command[-1]).write_text(json.dumps(written), encoding="utf-8")
            return code, "a line\nthe last line\n"

        monkeypatch.setattr(gpu_gate, "run", run)
        monkeypatch.setattr(gpu_gate, "NEEDS", {})

    return pretend


@pytest.mark.parametrize(
    ("name", "figures", "detail"),
    [
        (
            "kernels",
            {"rows": KERNEL_ROWS},
            "slower than torch.compile; below target: modulated_norm DiT-B/4 backward 1.40 of 1.50, gelu DiT-B/4 0.75",
        ),
        ("attention", {"attention": ATTENTION_ROWS}, "atomics: 256x72 alone and alone, 64x64 1.50 and 1.75"),
        (
            "optimizer",
            {"rows": OPTIMIZER_ROWS},
            "at least 85% of copy bandwidth and 1.25 times torch's fused; all targets met",
        ),
        ("step", {"rows": STEP_ROWS}, "DiT-L/2 at batch 64: 2.50 times six calls, MFU 50%"),
        (
            "memory",
            {"rows": MEMORY_ROWS},
            "2 of 4 variants measured, at most 5.0% apart; below target: DiT-B/4 MeanFlow over engine 2.86 of 3.00",
        ),
        ("data", {"rows": LOADER_ROWS}, "plain float16 waits 0.1%"),
        ("encode", {"ratio": 3.5}, "3.5 times Pillow"),
    ],
)
def test_a_stage_says_what_its_bench_wrote(name, figures, detail, pretended_bench):
    pretended_bench(0, figures)
    stage = gpu_gate.carry_out(name)
    assert (stage.status, stage.figures) == ("passed", figures)
    assert detail in stage.detail
    pretended_bench(1, figures)
    lines = "; ".join(["the last line"] * (2 if name == "step" else 1))
    assert gpu_gate.carry_out(name) == Stage(name, "failed", lines, figures=figures)


@pytest.mark.parametrize(
    ("name", "figures"),
    [("data", {"rows": [{"loader": "dali float16", "waiting": 0.02}]}), ("encode", {"ratio": 2.5})],
)
def test_a_missed_target_fails(name, figures, pretended_bench):
    pretended_bench(0, figures)
    assert gpu_gate.carry_out(name).status == "failed"


def test_what_is_not_installed_is_named(monkeypatch):
    monkeypatch.setattr(gpu_gate, "NEEDS", {"step": ("torch", "no_such_package", "no.such_module")})
    assert gpu_gate.carry_out("step") == Stage("step", "skipped", "not installed: no_such_package, no.such_module")


def test_a_stage_that_is_broken_fails_alone(monkeypatch, capsys):
    monkeypatch.setattr(gpu_gate, "STAGES", {"broken": lambda: {}["both_ms"]})
    assert gpu_gate.carry_out("broken") == Stage("broken", "failed", "KeyError: 'both_ms'")
    assert "Traceback" in capsys.readouterr().err


def test_a_broken_off_gate_keeps_what_it_measured(pretended_gpu, monkeypatch, tmp_path):
    def broken():
        raise KeyboardInterrupt

    monkeypatch.setattr(gpu_gate, "STAGES", {"first": lambda: Stage("first", "passed", "done"), "second": broken})
    monkeypatch.setattr(sys, "argv", ["bench.gpu_gate", "--results", str(tmp_path)])
    with pytest.raises(KeyboardInterrupt):
        gpu_gate.main()
    (file,) = tmp_path.iterdir()
    assert [stage["name"] for stage in json.loads(file.read_text(encoding="utf-8"))["stages"]] == ["first"]


@pytest.fixture
def commands(monkeypatch):
    """The commands of a stage, which are not run: the exit code of each lies in `codes`, by its last word."""
    said, codes = [], {}

    def run(command, limit_s):
        said.append(command)
        return codes.get(command[-1], 0), "the last line"

    monkeypatch.setattr(gpu_gate, "run", run)
    return said, codes


def test_the_extension_is_built_anew(commands, monkeypatch):
    said, codes = commands
    monkeypatch.setattr(gpu_gate, "is_installed", lambda name: True)
    monkeypatch.setattr(gpu_gate, "find_nvcc", lambda: "/some/nvcc")
    assert gpu_gate.extension() == Stage("extension", "passed", "built")
    assert [command[-1] for command in said] == ["--inplace", "import _soflow_C"]
    codes["--inplace"] = 1
    assert gpu_gate.extension() == Stage("extension", "failed", "the last line")


def test_an_extension_that_cannot_be_built_must_be_one(commands, monkeypatch):
    _, codes = commands
    monkeypatch.setattr(gpu_gate, "find_nvcc", lambda: None)
    monkeypatch.setattr(gpu_gate, "is_installed", lambda name: True)
    assert gpu_gate.extension() == Stage("extension", "passed", "found; not built anew for want of nvcc")
    codes["import _soflow_C"] = 1
    assert gpu_gate.extension() == Stage("extension", "failed", "the last line")
    monkeypatch.setattr(gpu_gate, "is_installed", lambda name: name != "_soflow_C")
    assert gpu_gate.extension() == Stage("extension", "skipped", "not installed: nvcc")


def test_the_system_s_ninja_builds_the_extension_too(commands, monkeypatch):
    monkeypatch.setattr(gpu_gate, "find_nvcc", lambda: "/some/nvcc")
    monkeypatch.setattr(gpu_gate, "is_installed", lambda name: name not in ("ninja", "_soflow_C"))
    monkeypatch.setattr(gpu_gate.shutil, "which", lambda name: f"/usr/bin/{name}")
    assert gpu_gate.extension() == Stage("extension", "passed", "built")
    monkeypatch.setattr(gpu_gate.shutil, "which", lambda name: None)
    assert gpu_gate.extension() == Stage("extension", "skipped", "not installed: ninja")


@pytest.mark.parametrize(
    ("output", "status"),
    [
        ("======= ERROR SUMMARY: 0 errors\n22 passed in 60 s\n", "passed"),
        ("======= ERROR SUMMARY: 3 errors\n22 passed in 60 s\n", "failed"),
        ("22 passed in 60 s\n", "failed"),  # it watched nothing
    ],
)
def test_the_sanitizer_must_have_watched(output, status, monkeypatch):
    monkeypatch.setattr(gpu_gate.shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(gpu_gate, "run", lambda command, limit_s: (0, output))
    assert gpu_gate.sanitizer().status == status


def test_the_commit_is_that_of_a_repository_of_ours(monkeypatch):
    monkeypatch.setattr(gpu_gate, "run", lambda command, limit_s: (128, "fatal: detected dubious ownership"))
    assert gpu_gate.git("rev-parse", "HEAD") is None
    monkeypatch.setattr(gpu_gate.shutil, "which", lambda name: None)
    monkeypatch.setattr(gpu_gate, "run", lambda command, limit_s: pytest.fail("there is no git"))
    assert gpu_gate.git("rev-parse", "HEAD") is None


def test_the_step_of_the_large_model_has_few_rivals_and_loses_no_row(monkeypatch):
    def figures_of(bench, *options, limit_s):
        model = options[1]
        rows = [row for row in STEP_ROWS if row["model"] == model]
        if model == gpu_gate.GATE_MODELS[1]:
            assert options[2:] == ("--variant", "engine", "--variant", "six calls")
            raise gpu_gate.BenchError("cut off after 9 s", {"rows": rows[:1]})
        return {"rows": rows}

    monkeypatch.setattr(gpu_gate, "figures_of", figures_of)
    with pytest.raises(gpu_gate.BenchError) as failed:
        gpu_gate.step()
    assert failed.value.figures["rows"] == STEP_ROWS[:3]
