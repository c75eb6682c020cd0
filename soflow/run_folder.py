"""The folder of a run: what lies where, who may continue it, and how its network is loaded."""

import dataclasses
import errno
import fcntl
import json
import os
import socket
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from soflow import checkpoint
from soflow.assembly import choose_ops
from soflow.checkpoint import Checkpoint, CheckpointError, naming, replacing
from soflow.config import Config, FlowConfig, NetworkConfig, Sampler, default_vae, require_sampler
from soflow.config_file import compare_configs, dump_config, load_config, parse_config
from soflow.ema import Snapshot, reconstruct
from soflow.export import Trained, is_export, read_export
from soflow.flow import SolutionFlow, build_flow
from soflow.kernels import reference
from soflow.models import NetworkBuilder

# Settings that change what a run writes, or where it computes, but not what: they may differ when it is continued.
# The data set is known by its fingerprint, wherever it lies and however it is read.
FREE_FIELDS = {
    "": ("name", "output_dir"),
    "train": (
        *("log_every", "sample_every", "sample_nfe", "sample_vae", "checkpoint_every", "keep_last", "keep_every"),
        # as the number of processes is: what fits may change with it
        "accumulation",
    ),
    "data": ("root", "feeder", "prefetch"),
    "optim": ("max_bad_steps",),
    "engine": (
        "compile",
        "cuda_graph",
        "deterministic",
        "device",
        "recompute",
        "threads",
        "parallel",
        "timeout_s",
        "grace_s",
    ),
}
# What a stored configuration says of its grids is of no use: one refused by now must not keep the run from being read.
NO_GRIDS = ("train.sample_every=0",)

# of every DiT of the official code
OFFICIAL_CLASSES = 1000

# what a run writes before its config.yaml, and may leave without it
BEFORE_CONFIG = ("lock", "config.yaml.tmp")


class RunError(ValueError):
    """A run that cannot be made or continued as asked; the message names folder or field and what was expected."""


class RunFolder:
    """Paths of a run in `path`: config.yaml, lock, status.json, metrics.jsonl, tensorboard/, samples/, checkpoints/."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = path / "config.yaml"
        self.status = path / "status.json"
        self.lock = path / "lock"
        self.checkpoints = path / "checkpoints"
        self.samples = path / "samples"

    def read_config(self) -> Config:
        """Return the configuration as the run was last continued, less its grids; ConfigError as `load_config`."""
        # the official code's working folders hold a config.yaml too, and are not to be trained in
        return load_config(self.config, NO_GRIDS, accept_official=False)

    def newest_step(self) -> int:
        """Return the highest step of a checkpoint there, sound or not; 0 where there is none."""
        # what is no folder `require_free_for` refuses, in its own words
        return max(checkpoint.saved_steps(self.checkpoints), default=0) if self.path.is_dir() else 0

    def require_free_for(self, config: Config) -> None:
        """Raise RunError where the folder is another configuration's, or no run folder; writes nothing."""
        if self.path.exists() and not self.path.is_dir():
            raise RunError(f"{self.path}: got a file, expected a run folder or nothing; choose another name")
        if self.config.exists():
            _require_same(config, self.read_config(), str(self.path))
        elif self.path.exists() and any(path.name not in BEFORE_CONFIG for path in self.path.iterdir()):
            raise RunError(f"{self.path}: got a folder without config.yaml that is not empty; choose another name")

    def claim(self, config: Config, newest_step: int) -> None:
        """Write `config` there, where it says anything new, and delete leftovers; only for who holds the lock.

        newest_step: what `newest_step` returned before the state was read. Raises RunError where another job made the
        folder its own since, or saved there, and OSError where the folder cannot be written.
        """
        self.require_free_for(config)
        if self.newest_step() != newest_step:
            raise RunError(
                f"{self.checkpoints}: got step {self.newest_step()} as the newest, expected {newest_step}, as when it "
                "was read: another job trained there meanwhile; start this one again"
            )
        text = dump_config(config)
        # readers go by it: where the data lie now, not where they were
        if not self.config.exists() or self.config.read_text(encoding="utf-8") != text:
            with replacing(self.config) as partial:
                partial.write_text(text, encoding="utf-8")
        self.samples.mkdir(exist_ok=True)
        # a run that was killed in its last save has no other that would
        checkpoint.delete_leftovers(self.checkpoints)

    @contextmanager
    def locked(self, warn: Callable[[str], None]) -> Iterator[None]:
        """Make the folder and keep every other process from training there; a process that dies keeps nobody out.

        Raises RunError naming who trains there, and OSError where the folder cannot be written. Where the file system
        has no locks, this is said and nothing is kept.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        # unbuffered: what a full disk refuses would be tried again, and raise without a name, when the file is closed
        with self.lock.open("a+b", buffering=0) as file:
            try:
                # a lock of POSIX: of the process, not of the file that a child process would keep open
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno in (errno.EACCES, errno.EAGAIN):
                    file.seek(0)
                    holder = file.read().decode().strip() or "another process"
                    raise RunError(f"{self.path}: {holder} trains there, expected nobody") from error
                if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):
                    raise
                warn(f"{self.path}: no locks on this file system: nothing keeps a second job out of the folder")
            with naming(self.lock):
                file.truncate(0)
                file.write(f"process {os.getpid()} of {socket.gethostname()}\n".encode())
            yield

    def write_status(self, state: Literal["running", "complete", "stopped", "failed"], step: int, reason: str) -> None:
        """Say in status.json how the run stands: what a launcher goes by, since torchrun's exit code says less."""
        with replacing(self.status) as partial:
            partial.write_text(json.dumps({"state": state, "step": step, "reason": reason}) + "\n", encoding="utf-8")


def find_run(config: Config, resume: Path | None, warn: Callable[[str], None]) -> tuple[RunFolder, Path | None]:
    """Return the run folder of `config`, and the step folder to continue from, if any, verified; writes nothing.

    A folder is used again only by the configuration it was made with, apart from settings that do not change what is
    computed. resume None continues from the newest verified checkpoint; corrupt ones are passed over with a warning.
    Raises RunError for a folder of another configuration, or one that is no run folder.
    """
    folder = RunFolder(config.folder)
    folder.require_free_for(config)
    if resume is None:
        return folder, checkpoint.newest(folder.checkpoints, warn)
    checkpoint.verify(resume)
    return folder, resume


def checkpoint_meta(config: Config, fingerprint: str, interval: dict[str, object]) -> dict[str, object]:
    """Return what a checkpoint says of its run: configuration, data set, unfinished interval."""
    return {"config": dump_config(config), "data": fingerprint, "interval": interval}


def require_own_checkpoint(config: Config, fingerprint: str, state: Checkpoint, path: Path) -> None:
    """Raise RunError unless the checkpoint `state`, read from `path`, is of this configuration and data set.

    CheckpointError where it lacks an average of the configuration.
    """
    _require_same(config, _config_of(state.meta, path), str(path))
    for sigma_rel in config.ema.profiles:
        if sigma_rel not in state.profiles:
            raise CheckpointError(
                f"{path}: got no average of sigma_rel {sigma_rel}, expected it, as ema.profiles has it"
            )
    require_own_data(fingerprint, state.meta, path)


def require_own_data(fingerprint: str, meta: Mapping[str, Any], path: Path) -> None:
    """Raise RunError unless the checkpoint at `path`, which says `meta` of itself, is of the data set `fingerprint`."""
    if meta.get("data") != fingerprint:
        raise RunError(f"{path}: got a checkpoint of the data set {meta.get('data')}, expected {fingerprint}")


def require_weights(expected: Mapping[str, Tensor], weights: Mapping[str, Tensor], path: Path) -> None:
    """Raise CheckpointError unless `weights`, read from `path`, have the names and shapes that a network expects."""
    for name in {**expected, **weights}:
        want, got = (list(of[name].shape) if name in of else "nothing" for of in (expected, weights))
        if want != got:
            raise CheckpointError(f"{path}: {name}: got {got}, expected {want}, as the network has it")


def load_flow(
    path: Path,
    weights: Literal["ema", "model"] = "ema",
    device: torch.device | str = "cpu",
    sampler: Sampler | None = None,
    *,
    network: NetworkBuilder | None = None,
) -> tuple[SolutionFlow, int]:
    """Load a trained flow, in eval mode and without gradients, and the number of its training steps.

    path: as for `read_trained`, which says what is raised.  sampler: None is that of the configuration; ValueError for
    one that needs what the network was not trained for.  network: what built it, where network.name is own.
    """
    trained = read_trained(path, weights)
    return flow_of(trained, path, device, sampler, network=network), trained.step


def flow_of(
    trained: Trained,
    path: Path,
    device: torch.device | str = "cpu",
    sampler: Sampler | None = None,
    *,
    network: NetworkBuilder | None = None,
) -> SolutionFlow:
    """Return the flow of `trained`, which was read from `path`; the rest is as for `load_flow`."""
    if sampler is not None:
        require_sampler("sampler", sampler, trained.objective)
        trained = dataclasses.replace(trained, flow=dataclasses.replace(trained.flow, sampler=sampler))
    flow = build_flow(trained.network, trained.flow, choose_ops("auto", torch.device(device)), network)
    require_weights(flow.network.state_dict(), trained.weights, path)
    flow.network.load_state_dict(dict(trained.weights))
    return flow.to(device).requires_grad_(False).eval()


def read_trained(path: Path, weights: Literal["ema", "model"]) -> Trained:
    """Return trained weights and what they belong to; of an exported folder those that it holds.

    path: a run folder (its newest sound checkpoint), a step folder, a folder of `soflow export`, or an official `.pt`
    file, whose path and parameterization are taken as linear and euler, as the released models have them.
    Raises CheckpointError naming the path where there is none or it cannot be trusted.
    """
    if path.suffix == ".pt":
        official = checkpoint.load_official(path)
        state = official.ema if weights == "ema" else official.model
        network = _official_network(state, path)
        return Trained(
            network=network,
            flow=FlowConfig(),
            objective="soflow",
            vae=default_vae(network.in_channels),
            weights=state,
            kind=weights,
            step=official.step,
        )
    if is_export(path):
        trained = read_export(path)
        _require_network(trained.network, trained.flow, trained.weights, path)
        return trained
    step_folder = _sound_step(path)
    saved = checkpoint.read(step_folder)
    return _trained(
        _config_of(saved.meta, step_folder), saved.step, saved.ema if weights == "ema" else saved.model, weights
    )


def rebuild_average(path: Path, sigma_rel: float) -> tuple[Trained, float]:
    """Return the weights as a power-function profile of width `sigma_rel` averages them, whether it was kept or not.

    Mixed from the averages of `ema.profiles` in all checkpoints of the run up to that of `path`: a run folder (its
    newest sound one) or a step folder. And how far off the mixture's profile is, as `mix_profiles` says. ValueError for
    a width that no profile has; CheckpointError naming the path where there are no such averages or a checkpoint is
    damaged, RunError where one is another run's.
    """
    last = _sound_step(path)
    saved = checkpoint.read(last)
    config = _config_of(saved.meta, last)
    snapshots = []
    for step, folder in checkpoint.saved_steps(last.parent).items():
        if step < saved.step:
            meta, profiles = checkpoint.load_profiles(folder)
            _require_same(config, _config_of(meta, folder), str(folder))
            snapshots += [Snapshot(width, step, weights) for width, weights in profiles.items()]
    snapshots += [Snapshot(width, saved.step, weights) for width, weights in saved.profiles.items()]
    if not snapshots:
        raise CheckpointError(f"{path}: got a run whose ema.profiles is empty, expected at least one width there")
    weights, off = reconstruct(snapshots, sigma_rel, saved.step)
    return dataclasses.replace(_trained(config, saved.step, weights, "ema"), sigma_rel=sigma_rel), off


def _trained(config: Config, step: int, weights: Mapping[str, Tensor], kind: str) -> Trained:
    return Trained(
        network=config.network,
        flow=config.flow,
        objective=config.objective.name,
        vae=config.vae,
        weights=weights,
        kind=kind,
        step=step,
    )


def _sound_step(path: Path) -> Path:
    folder = RunFolder(path)
    if not folder.config.exists():
        checkpoint.verify(path)
        return path
    newest = checkpoint.newest(folder.checkpoints)
    if newest is None:
        raise CheckpointError(f"{path}: got a run folder without a sound checkpoint, expected at least one")
    return newest


def _official_network(weights: Mapping[str, Tensor], path: Path) -> NetworkConfig:
    try:
        if checkpoint.is_unet(weights):
            network = NetworkConfig(name="UNet", **checkpoint.infer_unet_shape(weights))
        else:
            network = NetworkConfig(name="DiT", **checkpoint.infer_dit_shape(weights))
            if network.num_classes == OFFICIAL_CLASSES - 1:
                raise ValueError(
                    f"y_embedder: got {OFFICIAL_CLASSES} rows, expected one more, of the null label (cfg_drop_rate 0?)"
                )
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from error
    _require_network(network, FlowConfig(), weights, path)
    return network


def _require_network(network: NetworkConfig, flow: FlowConfig, weights: Mapping[str, Tensor], path: Path) -> None:
    # what an export or an official file says of its network is only as good as its file
    try:
        with torch.device("meta"):
            expected = build_flow(network, flow, reference).network.state_dict()
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from error
    require_weights(expected, weights, path)


def _config_of(meta: Mapping[str, Any], path: Path) -> Config:
    text = meta.get("config")
    if not isinstance(text, str):
        raise CheckpointError(f"{path}/meta.json: config: got {text!r}, expected the configuration of a run")
    return parse_config(text, f"{path}/meta.json", NO_GRIDS)


def _require_same(config: Config, stored: Config, where: str) -> None:
    differences = [line for line in compare_configs(stored, config) if not _is_free(line.partition(":")[0])]
    if differences:
        raise RunError(
            f"{where} belongs to another configuration (there, here): {'; '.join(differences)}; choose another name"
        )


def _is_free(dotted: str) -> bool:
    section, _, field = dotted.rpartition(".")
    return field in FREE_FIELDS.get(section, ())
