"""The CUDA extension as built here: what the compiler made of it, and what it says where there is no GPU."""

import json
import os
import re
import subprocess

import pytest
import torch

import soflow
from bench import extension
from soflow.config import MAX_PROFILES
from soflow.kernels import multi_tensor

needs_nvcc = pytest.mark.skipif(extension.find_nvcc() is None, reason="needs nvcc")
needs_extension = pytest.mark.skipif(not multi_tensor.is_built(), reason="the CUDA extension is not built")


@needs_nvcc
def test_no_kernel_spills(tmp_path, monkeypatch, capsys):
    file = tmp_path / "extension.json"
    monkeypatch.setattr("sys.argv", ["extension", "--json", str(file)])
    assert extension.main() == 0, capsys.readouterr().out
    rows = json.loads(file.read_text())["rows"]
    kernels = {"norm_kernel", "update_kernel", "write_kernel"}
    assert {(row["kernel"], row["arch"]) for row in rows} == {
        (kernel, f"sm_{arch}") for kernel in kernels for arch in extension.ARCHITECTURES
    }
    # four blocks of 256 threads fit on a multiprocessor, which have 64 KiB of loads under way
    assert all(0 < row["registers"] <= 64 for row in rows)


@needs_nvcc
def test_packs_are_loaded_and_stored_at_once(tmp_path):
    """Each 16 bytes of weights, moments, gradient and averages in one access; only the ends of tensors are not."""
    file = tmp_path / "kernels.ptx"
    command = [
        extension.find_nvcc(),
        "-O3",
        "-std=c++17",
        "-arch=sm_90",
        "-ptx",
        str(extension.SOURCE),
        "-o",
        str(file),
    ]
    subprocess.run(command, check=True)
    kernels = file.read_text().split(".entry ")[1:]
    (update,) = (text for text in kernels if "update_kernel" in text.split("(")[0])
    (norm,) = (text for text in kernels if "norm_kernel" in text.split("(")[0])
    # weight, first average, gradient, two moments, each further average; the gradient is not stored
    assert len(re.findall(r"\bld\.(?:global\.)?v4\.[fu]32", update)) == 6
    assert len(re.findall(r"\bst\.(?:global\.)?(?:cs\.)?v4\.f32", update)) == 5
    assert len(re.findall(r"\bst\.(?:global\.)?(?:cs\.)?v4\.u16", update)) == 1
    assert re.search(r"\bld\.(?:global\.)?v4\.[fu]32", norm)


def test_a_spill_is_seen():
    report = """
ptxas info    : Compiling entry function '_ZN6soflow13update_kernelENS_6TablesEb' for 'sm_90'
    8 bytes stack frame, 4 bytes spill stores, 4 bytes spill loads
ptxas info    : Used 58 registers, used 1 barriers, 2337 bytes smem
ptxas info    : Function properties for __internal_accurate_pow
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
"""
    assert extension.parse(report) == [extension.Resources("update_kernel", "sm_90", 58, 2337, 16)]


@needs_nvcc
@pytest.mark.skipif(os.environ.get("SOFLOW_BUILD_CUDA") == "0", reason="not wanted: SOFLOW_BUILD_CUDA=0")
def test_built_wherever_it_can_be():
    assert multi_tensor.is_built(), "there is an nvcc: pip install --editable ., or python setup.py build_ext --inplace"
    module = multi_tensor.load_extension()
    assert module.__version__ == soflow.__version__
    assert (module.CHUNK, module.MAX_AVERAGES) == (8192, MAX_PROFILES + 1)


@needs_extension
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("name", ["norm", "update", "write"])
def test_launch_without_a_gpu_is_an_error(name):
    module = multi_tensor.load_extension()
    counts = {"num_tensors": 0, "num_averages": 0, "num_chunks": 1}
    addresses = ("records", "gradients", "averages", "chunks", "steps", "groups", "profiles", "policy", "partials")
    tables = module.Tables(**dict.fromkeys((*addresses, "counters", "norms"), 0), **counts)
    arguments = {"norm": (tables, 0, 0), "update": (tables, False, 0, 0), "write": (0, [1], 0, 0)}[name]
    with pytest.raises(RuntimeError, match=rf"_soflow_C\.{name}: .*; expected an NVIDIA GPU and a driver for CUDA"):
        getattr(module, name)(*arguments)
