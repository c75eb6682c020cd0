"""w, m, v, averages and bf16 shadows of every tensor of a model in one launch: the tables of csrc/, and its launchers.

Weights, moments and averages fp32, gradients fp32 | bf16, shadows bf16, all contiguous, on one GPU; any number and size
of tensors, of which some may lack a gradient. The arithmetic is in csrc/element.h. Per parameter the update moves 28
bytes, 36 with one average, 2 more for a shadow; clipping or the guard adds a launch that reads the gradient (4 bytes).
Hyper-parameters, steps and decisions lie in device memory: a launch can be captured in a CUDA graph.
"""

import importlib
import struct
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from importlib.util import find_spec
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

DEVICE_TYPE = "cuda"
# columns of the tables in csrc/tables.h
COUNTERS = ("ticket", "finished", "skipped", "skip")
FINISHED, SKIPPED = COUNTERS.index("finished"), COUNTERS.index("skipped")
BF16_TAG = 1


class GroupRow(NamedTuple):
    """The hyper-parameters of a param group. radam: 1 for RAdam, 0 for AdamW."""

    lr: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    radam: float


class ProfileRow(NamedTuple):
    """How an average moves: `decay` in updates divisible by `every`; gamma >= 0 is a power-function profile instead."""

    decay: float
    every: float
    gamma: float
    in_double: float


@dataclass(frozen=True)
class Slot:
    """One tensor of the model; moments are None until it first has a gradient. averages: one entry per profile."""

    param: Tensor
    exp_avg: Tensor | None
    exp_avg_sq: Tensor | None
    shadow: Tensor | None
    averages: tuple[Tensor | None, ...]
    group: int


def is_built() -> bool:
    """Return whether the CUDA extension is installed."""
    return find_spec("_soflow_C") is not None


def load_extension() -> ModuleType:
    """Return the CUDA extension; RuntimeError where it is not installed."""
    if not is_built():
        raise RuntimeError(
            "got no CUDA extension (_soflow_C), expected one: install this package where nvcc is found, "
            "with SOFLOW_BUILD_CUDA=1 to see why it is not built"
        )
    return importlib.import_module("_soflow_C")


def requirement(params: Sequence[Tensor]) -> str | None:
    """Return what keeps `params` from being updated here, None where nothing does."""
    for param in params:
        if param.device.type != DEVICE_TYPE or param.device != params[0].device:
            return f"a parameter is on {param.device}, expected all on one GPU"
        if param.dtype != torch.float32 or not param.is_contiguous():
            return f"a parameter is {param.dtype} with strides {param.stride()}, expected contiguous float32"
    return None


class MultiTensorUpdate:
    """The tables of one model, and the launch of its update.

    steps (fp32, one per slot): updates done so far, moved on by every launch. counters (int64, as COUNTERS): kept by
    the caller, so that they outlive the tables. ValueError for tensors that the kernels cannot take.
    """

    def __init__(
        self,
        slots: Sequence[Slot],
        num_groups: int,
        steps: Tensor,
        counters: Tensor,
        num_averages: int,
    ) -> None:
        self._extension = load_extension()
        self._device = counters.device
        self._slots = list(slots)
        self.steps, self.counters = steps, counters
        for slot in slots:
            self._require_valid(slot, num_averages)
        self._records = self._table(
            [
                [_address(t) for t in (s.param, s.exp_avg, s.exp_avg_sq, s.shadow)] + [s.param.numel(), s.group]
                for s in slots
            ],
            torch.int64,
        )
        averages = [[_address(slot.averages[a]) for slot in slots] for a in range(num_averages)]
        self._averages = self._table(averages, torch.int64)
        self._chunks = self._chunk_table()
        self._gradients = torch.zeros(len(slots), dtype=torch.int64, device=self._device)
        self._groups = torch.zeros(num_groups, len(GroupRow._fields), dtype=torch.float64, device=self._device)
        self._profiles = torch.zeros(num_averages, len(ProfileRow._fields), dtype=torch.float64, device=self._device)
        self._policy = torch.tensor([float("inf"), 0.0], dtype=torch.float64, device=self._device)
        self._partials = torch.zeros(len(self._chunks), dtype=torch.float64, device=self._device)
        self.norms = torch.zeros(2, dtype=torch.float32, device=self._device)
        self._written: dict[int, tuple[int, ...]] = {}
        self._is_captured = False
        self._tables = self._extension.Tables(
            records=self._records.data_ptr(),
            gradients=self._gradients.data_ptr(),
            averages=self._averages.data_ptr(),
            chunks=self._chunks.data_ptr(),
            steps=steps.data_ptr(),
            groups=self._groups.data_ptr(),
            profiles=self._profiles.data_ptr(),
            policy=self._policy.data_ptr(),
            partials=self._partials.data_ptr(),
            counters=counters.data_ptr(),
            norms=self.norms.data_ptr(),
            num_tensors=len(slots),
            num_averages=num_averages,
            num_chunks=len(self._chunks),
        )

    def set_groups(self, rows: Sequence[GroupRow]) -> None:
        """Put the hyper-parameters of all param groups into device memory, if they are others than there."""
        self._write(self._groups, _double_words([value for row in rows for value in row]), "hyper-parameters")

    def set_profiles(self, rows: Sequence[ProfileRow]) -> None:
        """Put how each average moves into device memory, if that is otherwise than there."""
        self._write(self._profiles, _double_words([value for row in rows for value in row]), "averages")

    def set_policy(self, clip_norm: float | None, guard: bool) -> None:
        """Put the largest norm (None: any), and whether to skip a gradient that is not finite, into device memory."""
        limit = float("inf") if clip_norm is None else clip_norm
        self._write(self._policy, _double_words([limit, float(guard)]), "clipping and guard")

    def set_gradients(self, gradients: Sequence[Tensor | None]) -> None:
        """Say where the gradient of each slot lies (None: it has none); also while a graph is being captured.

        The caller keeps the tensors alive until the launch. ValueError for one that does not fit its weight.
        """
        words = []
        for slot, gradient in zip(self._slots, gradients, strict=True):
            if gradient is None:
                words.append(0)
                continue
            if (
                gradient.dtype not in (torch.float32, torch.bfloat16)
                or gradient.shape != slot.param.shape
                or gradient.device != slot.param.device
                or not gradient.is_contiguous()
            ):
                raise ValueError(
                    f"gradient: got {_describe(gradient)}, expected contiguous float32 or bfloat16 of shape "
                    f"{tuple(slot.param.shape)} on {slot.param.device}"
                )
            # an empty tensor has no address, but its step counts
            address = gradient.data_ptr() or self.counters.data_ptr()
            words.append(address | (BF16_TAG if gradient.dtype == torch.bfloat16 else 0))
        self._write(self._gradients, tuple(words), None)

    def launch(self, norm_first: bool) -> None:
        """Launch the update; norm_first launches the norm before, without which nothing is clipped or skipped."""
        with self._on_device():
            index, stream = self._target()
            if norm_first:
                self._extension.norm(self._tables, index, stream)
            self._extension.update(self._tables, norm_first, index, stream)

    def _write(self, table: Tensor, words: tuple[int, ...], what: str | None) -> None:
        capturing = self._device.type == "cuda" and torch.cuda.is_current_stream_capturing()
        assert len(words) == table.numel()
        # a captured graph writes the addresses again whenever it is replayed: what lies there is not known any more
        self._is_captured |= capturing and what is None
        if self._written.get(id(table), ()) == words and not (self._is_captured and what is None):
            return
        if capturing and what is not None:
            raise RuntimeError(f"{what}: got new values while a graph is captured, expected them to be set before")
        with self._on_device():
            self._extension.write(table.data_ptr(), list(words), *self._target())
        self._written[id(table)] = words

    def _on_device(self) -> "torch.cuda.device | nullcontext[None]":
        return torch.cuda.device(self._device) if self._device.type == "cuda" else nullcontext()

    def _target(self) -> tuple[int, int]:
        if self._device.type != "cuda":
            return 0, 0
        return self._device.index or 0, torch.cuda.current_stream(self._device).cuda_stream

    def _table(self, rows: Sequence[Sequence[float]], dtype: torch.dtype) -> Tensor:
        return torch.tensor(rows, dtype=dtype).to(self._device)

    def _chunk_table(self) -> Tensor:
        size: int = self._extension.CHUNK
        counts = torch.tensor([-(-slot.param.numel() // size) for slot in self._slots], dtype=torch.int64)
        tensors = torch.repeat_interleave(torch.arange(len(counts)), counts)
        firsts = torch.repeat_interleave(counts.cumsum(0) - counts, counts)
        indices = torch.arange(len(tensors)) - firsts
        return torch.stack((tensors, indices), dim=1).to(torch.int32).contiguous().to(self._device)

    def _require_valid(self, slot: Slot, num_averages: int) -> None:
        if num_averages > self._extension.MAX_AVERAGES or len(slot.averages) != num_averages:
            raise ValueError(
                f"averages: got {max(num_averages, len(slot.averages))}, expected at most "
                f"{self._extension.MAX_AVERAGES}, and as many for every tensor"
            )
        expected = {"param": slot.param, "exp_avg": slot.exp_avg, "exp_avg_sq": slot.exp_avg_sq, "shadow": slot.shadow}
        expected |= {f"averages[{a}]": average for a, average in enumerate(slot.averages)}
        for name, tensor in expected.items():
            dtype = torch.bfloat16 if name == "shadow" else torch.float32
            if tensor is not None and not (
                tensor.dtype == dtype
                and tensor.shape == slot.param.shape
                and tensor.device == self._device
                and tensor.is_contiguous()
            ):
                raise ValueError(
                    f"{name}: got {_describe(tensor)}, expected contiguous {dtype} of shape {tuple(slot.param.shape)} "
                    f"on {self._device}"
                )


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _double_words(values: Sequence[float]) -> tuple[int, ...]:
    return struct.unpack(f"{len(values)}Q", struct.pack(f"{len(values)}d", *values))


def _describe(tensor: Tensor) -> str:
    return f"{tensor.dtype} of shape {tuple(tensor.shape)} and strides {tensor.stride()} on {tensor.device}"
