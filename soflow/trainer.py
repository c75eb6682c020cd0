"""The life of a run: what it is built of, its loop over steps, logs, samples, checkpoints, and stopping early."""

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing, suppress
from pathlib import Path
from typing import Any, Literal, NoReturn, TypeVar

import torch
from torch import Tensor

from soflow import checkpoint
from soflow.assembly import assemble, training_ops
from soflow.config import Config, EngineConfig, default_vae
from soflow.data import BatchOrder, Source, open_feeder, open_source
from soflow.determinism import choose_algorithms
from soflow.distributed import Ballot, Processes
from soflow.flow import SolutionFlow
from soflow.images import grid, save_png, to_uint8
from soflow.log import NullLog, RunLog
from soflow.memory import require_memory
from soflow.meters import Meter, peak_flops
from soflow.models import NetworkBuilder
from soflow.monitor import Monitor
from soflow.optim import build_optimizer
from soflow.run_folder import (
    RunError,
    RunFolder,
    checkpoint_meta,
    find_run,
    require_own_checkpoint,
    require_weights,
)
from soflow.sampling import sample, sample_noise
from soflow.sharding import is_sharded, like, whole
from soflow.step import SUMMED, choose_capture, gap_ratio_at, learning_rate_at
from soflow.vae import Vae, load_vae
from soflow.watchdog import Watchdog

GRID_COLUMNS = 10
ADVICE = "lower optim.lr or set optim.clip_norm, in a run of another name"

T = TypeVar("T")


class DivergedError(RuntimeError):
    """The loss or the gradient is no longer finite; the last checkpoint was written before that."""


class Trainer:
    """Trains one run from its configuration to its last step, and continues it from its last checkpoint.

    resume: a step folder to continue from; None takes the newest sound one of the run, if there is any. Later ones are
    dropped when the training goes on.
    source: the data set, where data.source is own; the same in every process.
    network: what builds the network, where network.name is own: called with input_size, in_channels, num_classes, ops.
    Raises ValueError (RunError, CheckpointError, DataError, VaeError) or OSError before anything is overwritten.
    """

    def __init__(
        self,
        config: Config,
        processes: Processes,
        resume: Path | None = None,
        *,
        source: Source | None = None,
        network: NetworkBuilder | None = None,
    ) -> None:
        self.config = config
        self.processes = processes
        self.source = open_source(config.data, source)
        require_matching_data(config, self.source, processes.world_size)
        configure_torch(config.engine)
        self.vae: Vae | None = None
        self._on_first(self._load_vae)

        self.ops = training_ops(config, processes.device)
        # the prediction is that of whole weights
        if processes.device.type == "cuda" and config.engine.parallel == "ddp":
            total = torch.cuda.get_device_properties(processes.device).total_memory
            require_memory(config, self.source.image_shape, processes.device, processes.world_size, total, network)
        self.flow, self.averages, self.optimizer, self.step = assemble(config, processes, self.ops, network)
        self.ema = self.averages[0]
        order = BatchOrder(len(self.source), config.train.batch_size, config.seed, self.step.positions)
        self.feeder = open_feeder(config.data, self.source, order, processes.device)
        name = torch.cuda.get_device_name(processes.device) if processes.device.type == "cuda" else ""
        peak = peak_flops(name, config.engine.precision)
        self.meter = Meter(processes.device, config.train.batch_size, self.step.flops(), peak)

        self.monitor = Monitor()
        self.finished = 0
        # noted before the state is read: `fit` finds out under the lock whether it is still that of the folder
        self._newest, (self.folder, start) = self._on_first(
            lambda: (RunFolder(config.folder).newest_step(), find_run(config, resume, print))
        )
        if start is not None:
            self._restore(start)
        self._snapshots = checkpoint.Snapshots()

    def fit(self, until: int | None = None) -> bool:
        """Train to the last step, or to step `until`; return whether the run is complete.

        SIGINT, SIGTERM and SIGUSR1, to any of the processes, stop all of them after one and the same step, at most one
        later; that is saved, and False returned. Raises RunError where another job has the folder or has saved there;
        then DivergedError, DataError, PeerError, and CheckpointError or OSError where the disk refuses, with which
        `status.json` agrees.
        """
        config = self.config
        last = config.train.total_steps if until is None else min(until, config.train.total_steps)
        with ExitStack() as stack:
            stack.callback(self.step.release)
            self._on_first(lambda: stack.enter_context(self.folder.locked(print)))
            self._on_first(lambda: self.folder.claim(config, self._newest))
            try:
                self._on_first(lambda: self.folder.write_status("running", self.finished, ""))
                with Watchdog(self.processes, config.engine.timeout_s, config.engine.grace_s) as watchdog:
                    if self.finished < last:
                        self._on_first(self._forget_later)
                        self._run(last, watchdog)
            except BaseException as error:
                # a disk that refused a checkpoint may refuse this too
                with suppress(OSError):
                    if self.processes.is_first:
                        self.folder.write_status("failed", self.finished, str(error) or type(error).__name__)
                raise
            complete = self.finished == config.train.total_steps
            end: Literal["complete", "stopped"] = "complete" if complete else "stopped"
            self._on_first(lambda: self.folder.write_status(end, self.finished, watchdog.stop_signal or ""))
            if self.processes.is_first:
                self._newest = self.folder.newest_step()
        return complete

    def _run(self, last: int, watchdog: Watchdog) -> None:
        train = self.config.train
        first = self.processes.is_first
        ballot = Ballot(self.processes, 3)
        self.meter.restart()
        stopping = False
        with (
            closing(self.feeder),
            closing(RunLog(self.folder.path, train.total_steps, self.finished) if first else NullLog()) as log,
            checkpoint.Writer(
                self.folder.checkpoints, train.keep_last, train.keep_every, lambda path: log.info(f"saved {path}")
            ) as writer,
            watchdog.explaining_peers(),
        ):
            while self.finished < last and not stopping:
                self._train_step()
                watchdog.beat(self.finished)
                self.meter.count()
                log.advance(self.finished)
                votes = ballot.cast(watchdog.stop_signal is not None, writer.failed, self._is_diverging())
                stopping = self._heed(votes, writer)
                done = self.finished == train.total_steps
                if self.finished % train.log_every == 0 or done:
                    observed = self.monitor.observe(self._interval_means())
                    log.interval(self.finished, observed.metrics | self.meter.read())
                    if observed.warning is not None:
                        log.info(observed.warning)
                    self.meter.restart()
                if train.sample_every and (self.finished % train.sample_every == 0 or done):
                    with self.meter.paused():
                        self._draw_samples(log)
                if self.finished % train.checkpoint_every == 0 or done:
                    with self.meter.paused():
                        self._save(writer)
                watchdog.beat(self.finished)
            self._heed(ballot.result(), writer)
            if self.finished < train.total_steps and self.finished % train.checkpoint_every:
                self._save(writer)
            # a torchrun that ends is a reason for Slurm to end the others: none does while the first process writes
            self._on_first(writer.wait)

    def _heed(self, votes: Sequence[bool], writer: checkpoint.Writer) -> bool:
        """Do what some process wants, on all of them; return whether it is to stop."""
        stop, unsaved, diverging = votes
        if unsaved:
            self._on_first(writer.wait)
        if diverging:
            self._give_up()
        return stop

    def _is_diverging(self, *, wait: bool = False) -> bool:
        return self.step.most_bad_in_row(wait=wait) >= self._bad_steps_allowed

    def _give_up(self) -> NoReturn:
        self.feeder.require_finite(self.processes)
        raise DivergedError(
            f"step {self.finished}: {self._bad_steps_allowed} step(s) in a row had no finite gradient; {ADVICE}"
        )

    @property
    def _bad_steps_allowed(self) -> int:
        optim = self.config.optim
        return 1 if optim.nonfinite == "stop" else optim.max_bad_steps

    def _train_step(self) -> None:
        self.feeder.seek(self.finished)
        with self.meter.waiting():
            rows = next(self.feeder)
        self.step(rows.mean, rows.std, rows.labels, rows.step, rows.augment_labels)
        self.finished += 1

    # --------------------------------------------------------------------------------------------
    # What happens between steps.

    def _interval_means(self) -> dict[str, float]:
        self.feeder.require_finite(self.processes)
        *totals, skipped = self.processes.sum(self.step.sums).tolist()
        # a sum of thirds
        skipped = float(round(skipped))
        done = self.step.num_summed - skipped
        means = {name: total / done if done else math.nan for name, total in zip(SUMMED[:-1], totals, strict=True)}
        bad = [name for name, mean in means.items() if not math.isfinite(mean)]
        if bad and done:
            raise DivergedError(
                f"step {self.finished}: {', '.join(bad)} not finite within the last {self.step.num_summed} steps; "
                f"{ADVICE}"
            )
        self.step.sums.zero_()
        self.step.num_summed = 0
        if self.config.optim.nonfinite != "step":
            means["skipped_steps"] = skipped
        last = self.finished - 1
        means["learning_rate"] = learning_rate_at(self.config, last)
        return means | {"gap_ratio": gap_ratio_at(self.config, last)}

    def _draw_samples(self, log: NullLog) -> None:
        (channels, height, width), num_classes = self.source.image_shape, self.source.num_classes
        first, sharded = self.processes.is_first, is_sharded(self.ema.network)
        if not (first or sharded):
            return
        num = GRID_COLUMNS * (min(num_classes, GRID_COLUMNS) or GRID_COLUMNS)
        seeds = torch.arange(num, device=self.processes.device)
        labels = None
        if self.config.network.num_classes:
            labels = seeds // GRID_COLUMNS * max(num_classes // GRID_COLUMNS, 1)
        nfe = self.config.train.sample_nfe
        noise, renoise = sample_noise(seeds, (channels, height, width), nfe)
        flow = SolutionFlow(self.ema.network, self.flow.path, self.flow.parameterization, self.flow.sampler)
        images = sample(flow, labels, (num, channels, height, width), nfe, noise, renoise)
        if not first:
            return  # it only lent its part of the weights
        image = grid(to_uint8(images if self.vae is None else self.vae.decode(images)), GRID_COLUMNS)
        save_png(self.folder.samples / f"step-{self.finished:08d}.png", image)
        log.image(self.finished, "samples", image)

    # --------------------------------------------------------------------------------------------
    # Files.

    def _load_vae(self) -> None:
        train = self.config.train
        if train.sample_every and train.sample_vae is not None:
            self.vae = load_vae(train.sample_vae, self.processes.device)
            self.vae.require_channels("train.sample_vae", self.config.network.in_channels)

    def _on_first(self, action: Callable[[], T]) -> T:
        """What `action` returns on the first process; an error of its is everybody's."""
        outcome: tuple[T | None, Exception | None] = (None, None)
        if self.processes.is_first:
            try:
                outcome = action(), None
            except (ValueError, OSError) as error:
                outcome = None, error
        result, failure = self.processes.agree(outcome)
        if failure is not None:
            raise failure
        return result  # type: ignore[return-value]

    def _forget_later(self) -> None:
        # before the log is cut back: whatever is left of them must not be continued by lines that are gone
        for path in checkpoint.drop_later(self.folder.checkpoints, self.finished):
            print(f"dropped {path}: later than step {self.finished}, where the training goes on")

    def _restore(self, path: Path) -> None:
        state = checkpoint.read(path)
        require_own_checkpoint(self.config, self.source.fingerprint, state, path)
        profiles = (state.profiles[sigma_rel] for sigma_rel in self.config.ema.profiles)
        networks = (self.flow.network, *(average.network for average in self.averages))
        for network, weights in zip(networks, (state.model, state.ema, *profiles), strict=True):
            own = network.state_dict()
            require_weights(own, weights, path)
            network.load_state_dict({name: like(own[name], value) for name, value in weights.items()})
        moments = {}
        for index, param in enumerate(self.optimizer.parameters()):
            if index in state.optimizer["state"]:
                entry = state.optimizer["state"][index]
                moments[index] = {key: value if key == "step" else like(param, value) for key, value in entry.items()}
        self.optimizer.load_state_dict({**state.optimizer, "state": moments})
        self.optimizer.refresh_shadows()
        self.finished = self.optimizer.finished = state.step
        interval = state.meta["interval"]
        self.step.num_summed = interval["steps"]
        self.monitor.load_state_dict(interval["monitor"])
        # The sums are those of all processes: the first one carries them on.
        if self.processes.is_first:
            self.step.sums.copy_(torch.tensor(interval["sums"], dtype=torch.float64))

    def _save(self, writer: checkpoint.Writer) -> None:
        """Copy the state to host memory of the first process, whose thread writes it while the training goes on."""
        self._on_first(writer.wait)
        self.feeder.require_finite(self.processes)
        sums = self.processes.sum(self.step.sums)
        if not torch.isfinite(sums).all():
            raise DivergedError(
                f"step {self.finished}: the loss or its gradient is not finite; no checkpoint was written"
            )
        # the votes of a GPU, and of several processes, know of the steps before; the same in every process
        if self._is_diverging(wait=True):
            self._give_up()
        first = self.processes.is_first
        if not (first or is_sharded(self.flow.network)):
            return

        def copied(kind: str, tensors: Mapping[Any, Tensor]) -> dict[Any, Tensor]:
            # one at a time: the whole of a sharded tensor is there only until it is copied
            gathered = ((key, whole(tensor)) for key, tensor in tensors.items())
            return {key: self._snapshots.take(f"{kind} {key}", tensor) for key, tensor in gathered if first}

        optimizer = self.optimizer.state_dict()
        moments = {index: copied(f"moments {index}", entry) for index, entry in optimizer["state"].items()}
        model = copied("model", self.flow.network.state_dict())
        ema, *profiles = (copied(f"ema {i}", a.network.state_dict()) for i, a in enumerate(self.averages))
        self._snapshots.mark()
        if first:
            interval = {"steps": self.step.num_summed, "sums": sums.tolist(), "monitor": self.monitor.state_dict()}
            writer.start(
                self.finished,
                ready=self._snapshots.ready,
                model=model,
                ema=ema,
                profiles=dict(zip(self.config.ema.profiles, profiles, strict=True)),
                optimizer={**optimizer, "state": moments},
                meta=checkpoint_meta(self.config, self.source.fingerprint, interval),
            )


def configure_torch(engine: EngineConfig) -> None:
    """Set the threads of the CPU, whether float32 products on a GPU use TF32, and sums their order: process-wide.

    What the precision bf16 leaves in float32 is few and small: it stays exact.
    """
    torch.backends.cuda.matmul.allow_tf32 = engine.precision == "tf32"
    torch.backends.cudnn.allow_tf32 = engine.precision == "tf32"
    choose_algorithms(same_bits=engine.deterministic)
    if engine.threads is not None:
        torch.set_num_threads(engine.threads)


def require_matching_data(config: Config, source: Source, world_size: int) -> None:
    """Raise RunError unless the network fits the images and labels of the data set, and the batch size all there is.

    The batch is of no more rows than the data set has, and of one at least for each part of each process.
    """
    network, train = config.network, config.train
    channels, height, width = source.image_shape
    for field, got, expected in (
        ("network.in_channels", network.in_channels, channels),
        ("network.input_size", network.input_size, height),
        ("network.input_size", network.input_size, width),
    ):
        if got != expected:
            raise RunError(f"{field}: got {got}, expected {expected}, which the data set {config.data.source} has")
    if network.num_classes not in (0, source.num_classes):
        raise RunError(
            f"network.num_classes: got {network.num_classes}, expected {source.num_classes}, which the data set "
            f"{config.data.source} has, or 0 for unconditional"
        )
    if default_vae(channels) is not None and train.sample_every and train.sample_vae is None:
        raise RunError(
            f"train.sample_every: got {train.sample_every}, expected 0, or a VAE in train.sample_vae, "
            f"because the data set {config.data.source} has {channels} channels, which are no image"
        )
    if train.batch_size > len(source):
        raise RunError(
            f"train.batch_size: got {train.batch_size}, expected at most {len(source)}, the size of the data set"
        )
    least = world_size * train.accumulation
    if train.batch_size < least:
        parts = "the number of processes" if train.accumulation == 1 else "processes times train.accumulation"
        raise RunError(f"train.batch_size: got {train.batch_size}, expected at least {least}, {parts}")


def require_update(config: Config, device: torch.device) -> None:
    """Raise ValueError unless one process can update weights on `device`, and capture its steps, as it is asked to."""
    # one weight that stands for all: what decides is where they lie, and whether they have shadows
    weight = torch.nn.Parameter(torch.zeros(1, device=device))
    shadows: dict[Tensor, Tensor] = {}
    if config.engine.precision == "bf16":
        shadows[weight] = weight.detach().bfloat16()
    optimizer = build_optimizer(config.optim, [weight], shadows=shadows)
    choose_capture(config.engine.cuda_graph, device, 1, optimizer)
