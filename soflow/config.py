"""The configuration of a run: nested frozen dataclasses, one section per concern.

Every field carries its type, its help text and, unless every recipe must state it, its default. A value that no run
can use is refused here, in `__post_init__`, with field, value and what was expected; `soflow.config_file` reads the
YAML files and the overrides of the command line into these classes.
"""

import re
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

# the VAE of the paper's latents
OFFICIAL_VAE = "stabilityai/sd-vae-ft-mse"
# What is beyond fits neither the numbers of a tensor nor those of the clock.
MAX_INT = 2**63 - 1
MAX_FLOAT = 1e9
# the relative width of a power-function profile of exponent 0, a plain mean, and one of exponent 10^4, the last weights
MAX_SIGMA_REL = 12**-0.5
MIN_SIGMA_REL = 1e-4
WIDTHS = f"from {MIN_SIGMA_REL} to {MAX_SIGMA_REL:.4f}"
# averages that an update moves, but for the one of decay or sigma_rel
MAX_PROFILES = 7
# of a network: what is larger overflows the sizes of tensors, or never comes to an end
MAX_SIZE = 2**16
MAX_FACTOR = 2**10
MAX_THREADS = 2**12
# batches, or noises of an image, that are in memory at once
MAX_AT_ONCE = 2**10
Sampler = Literal["renoise", "chain", "euler", "heun"]
VELOCITY_SAMPLERS: tuple[Sampler, ...] = ("euler", "heun")
# what each objective trains a network for: renoise and chain take solutions between two times
SAMPLERS = {"soflow": get_args(Sampler), "meanflow": get_args(Sampler), "flow_matching": VELOCITY_SAMPLERS}
# what an objective makes no use of, and must therefore be left as it is
UNUSED = {
    "soflow": (),
    "meanflow": (
        "objective.lookahead",
        "times.velocity_mean",
        "times.velocity_std",
        "times.gap_method",
        "times.gap_init",
        "times.gap_end",
    ),
    "flow_matching": (
        "objective.lookahead",
        "times.t_mean",
        "times.t_std",
        "times.s_mean",
        "times.s_std",
        "times.gap_method",
        "times.gap_init",
        "times.gap_end",
    ),
}
# the sources of what a VAE has to decode
LATENT_SOURCES = ("latents", "hdf5")
# grey or colour
IMAGE_CHANNELS = (1, 3)


def default_vae(channels: int) -> str | None:
    """What decodes the latents of a network of so many channels, None for images: where its shape alone is known."""
    return None if channels in IMAGE_CHANNELS else OFFICIAL_VAE


def require(name: str, value: Any, valid: bool, expected: str) -> None:
    """Raise ValueError 'name: got value, expected ...' unless `valid`."""
    if not valid:
        raise ValueError(f"{name}: got {value!r}, expected {expected}")


def require_sampler(name: str, sampler: Sampler, objective: str) -> None:
    """Raise ValueError 'name: got sampler, expected ...' unless a network trained by `objective` can be sampled so."""
    able = SAMPLERS[objective]
    expected = f"{' or '.join(able)}, which is what the objective {objective} trains for"
    require(name, sampler, sampler in able, expected)


def require_calls(name: str, nfe: int, sampler: Sampler) -> None:
    """Raise ValueError 'name: got nfe, expected ...' unless `sampler` can draw in `nfe` network calls."""
    require(name, nfe, nfe >= 1, "at least 1")
    valid = sampler != "heun" or nfe % 2 == 0
    require(name, nfe, valid, "an even number, because the sampler heun makes two calls per step")


def is_width(sigma_rel: float) -> bool:
    """Return whether a power-function profile can have the relative width `sigma_rel`."""
    return MIN_SIGMA_REL <= sigma_rel <= MAX_SIGMA_REL


def require_bounded(name: str, value: Any) -> None:
    """Raise ValueError for a value of a field that is of no use in any: a huge number, NaN, text with a NUL."""
    for part in value if isinstance(value, tuple) else (value,):
        if isinstance(part, int):
            require(name, value, abs(part) <= MAX_INT, "an integer below 2**63")
        elif isinstance(part, float):
            require(name, value, abs(part) <= MAX_FLOAT, f"a finite number of at most {MAX_FLOAT:.0f}")
        elif isinstance(part, str):
            require(name, value, "\0" not in part, "text without the character NUL")


@dataclass(frozen=True, kw_only=True)
class NetworkConfig:
    """Which network, for which images. A preset (`DiT-B/4`, ...) fixes the shape; the name `DiT` needs it in full."""

    name: Annotated[
        str,
        "DiT-B/4, DiT-B/2, DiT-M/2, DiT-L/2, DiT-XL/2, DiT with the shape fields below, UNet (of CIFAR-10), "
        "or own: one handed to Trainer",
    ]
    input_size: Annotated[int, "height and width of the images or latents the network sees"]
    in_channels: Annotated[int, "channels of the images or latents"]
    num_classes: Annotated[int, "number of classes; the null label is this number; 0 for unconditional"]
    patch_size: Annotated[int | None, "side of a patch (name DiT only)"] = None
    hidden_size: Annotated[int | None, "width of the residual stream (name DiT only)"] = None
    depth: Annotated[int | None, "number of blocks (name DiT only)"] = None
    num_heads: Annotated[int | None, "number of attention heads (name DiT only)"] = None
    mlp_ratio: Annotated[float | None, "hidden width of the MLP over hidden_size (name DiT only; null 4)"] = None
    model_channels: Annotated[int | None, "width that channel_mult multiplies (name UNet only; null 128)"] = None
    channel_mult: Annotated[
        tuple[int, ...] | None, "width per resolution over model_channels (name UNet only; null [2, 2, 2])"
    ] = None
    num_blocks: Annotated[int | None, "blocks per resolution (name UNet only; null 4)"] = None
    attn_resolutions: Annotated[
        tuple[int, ...] | None, "resolutions with self-attention (name UNet only; null [16])"
    ] = None
    dropout: Annotated[float | None, "share of activations dropped in training (name UNet only; null 0.3)"] = None

    def __post_init__(self) -> None:
        for name in ("input_size", "in_channels"):
            require(f"network.{name}", getattr(self, name), getattr(self, name) >= 1, "an integer of at least 1")
        require("network.num_classes", self.num_classes, self.num_classes >= 0, "an integer of at least 0")
        if self.name == "own":
            for name in (shape_field.name for shape_field in fields(self) if shape_field.default is None):
                value = getattr(self, name)
                require(f"network.{name}", value, value is None, "nothing, because network.name is own")
        for name, value in vars(self).items():
            if isinstance(value, int):
                require(f"network.{name}", value, value <= MAX_SIZE, f"an integer of at most {MAX_SIZE}")
        if self.mlp_ratio is not None:
            valid = 0 < self.mlp_ratio <= MAX_FACTOR
            require("network.mlp_ratio", self.mlp_ratio, valid, f"above 0 and at most {MAX_FACTOR}")
        if self.channel_mult is not None:
            valid = max(self.channel_mult, default=1) <= MAX_FACTOR
            require("network.channel_mult", self.channel_mult, valid, f"factors of at most {MAX_FACTOR}")


@dataclass(frozen=True, kw_only=True)
class FlowConfig:
    """Path between data and noise, and how F becomes the solution f = a x + b F."""

    path: Annotated[Literal["linear", "trig"], "x_t = alpha_t x_0 + beta_t x_1"] = "linear"
    parameterization: Annotated[Literal["euler", "trig"], "a and b of f(x, t, s) = a(t, s) x + b(t, s) F(x, t, s)"] = (
        "euler"
    )
    sampler: Annotated[
        Sampler,
        "samples in several calls: from fresh noise each time, by solutions in a chain, or by steps of the velocity",
    ] = "renoise"


@dataclass(frozen=True, kw_only=True)
class ObjectiveConfig:
    """The losses, their weights, and the guidance inside training."""

    name: Annotated[
        Literal["soflow", "meanflow", "flow_matching"],
        "what the network learns: the solution function, or for comparison average velocities or the velocity",
    ] = "soflow"
    fm_ratio: Annotated[float, "share of a batch that trains the velocity (flow matching)"] = 0.75
    cfg_scale: Annotated[float, "guidance strength built into the velocity; 1 is none"] = 1.0
    cfg_decay_time: Annotated[float, "guidance fades out above this time; 1 is never"] = 1.0
    mix_ratio: Annotated[
        float, "m: weight of the guided velocity against the predicted one; 1 without guidance, which alone is mixed"
    ] = 1.0
    label_dropout: Annotated[float, "share of rows trained with the null label"] = 0.0
    loss_p: Annotated[float, "exponent p of the adaptive weight (mse + eps)^-p"] = 1.0
    loss_eps: Annotated[float, "eps of the adaptive weight"] = 0.01
    lookahead: Annotated[Literal["difference", "two_pass"], "slope by difference propagation or by two evaluations"] = (
        "difference"
    )

    def __post_init__(self) -> None:
        for name in ("fm_ratio", "mix_ratio", "label_dropout"):
            require(f"objective.{name}", getattr(self, name), 0 <= getattr(self, name) <= 1, "a number from 0 to 1")
        require("objective.cfg_scale", self.cfg_scale, self.cfg_scale >= 1, "a number of at least 1")
        require("objective.cfg_decay_time", self.cfg_decay_time, 0 < self.cfg_decay_time <= 1, "above 0 and at most 1")
        require("objective.loss_p", self.loss_p, self.loss_p >= 0, "a number of at least 0")
        require("objective.loss_eps", self.loss_eps, self.loss_eps > 0, "a number above 0")
        because = f"because objective.cfg_scale is {self.cfg_scale}"
        if self.cfg_scale > 1:
            valid = self.label_dropout > 0
            expected = f"above 0, {because} and guidance needs a trained null label"
            require("objective.label_dropout", self.label_dropout, valid, expected)
        else:
            expected = f"1, {because}: only a guided velocity is mixed"
            require("objective.mix_ratio", self.mix_ratio, self.mix_ratio == 1, expected)


@dataclass(frozen=True, kw_only=True)
class TimesConfig:
    """Logit-normal times, and the schedule of the gap ratio r that places the middle time l = t + (s - t) r."""

    velocity_mean: Annotated[float, "mean of logit(t) for velocity rows"] = -0.2
    velocity_std: Annotated[float, "standard deviation of logit(t) for velocity rows"] = 1.0
    t_mean: Annotated[float, "mean of logit(t) for consistency rows"] = 0.2
    t_std: Annotated[float, "standard deviation of logit(t) for consistency rows"] = 0.8
    s_mean: Annotated[float, "mean of logit(s) for consistency rows"] = -1.0
    s_std: Annotated[float, "standard deviation of logit(s) for consistency rows"] = 0.8
    gap_method: Annotated[
        Literal["const", "linear", "cosine", "exponential"], "how r goes from gap_init to gap_end; const: gap_end"
    ] = "exponential"
    gap_init: Annotated[float, "r at the first step"] = 0.1
    gap_end: Annotated[float, "r that train.total_steps steps lead to"] = 0.002

    def __post_init__(self) -> None:
        for name in ("velocity_std", "t_std", "s_std"):
            require(f"times.{name}", getattr(self, name), getattr(self, name) > 0, "a number above 0")
        for name in ("gap_init", "gap_end"):
            require(f"times.{name}", getattr(self, name), 0 < getattr(self, name) <= 1, "above 0 and at most 1")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where the training images come from."""

    source: Annotated[
        Literal["digits", "latents", "hdf5", "images", "cifar10", "own"],
        "digits: scikit-learn's handwritten digits; latents: encoded images; hdf5: the official file of latents; "
        "images: a folder of images per class; cifar10: the published archive; own: a Source handed to Trainer",
    ]
    root: Annotated[str | None, "folder or file of the data set (all but digits and own)"] = None
    image_size: Annotated[int | None, "side of the centre crop (images only)"] = None
    augment_p: Annotated[float, "probability of each change of EDM's augmentation (UNet only); 0 is none"] = 0.0
    feeder: Annotated[
        Literal["auto", "resident", "plain", "dali"],
        "resident: all data on the device; plain: a thread reads ahead; dali: and DALI copies ahead; "
        "auto: resident where the data set is in memory, else plain",
    ] = "auto"
    prefetch: Annotated[int, "batches read ahead (plain, dali)"] = 3

    def __post_init__(self) -> None:
        because = f"because data.source is {self.source}"
        if self.source in ("digits", "own"):
            require("data.root", self.root, self.root is None, f"nothing, {because}")
        else:
            require("data.root", self.root, self.root is not None, f"a folder or file, {because}")
        if self.source == "images":
            valid = self.image_size is not None and self.image_size >= 1
            require("data.image_size", self.image_size, valid, f"an integer of at least 1, {because}")
        else:
            require("data.image_size", self.image_size, self.image_size is None, f"nothing, {because}")
        require("data.augment_p", self.augment_p, 0 <= self.augment_p <= 1, "a number from 0 to 1")
        if self.source in LATENT_SOURCES:
            require("data.augment_p", self.augment_p, self.augment_p == 0, f"0, {because}: it changes images")
        valid = 1 <= self.prefetch <= MAX_AT_ONCE
        require("data.prefetch", self.prefetch, valid, f"an integer from 1 to {MAX_AT_ONCE}")


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """The optimizer: PyTorch's AdamW or RAdam, and its rate over the run."""

    name: Annotated[Literal["adamw", "radam"], "optimizer"] = "adamw"
    lr: Annotated[float, "learning rate"] = 1e-4
    warmup_steps: Annotated[int, "steps over which the rate rises linearly to lr"] = 0
    schedule: Annotated[
        Literal["constant", "cosine"], "the rate after that; cosine: falls to 0 at train.total_steps"
    ] = "constant"
    betas: Annotated[tuple[float, float], "decay of the first and second moment"] = (0.9, 0.99)
    eps: Annotated[float, "added to the root of the second moment"] = 1e-8
    weight_decay: Annotated[float, "weight decay, as torch.optim's optimizer of that name defines it"] = 0.0
    clip_norm: Annotated[float | None, "largest gradient norm; null does not clip"] = None
    nonfinite: Annotated[
        Literal["step", "skip", "stop"],
        "skip: a step whose gradient is not finite changes no weight, moment or average; stop: nor does the run go on; "
        "step: it changes them, and the run stops at the next line of the log or checkpoint",
    ] = "step"
    max_bad_steps: Annotated[int, "steps in a row whose gradient is not finite, after which the run stops"] = 10
    backend: Annotated[
        Literal["auto", "fused", "reference", "apex"],
        "fused: the CUDA extension; reference: PyTorch; apex: NVIDIA's FusedAdam; "
        "auto: fused on a GPU where it is built, else reference",
    ] = "auto"

    def __post_init__(self) -> None:
        require("optim.lr", self.lr, self.lr > 0, "a number above 0")
        require("optim.betas", self.betas, all(0 <= b < 1 for b in self.betas), "two numbers from 0 to below 1")
        require("optim.eps", self.eps, self.eps > 0, "a number above 0")
        require("optim.weight_decay", self.weight_decay, self.weight_decay >= 0, "a number of at least 0")
        require("optim.max_bad_steps", self.max_bad_steps, self.max_bad_steps >= 1, "an integer of at least 1")
        if self.clip_norm is not None:
            require("optim.clip_norm", self.clip_norm, self.clip_norm > 0, "a number above 0, or null")
        if self.backend == "apex":
            require("optim.name", self.name, self.name == "adamw", "adamw, which alone the backend apex has")


@dataclass(frozen=True, kw_only=True)
class EmaConfig:
    """The moving average of the weights, which sampling uses, and others, from which it is chosen after training."""

    decay: Annotated[float, "decay per training step"] = 0.9999
    every: Annotated[int, "update every so many steps, with decay ** every"] = 1
    dtype: Annotated[Literal["float32", "float64"], "precision of the update; the average is kept in float32"] = (
        "float32"
    )
    sigma_rel: Annotated[float | None, "width of a power-function profile, over the training time; replaces decay"] = (
        None
    )
    profiles: Annotated[
        tuple[float, ...],
        "widths sigma_rel of averages that every checkpoint holds besides; "
        "of them `soflow export --sigma-rel` makes that of any width between",
    ] = ()

    def __post_init__(self) -> None:
        require("ema.decay", self.decay, 0 <= self.decay < 1, "from 0 to below 1")
        require("ema.every", self.every, self.every >= 1, "an integer of at least 1")
        if self.sigma_rel is not None:
            require("ema.sigma_rel", self.sigma_rel, is_width(self.sigma_rel), f"{WIDTHS}, or null")
        distinct = len(set(self.profiles)) == len(self.profiles) <= MAX_PROFILES
        expected = f"at most {MAX_PROFILES} numbers {WIDTHS}, each once"
        require("ema.profiles", self.profiles, distinct and all(map(is_width, self.profiles)), expected)


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Length of the run and what it leaves behind on the way."""

    total_steps: Annotated[int, "optimizer steps; the schedules of gap and learning rate end there"]
    batch_size: Annotated[int, "global batch, over all processes"]
    accumulation: Annotated[int, "parts of a batch that go through the network one after the other, to save memory"] = 1
    log_every: Annotated[int, "steps per line of metrics.jsonl"] = 100
    sample_every: Annotated[int, "steps between sample grids; 0 draws none"] = 1000
    sample_nfe: Annotated[int, "network calls per image of the sample grids"] = 1
    sample_vae: Annotated[
        str | None,
        "VAE that turns latents into the images of the grids: folder of a diffusers AutoencoderKL, or its name on the "
        "hub",
    ] = None
    checkpoint_every: Annotated[int, "steps between checkpoints; the last step is always saved"] = 25000
    keep_last: Annotated[int, "checkpoints to keep; 0 keeps all"] = 0
    keep_every: Annotated[int, "checkpoints of steps that this divides are kept besides; 0: there are none"] = 0

    def __post_init__(self) -> None:
        for name in ("total_steps", "batch_size", "accumulation", "log_every", "sample_nfe", "checkpoint_every"):
            require(f"train.{name}", getattr(self, name), getattr(self, name) >= 1, "an integer of at least 1")
        calls_valid = self.sample_nfe <= MAX_AT_ONCE
        require("train.sample_nfe", self.sample_nfe, calls_valid, f"an integer of at most {MAX_AT_ONCE}")
        for name in ("sample_every", "keep_last", "keep_every"):
            require(f"train.{name}", getattr(self, name), getattr(self, name) >= 0, "an integer of at least 0")


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """Where and how precisely the run computes."""

    device: Annotated[Literal["auto", "cpu", "cuda"], "auto takes a GPU when there is one"] = "auto"
    precision: Annotated[
        Literal["fp32", "tf32", "bf16"],
        "products in float32; on a GPU in TF32; or of bfloat16 copies of the blocks' weights, which stay float32",
    ] = "fp32"
    ops: Annotated[
        Literal["auto", "fused", "reference"], "auto: fused kernels on a GPU, the reference on the CPU and for meanflow"
    ] = "auto"
    cuda_graph: Annotated[
        Literal["auto", "on", "off"],
        "the whole step as one launch, with the CUDA extension's optimizer; auto: on one GPU; on: with ddp as well",
    ] = "auto"
    compile: Annotated[bool, "torch.compile of the network: for what has no kernel of ours"] = False
    deterministic: Annotated[
        bool, "of PyTorch's own operators too: algorithms that give the same bits again; false: its fastest ones"
    ] = True
    recompute: Annotated[
        Literal["none", "norms", "blocks"],
        "what backward computes again instead of keeping it: norms, GELU and SiLU, or all of each block",
    ] = "none"
    threads: Annotated[int | None, "threads of the CPU; null leaves their number to PyTorch"] = None
    parallel: Annotated[
        Literal["ddp", "fsdp"], "of several processes, ddp: each has the whole model; fsdp: each has a part of it"
    ] = "ddp"
    timeout_s: Annotated[float, "seconds without a step after which a process gives up, and says who is to blame"] = 600
    grace_s: Annotated[float, "seconds after a signal to stop in which a process must have saved and left"] = 100

    def __post_init__(self) -> None:
        for name in ("timeout_s", "grace_s"):
            require(f"engine.{name}", getattr(self, name), getattr(self, name) > 0, "a number above 0")
        if self.threads is not None:
            valid = 1 <= self.threads <= MAX_THREADS
            require("engine.threads", self.threads, valid, f"an integer from 1 to {MAX_THREADS}, or null")


@dataclass(frozen=True, kw_only=True)
class Config:
    """One run: everything that decides what it computes, and where it writes."""

    name: Annotated[str, "name of the run, and of its folder below output_dir"]
    output_dir: Annotated[str, "folder of all runs"] = "runs"
    seed: Annotated[int, "seed of every random stream"] = 0
    network: NetworkConfig
    data: DataConfig
    train: TrainConfig
    flow: FlowConfig = field(default_factory=FlowConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    times: TimesConfig = field(default_factory=TimesConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    ema: EmaConfig = field(default_factory=EmaConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)

    def __post_init__(self) -> None:
        for section, part in vars(self).items():
            if is_dataclass(part):
                for name, value in vars(part).items():
                    require_bounded(f"{section}.{name}", value)
            else:
                require_bounded(section, part)
        name_valid = re.fullmatch(r"[A-Za-z0-9._-]+", self.name) is not None and self.name not in (".", "..")
        require("name", self.name, name_valid, "letters, digits, '.', '_' and '-' only")
        require("seed", self.seed, 0 <= self.seed < 2**63, "an integer from 0 to 2**63 - 1")
        if self.objective.cfg_scale > 1:
            num_classes = self.network.num_classes
            expected = "at least 1 class, because guidance compares a class with the null label"
            require("network.num_classes", num_classes, num_classes >= 1, expected)
        if self.data.augment_p > 0:
            expected = "UNet, because data.augment_p is above 0 and no other network takes augmentation labels"
            require("network.name", self.network.name, self.network.name == "UNet", expected)
        warmup, total = self.optim.warmup_steps, self.train.total_steps
        expected = f"from 0 to below train.total_steps, {total}"
        require("optim.warmup_steps", warmup, 0 <= warmup < total, expected)
        self._require_what_the_objective_takes()
        self._require_grids_that_can_be_drawn()

    def _require_grids_that_can_be_drawn(self) -> None:
        train, because = self.train, f"because data.source is {self.data.source}"
        vae = train.sample_vae
        if self.data.source in LATENT_SOURCES:
            expected = f"a VAE, {because}, or train.sample_every=0, which draws no grids"
            require("train.sample_vae", vae, vae is not None or train.sample_every == 0, expected)
        elif self.data.source != "own":
            require("train.sample_vae", vae, vae is None, f"nothing, {because}: its samples are images")
        if train.sample_every > 0:
            require_calls("train.sample_nfe", train.sample_nfe, self.flow.sampler)

    @property
    def folder(self) -> Path:
        """The run folder: output_dir/name."""
        return Path(self.output_dir) / self.name

    @property
    def vae(self) -> str | None:
        """What decodes the latents that the network draws: the VAE of the grids, or the official one; None: images."""
        if self.data.source == "own":
            return self.train.sample_vae or default_vae(self.network.in_channels)
        return self.train.sample_vae or (OFFICIAL_VAE if self.data.source in LATENT_SOURCES else None)

    def _require_what_the_objective_takes(self) -> None:
        name, flow = self.objective.name, self.flow
        because = f"because objective.name is {name}"
        for dotted in UNUSED[name]:
            section, _, unused = dotted.partition(".")
            part = getattr(self, section)
            default = type(part).__dataclass_fields__[unused].default
            got = getattr(part, unused)
            require(dotted, got, got == default, f"{default!r}, its default: without use, {because}")
        if name == "meanflow":
            euler = flow.parameterization == "euler"
            require("flow.parameterization", flow.parameterization, euler, f"euler, {because}: F is a mean velocity")
            ops, has_derivative = self.engine.ops, self.engine.ops != "fused"
            expected = f"auto or reference, {because}: fused kernels have no forward-mode derivative"
            require("engine.ops", ops, has_derivative, expected)
            dropout = self.network.dropout
            no_dropout = dropout == 0 or (dropout is None and self.network.name != "UNet")
            expected = f"0, {because}: its derivative would draw another mask; null is 0.3"
            require("network.dropout", dropout, no_dropout, expected)
        if name == "flow_matching":
            ratio = self.objective.fm_ratio
            require("objective.fm_ratio", ratio, ratio == 1, f"1, {because}: every row trains the velocity")
        require_sampler("flow.sampler", flow.sampler, name)
