"""What the configuration classes refuse by themselves."""

import dataclasses
import math
import typing
from dataclasses import replace

import pytest

from soflow.config import (
    LATENT_SOURCES,
    OFFICIAL_VAE,
    Config,
    DataConfig,
    EmaConfig,
    EngineConfig,
    FlowConfig,
    NetworkConfig,
    ObjectiveConfig,
    OptimConfig,
    TimesConfig,
    TrainConfig,
)

SECTIONS = (
    Config,
    DataConfig,
    EmaConfig,
    EngineConfig,
    FlowConfig,
    NetworkConfig,
    ObjectiveConfig,
    OptimConfig,
    TimesConfig,
    TrainConfig,
)

NETWORK = {"name": "DiT-B/4", "input_size": 32, "in_channels": 4, "num_classes": 1000}
TRAIN = {"total_steps": 10, "batch_size": 4}
NEEDED = {NetworkConfig: NETWORK, TrainConfig: TRAIN, DataConfig: {"source": "digits"}}


def config(**changes: object) -> Config:
    needed = {
        "name": "run",
        "network": NetworkConfig(**NETWORK),
        "data": DataConfig(source="digits"),
        "train": TrainConfig(**TRAIN),
    }
    return Config(**{**needed, **changes})


@pytest.mark.parametrize("section", SECTIONS)
def test_every_field_has_a_help_text(section):
    hints = typing.get_type_hints(section, include_extras=True)
    for field in dataclasses.fields(section):
        if not dataclasses.is_dataclass(hints[field.name]):
            text = typing.get_args(hints[field.name])[1]
            assert isinstance(text, str), field.name
            assert len(text) > 3, field.name


@pytest.mark.parametrize("section", SECTIONS)
def test_sections_are_frozen(section):
    built = config() if section is Config else section(**NEEDED.get(section, {}))
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(built, dataclasses.fields(section)[0].name, "other")


@pytest.mark.parametrize(
    ("section", "field", "value"),
    [
        (NetworkConfig, "network.input_size", 0),
        (NetworkConfig, "network.in_channels", 0),
        (NetworkConfig, "network.num_classes", -1),
        (NetworkConfig, "network.hidden_size", 2**16 + 4),
        (NetworkConfig, "network.mlp_ratio", 1e30),
        (NetworkConfig, "network.mlp_ratio", 0.0),
        (NetworkConfig, "network.channel_mult", (1, 2**10 + 1)),
        (ObjectiveConfig, "objective.fm_ratio", 1.01),
        (ObjectiveConfig, "objective.mix_ratio", -0.01),
        (ObjectiveConfig, "objective.label_dropout", math.nan),
        (ObjectiveConfig, "objective.cfg_scale", 0.5),
        (ObjectiveConfig, "objective.cfg_decay_time", 0.0),
        (ObjectiveConfig, "objective.cfg_decay_time", 1.5),
        (ObjectiveConfig, "objective.loss_p", -1.0),
        (ObjectiveConfig, "objective.loss_eps", 0.0),
        (TimesConfig, "times.t_std", 0.0),
        (TimesConfig, "times.s_std", math.nan),
        (TimesConfig, "times.gap_init", 0.0),
        (TimesConfig, "times.gap_end", 1.1),
        (OptimConfig, "optim.lr", 0.0),
        (OptimConfig, "optim.betas", (0.9, 1.0)),
        (OptimConfig, "optim.eps", -1e-8),
        (OptimConfig, "optim.weight_decay", math.nan),
        (OptimConfig, "optim.clip_norm", 0.0),
        (EmaConfig, "ema.decay", 1.0),
        (EmaConfig, "ema.every", 0),
        (EmaConfig, "ema.sigma_rel", 1e-200),
        (EmaConfig, "ema.profiles", (0.1, 0.3)),
        (EmaConfig, "ema.profiles", (0.1, 0.05, 0.1)),
        (EmaConfig, "ema.profiles", tuple(0.01 * i for i in range(1, 9))),
        (EngineConfig, "engine.threads", 0),
        (EngineConfig, "engine.threads", 2**12 + 1),
        (TrainConfig, "train.total_steps", 0),
        (TrainConfig, "train.batch_size", 0),
        (TrainConfig, "train.log_every", 0),
        (TrainConfig, "train.sample_every", -1),
        (TrainConfig, "train.sample_nfe", 0),
        (TrainConfig, "train.sample_nfe", 2**10 + 1),
        (TrainConfig, "train.checkpoint_every", 0),
        (TrainConfig, "train.keep_last", -1),
    ],
)
def test_values_no_run_can_use_are_refused(section, field, value):
    with pytest.raises(ValueError, match="expected") as caught:
        section(**{**NEEDED.get(section, {}), field.partition(".")[2]: value})
    assert str(caught.value).startswith(f"{field}: got {value!r}, expected ")


@pytest.mark.parametrize(
    ("section", "values"),
    [
        (ObjectiveConfig, {"fm_ratio": 0.0}),
        (ObjectiveConfig, {"fm_ratio": 1.0}),
        (ObjectiveConfig, {"cfg_decay_time": 1.0, "loss_p": 0.0}),
        (ObjectiveConfig, {"cfg_scale": 3.0, "label_dropout": 0.1}),
        (TimesConfig, {"gap_init": 1.0, "gap_end": 1.0}),
        (OptimConfig, {"betas": (0.0, 0.0), "clip_norm": 1.0}),
        (EmaConfig, {"decay": 0.0}),
        (EmaConfig, {"sigma_rel": 1e-4}),
        (EmaConfig, {"profiles": tuple(0.01 * i for i in range(1, 8))}),
        (NetworkConfig, {**NETWORK, "hidden_size": 2**16, "mlp_ratio": 2.0**10, "channel_mult": ()}),
        (TrainConfig, {**TRAIN, "sample_every": 0, "keep_last": 0}),
        (NetworkConfig, {**NETWORK, "num_classes": 0}),
        (DataConfig, {"source": "latents", "root": "somewhere"}),
    ],
)
def test_values_at_the_edge_are_accepted(section, values):
    built = section(**values)
    for name, value in values.items():
        assert getattr(built, name) == value


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "a b", "a\n", "\u00e9", "a\\b"])
def test_run_names_stay_inside_their_folder(name):
    with pytest.raises(ValueError, match="^name: got .*expected letters"):
        config(name=name)


@pytest.mark.parametrize("name", ["a", "run-1.2_b", "...", "2026"])
def test_run_names_accepted(name):
    assert config(name=name).name == name


@pytest.mark.parametrize("seed", [-1, 2**63])
def test_seeds_fit_into_64_bits(seed):
    with pytest.raises(ValueError, match=f"^seed: got {seed}, expected"):
        config(seed=seed)


def test_guidance_needs_a_null_label():
    with pytest.raises(ValueError, match=r"^objective.label_dropout: got 0.0, expected above 0.*cfg_scale is 2.0"):
        ObjectiveConfig(cfg_scale=2.0)
    with pytest.raises(ValueError, match=r"^network.num_classes: got 0, expected at least 1 class"):
        config(
            network=NetworkConfig(**{**NETWORK, "num_classes": 0}),
            objective=ObjectiveConfig(cfg_scale=2.0, label_dropout=0.1),
        )


def test_nothing_is_mixed_without_guidance():
    expected = r"expected 1, because objective.cfg_scale is 1.0: only a guided velocity is mixed$"
    with pytest.raises(ValueError, match=rf"^objective.mix_ratio: got 0.25, {expected}"):
        ObjectiveConfig(mix_ratio=0.25)


def test_root_belongs_to_latents_only():
    with pytest.raises(ValueError, match=r"^data.root: got None, expected a folder"):
        DataConfig(source="latents")
    for source in ("digits", "own"):
        with pytest.raises(
            ValueError, match=rf"^data.root: got 'x', expected nothing, because data.source is {source}"
        ):
            DataConfig(source=source, root="x")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"source": "images", "root": "x"}, r"^data.image_size: got None, expected an integer of at least 1, because"),
        ({"source": "images", "root": "x", "image_size": 0}, r"^data.image_size: got 0"),
        ({"source": "cifar10", "root": "x", "image_size": 32}, r"^data.image_size: got 32, expected nothing"),
        ({"source": "own", "image_size": 32}, r"^data.image_size: got 32, expected nothing"),
        ({"source": "latents", "root": "x", "augment_p": 0.1}, r"^data.augment_p: got 0.1, expected 0, because"),
        ({"source": "digits", "augment_p": 1.1}, r"^data.augment_p: got 1.1, expected a number from 0 to 1"),
        ({"source": "digits", "prefetch": 0}, r"^data.prefetch: got 0"),
        ({"source": "digits", "prefetch": 1025}, r"^data.prefetch: got 1025, expected an integer from 1 to 1024"),
    ],
)
def test_data_fields_that_do_not_fit_their_source_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        DataConfig(**fields)


def test_augmentation_needs_the_network_that_is_told():
    with pytest.raises(
        ValueError, match=r"^network.name: got 'DiT.*', expected UNet, because data.augment_p is above 0"
    ):
        config(data=DataConfig(source="digits", augment_p=0.1))


UNET = NetworkConfig(name="UNet", input_size=32, in_channels=3, num_classes=0)
MEANFLOW, FLOW_MATCHING = ObjectiveConfig(name="meanflow"), ObjectiveConfig(name="flow_matching", fm_ratio=1.0)
EULER_STEPS = FlowConfig(sampler="euler")


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        (
            {"objective": ObjectiveConfig(name="meanflow", lookahead="two_pass")},
            r"objective\.lookahead: got 'two_pass', expected 'difference', its default: without use, because objective",
        ),
        ({"objective": MEANFLOW, "times": TimesConfig(gap_end=0.1)}, r"times\.gap_end: got 0\.1, expected 0\.002"),
        ({"objective": MEANFLOW, "times": TimesConfig(velocity_mean=0.0)}, r"times\.velocity_mean: got 0\.0"),
        (
            {"objective": MEANFLOW, "flow": FlowConfig(parameterization="trig")},
            r"flow\.parameterization: got 'trig', expected euler, because objective\.name is meanflow",
        ),
        (
            {"objective": MEANFLOW, "engine": EngineConfig(ops="fused")},
            r"engine\.ops: got 'fused', expected auto or reference, because objective\.name is meanflow",
        ),
        ({"objective": MEANFLOW, "network": UNET}, r"network\.dropout: got None, expected 0, because .*; null is 0\.3"),
        ({"objective": MEANFLOW, "network": replace(UNET, dropout=0.1)}, r"network\.dropout: got 0\.1, expected 0"),
        ({"objective": ObjectiveConfig(name="flow_matching"), "flow": EULER_STEPS}, r"objective\.fm_ratio: got 0\.75"),
        ({"objective": FLOW_MATCHING}, r"flow\.sampler: got 'renoise', expected euler or heun"),
        ({"objective": FLOW_MATCHING, "flow": EULER_STEPS, "times": TimesConfig(t_mean=0.0)}, r"times\.t_mean: got 0"),
    ],
)
def test_what_an_objective_does_not_take_is_refused(sections, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        config(**sections)


@pytest.mark.parametrize("source", ["latents", "hdf5"])
def test_grids_of_latents_need_a_vae(source):
    data = DataConfig(source=source, root="x")
    both_ways = rf"got None, expected a VAE, because data.source is {source}, or train.sample_every=0"
    with pytest.raises(ValueError, match=f"^train.sample_vae: {both_ways}"):
        config(data=data)
    config(data=data, train=TrainConfig(**TRAIN, sample_every=0))
    config(data=data, train=TrainConfig(**TRAIN, sample_vae="vae"))
    config(data=data, train=TrainConfig(**TRAIN, sample_vae="vae", sample_every=0))


def test_images_need_no_vae():
    with pytest.raises(ValueError, match=r"^train.sample_vae: got 'vae', expected nothing, because data.source is dig"):
        config(train=TrainConfig(**TRAIN, sample_vae="vae"))


def test_every_objective_is_accepted_with_what_it_takes():
    config(objective=MEANFLOW, times=TimesConfig(t_mean=-0.4), flow=FlowConfig(sampler="chain"))
    config(objective=MEANFLOW, network=replace(UNET, dropout=0.0))
    train = TrainConfig(**TRAIN, sample_nfe=2)
    config(objective=FLOW_MATCHING, times=TimesConfig(velocity_mean=0.0), flow=FlowConfig(sampler="heun"), train=train)


@pytest.mark.parametrize("objective", [ObjectiveConfig(), MEANFLOW, FLOW_MATCHING])
def test_grids_need_as_many_calls_as_their_sampler_makes(objective):
    heun = {"objective": objective, "flow": FlowConfig(sampler="heun")}
    for nfe in (1, 3):
        with pytest.raises(ValueError, match=rf"^train.sample_nfe: got {nfe}, expected an even number, because the"):
            config(**heun, train=TrainConfig(**TRAIN, sample_nfe=nfe))
        config(**heun, train=TrainConfig(**TRAIN, sample_nfe=nfe, sample_every=0))
        config(objective=objective, flow=EULER_STEPS, train=TrainConfig(**TRAIN, sample_nfe=nfe))


@pytest.mark.parametrize(
    ("source", "channels", "vae", "expected"),
    [
        ("hdf5", 4, None, OFFICIAL_VAE),
        ("latents", 3, None, OFFICIAL_VAE),
        ("latents", 4, "vae", "vae"),
        ("digits", 1, None, None),
        ("own", 3, None, None),
        ("own", 3, "vae", "vae"),
        ("own", 4, None, OFFICIAL_VAE),
    ],
)
def test_what_a_network_draws_is_what_it_was_trained_with(source, channels, vae, expected):
    made = config(
        network=NetworkConfig(**{**NETWORK, "in_channels": channels}),
        data=DataConfig(source=source, root="folder" if source in LATENT_SOURCES else None),
        train=TrainConfig(**TRAIN, sample_every=0, sample_vae=vae),
    )
    assert made.vae == expected
