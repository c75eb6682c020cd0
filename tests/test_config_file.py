"""YAML and overrides into configurations, and back; the official keys."""

import dataclasses
import random
import typing
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from soflow.config import Config, NetworkConfig, TimesConfig
from soflow.config_file import (
    ConfigError,
    compare_configs,
    describe_fields,
    dump_config,
    load_config,
    parse_config,
)

CONFIGS = sorted((Path(__file__).parents[1] / "configs").glob("*.yaml"))

TEXT = """
name: run
network: {name: DiT-B/4, input_size: 32, in_channels: 4, num_classes: 1000}
data: {source: digits}
train: {total_steps: 10, batch_size: 4}
"""

OFFICIAL = """
working_dir: ./experiments/first
noising_type: Linear
coefficient_type: Euler
model_type: DiT-XL-2
dataset_type: Imagenet
data_size: 32
dataset_path: ./imagenet_latent
velocity_loss_ratio: 0.75
p: 1.0
eps: 0.01
time_mean: [-0.2, -1.0, 0.2]
time_std: [1.0, 0.8, 0.9]
cfg_scale: 3.0
mix_ratio: 0.25
cfg_drop_rate: 0.1
cfg_decay_time: 0.8
l_schedule: Exponent
l_init_ratio: 0.1
l_end_ratio: 0.002
total_steps: 400000
ema_decay_rate: 0.9999
learning_rate: 1e-4
betas: [0.9, 0.99]
weight_decay: 0.0
batch_size: 256
num_workers: 8
prefetch_factor: 4
eval_steps: 25000
eval_batch_size: 125
eval_NFE: 2
eval_demo_steps: 1000
eval_demo_shape: [4, 8]
ckpt_saving_steps: 25000
logging_steps: 100
seed: 42
"""


def refusal(text: str = TEXT, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        parse_config(text, "my.yaml", overrides)
    return str(caught.value)


# ------------------------------------------------------------------------------------------------
# The YAML reader.


def test_scientific_notation_is_a_number():
    config = parse_config(f"{TEXT}optim: {{lr: 1e-4, eps: 1E-9}}\n", "my.yaml", ["ema.decay=99e-2"])
    assert (config.optim.lr, config.optim.eps, config.ema.decay) == (1e-4, 1e-9, 0.99)


@pytest.mark.parametrize("word", ["off", "on", "yes", "no"])
def test_words_that_yaml_1_1_takes_for_booleans_are_text(word):
    assert parse_config(TEXT, "my.yaml", [f"name={word}"]).name == word


@pytest.mark.parametrize(
    ("text", "place"),
    [
        (TEXT + "name: other\n", "my.yaml, line 6, column 1: malformed YAML: found duplicate key"),
        (TEXT + "optim: {lr: 0.1, lr: 0.2}\n", "my.yaml, line 6, column 18: malformed YAML: found duplicate key"),
        ("name: [a\n", "my.yaml, line 2, column 1: malformed YAML: "),
        ("name: a\n name: b\n", "my.yaml, line 2, column 6: malformed YAML: "),
        ("name: a\n---\nname: b\n", "my.yaml, line 2, column 1: malformed YAML: "),
        (
            "name: !!python/object/apply:os.getcwd []\n",
            "my.yaml, line 1, column 7: malformed YAML: could not determine",
        ),
        ("name: \x01\n", "my.yaml: malformed YAML: "),
        ("name: !!int x\n", "my.yaml: malformed YAML: "),
        ("name: !!bool x\n", "my.yaml: malformed YAML: "),
        ("name: !!float\n", "my.yaml: malformed YAML: "),
        ("name: 2026-13-45\n", "my.yaml: malformed YAML: "),
        ("[" * 5000, "my.yaml: malformed YAML: "),
    ],
)
def test_malformed_yaml_is_refused_with_its_place(text, place):
    assert refusal(text).startswith(place)


def test_a_yaml_directive_does_not_outlive_its_document():
    assert "got False" in refusal("%YAML 1.1\n---\nname: off\n")
    assert parse_config(TEXT, "my.yaml", ["name=off"]).name == "off"


def test_cyclic_values_end():
    assert "train: got [[" in refusal(TEXT, "train=&a [*a]")


@pytest.mark.parametrize("text", ["", "just text", "- a\n- b\n", "3"])
def test_a_file_that_is_no_mapping_is_refused(text):
    assert refusal(text).startswith("my.yaml: got ")
    assert "expected the sections name, " in refusal(text)


def test_a_file_with_a_seed_alone_is_not_taken_for_an_official_one():
    assert "name: missing, expected text" in refusal("seed: 3\n")


def test_unreadable_files_are_refused(tmp_path):
    missing, folder, binary = tmp_path / "no.yaml", tmp_path / "folder", tmp_path / "binary.yaml"
    folder.mkdir()
    binary.write_bytes(b"name: \xff\xfe")
    for path, reason in ((missing, "No such file"), (folder, "Is a directory"), (binary, "expected UTF-8")):
        with pytest.raises(ConfigError, match=reason) as caught:
            load_config(path, [])
        assert str(path) in str(caught.value)


# ------------------------------------------------------------------------------------------------
# Fields.


@pytest.mark.parametrize(
    ("override", "suggestion"),
    [
        ("train.totalsteps=3", "train.totalsteps: unknown field; did you mean 'train.total_steps'?"),
        ("trian.total_steps=3", "trian: unknown field; did you mean 'train'?"),
        ("batch_size=3", "batch_size: unknown field; did you mean 'train.batch_size'?"),
        ("objective.lr=3", "objective.lr: unknown field; did you mean 'optim.lr'?"),
        ("network.nmae=DiT", "network.nmae: unknown field; did you mean 'network.name'?"),
        ("flow.zzz=3", "flow.zzz: unknown field; known here are path, parameterization, sampler"),
    ],
)
def test_unknown_fields_name_the_nearest(override, suggestion):
    assert refusal(TEXT, override) == f"my.yaml with {override}: {suggestion}"
    dotted, _, value = override.partition("=")
    section, _, field = dotted.rpartition(".")
    raw = YAML(typ="safe", pure=True).load(TEXT)
    (raw.setdefault(section, {}) if section else raw)[field] = value
    assert f"my.yaml: {suggestion}" in refusal(str(raw))


@pytest.mark.parametrize(
    ("override", "problem"),
    [
        ("train.batch_size=x", "train.batch_size: got 'x', expected an integer"),
        ("train.batch_size=2.5", "train.batch_size: got 2.5, expected an integer"),
        ("train.batch_size=2.0", "train.batch_size: got 2.0, expected an integer"),
        ("train.batch_size=true", "train.batch_size: got True, expected an integer"),
        ("train.batch_size=", "train.batch_size: got None, expected an integer"),
        ("optim.lr='1e-4'", "optim.lr: got '1e-4', expected a number"),
        ("optim.clip_norm=off", "optim.clip_norm: got 'off', expected a number or null"),
        ("optim.betas=[0.9]", "optim.betas: got [0.9], expected a list of 2 numbers"),
        ("optim.betas=[0.9, a]", "optim.betas: got [0.9, 'a'], expected a list of 2 numbers"),
        ("name=7", "name: got 7, expected text"),
        ("name=2026-01-01", "name: got datetime.date(2026, 1, 1), expected text"),
        ("flow.path=linaer", "flow.path: got 'linaer', expected one of linear, trig; did you mean 'linear'?"),
        ("flow.path=[linear]", "flow.path: got ['linear'], expected one of linear, trig"),
        ("flow=linear", "flow: got 'linear', expected a section with path, parameterization, sampler"),
        ("train.batch_size=0", "train.batch_size: got 0, expected an integer of at least 1"),
        (f"train.total_steps={2**63}", f"train.total_steps: got {2**63}, expected an integer below 2**63"),
        (f"network.channel_mult=[1, -{2**63}]", f"network.channel_mult: got (1, -{2**63}), expected an integer below"),
        ("network.mlp_ratio=.nan", "network.mlp_ratio: got nan, expected above 0 and at most 1024"),
        ("times.t_mean=-1e10", "times.t_mean: got -10000000000.0, expected a finite number of at most 1000000000"),
        ("optim.lr=1e300", "optim.lr: got 1e+300, expected a finite number of at most 1000000000"),
        ("optim.lr=.inf", "optim.lr: got inf, expected a finite number of at most 1000000000"),
        ("times.s_mean=.nan", "times.s_mean: got nan, expected a finite number of at most 1000000000"),
        ('output_dir="\\0"', "output_dir: got '\\x00', expected text without the character NUL"),
        (
            "objective.cfg_scale=2",
            "objective.label_dropout: got 0.0, expected above 0, because objective.cfg_scale is 2.0",
        ),
    ],
)
def test_wrong_values_say_field_value_and_expectation(override, problem):
    message = refusal(TEXT, override)
    assert message.startswith(f"my.yaml with {override}: {problem}")


def test_numbers_at_the_bounds_are_accepted():
    config = parse_config(TEXT, "my.yaml", [f"seed={2**63 - 1}", "engine.timeout_s=1e9", "engine.grace_s=1000000000"])
    assert (config.seed, config.engine.timeout_s, config.engine.grace_s) == (2**63 - 1, 1e9, 1e9)


def test_all_problems_are_reported_at_once():
    text = TEXT.replace("batch_size: 4", "batch: 4").replace("input_size: 32", "input_size: big") + "extra: 1\n"
    lines = refusal(text).splitlines()
    assert lines[0].rstrip() == "my.yaml:"
    assert [line.strip().partition(":")[0] for line in lines[1:]] == [
        "extra",
        "network.input_size",
        "train.batch",
        "train.batch_size",
    ]
    assert "missing, expected an integer" in lines[-1]


def test_a_missing_section_is_named():
    assert refusal("name: run\n").splitlines()[1].strip().startswith("network: missing, expected a section with name,")


def test_integers_stand_for_floats():
    config = parse_config(TEXT, "my.yaml", ["objective.fm_ratio=1"])
    assert config.objective.fm_ratio == 1.0
    assert isinstance(config.objective.fm_ratio, float)


def test_defaults_are_those_of_the_classes():
    config = parse_config(TEXT, "my.yaml")
    assert config.times == TimesConfig()
    assert config.network == NetworkConfig(name="DiT-B/4", input_size=32, in_channels=4, num_classes=1000)


# ------------------------------------------------------------------------------------------------
# Overrides.


def test_overrides_change_only_their_field():
    base = parse_config(TEXT, "my.yaml")
    config = parse_config(TEXT, "my.yaml", ["train.batch_size=8", "optim.betas=[0.5, 0.6]", "optim.clip_norm=1"])
    assert compare_configs(base, config) == [
        "train.batch_size: 4, 8",
        "optim.betas: (0.9, 0.99), (0.5, 0.6)",
        "optim.clip_norm: None, 1.0",
    ]


def test_the_last_override_of_a_field_wins():
    assert parse_config(TEXT, "my.yaml", ["seed=1", "seed=2"]).seed == 2


def test_an_override_may_contain_equals_signs_and_slashes():
    config = parse_config(TEXT, "my.yaml", ["output_dir=/a/b=c"])
    assert config.output_dir == "/a/b=c"


def test_an_override_replaces_a_section_and_then_its_fields():
    config = parse_config(TEXT, "my.yaml", ["train={total_steps: 5, batch_size: 2}", "train.batch_size=3"])
    assert (config.train.total_steps, config.train.batch_size) == (5, 3)


def test_an_override_does_not_reach_through_a_yaml_alias():
    text = TEXT + "ema: &same {}\noptim: *same\n"
    config = parse_config(text, "my.yaml", ["ema.decay=0.5"])
    assert config.ema.decay == 0.5


@pytest.mark.parametrize("override", ["seed", "=1", ".seed=1", "train.=1", "train..total_steps=1", ""])
def test_an_override_of_another_form_is_refused(override):
    assert refusal(TEXT, override) == f"override {override!r}: expected section.field=value"


def test_an_override_below_a_value_is_refused():
    assert refusal(TEXT, "name.x=1") == "override 'name.x=1': name is 'run', not a section"


def test_a_malformed_override_is_refused_by_its_own_name():
    assert refusal(TEXT, "seed=[").startswith("override 'seed=[', line 1, column 2: malformed YAML")


# ------------------------------------------------------------------------------------------------
# Round trip, comparison, help.


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_recipes_load_and_come_back(path):
    config = load_config(path, [])
    assert config.name == path.stem
    assert parse_config(dump_config(config), "dump") == config


def random_value(hint: typing.Any, rng: random.Random) -> typing.Any:
    bare = typing.get_args(hint)[0]
    kind = rng.choice(typing.get_args(bare)) if isinstance(bare, typing.types.UnionType) else bare
    if typing.get_origin(kind) is typing.Literal:
        return rng.choice(typing.get_args(kind))
    if kind is str:
        word = "".join(rng.choice("a1-:#&*!%@`'\"\\[]{},?|> \t\n\u0085\u2028\u00e9\U0001f600~=.") for _ in range(6))
        return rng.choice([word, "1e-4", "null", "~", "", "0o17", "1_000", "2001-01-01", "true", "<<", ".nan", "- a"])
    if kind is bool:
        return rng.choice([True, False])
    if kind is int:
        return rng.choice([0, 1, 7, 2**40])
    if kind is float:
        return rng.choice([0.1, 1e-300, 1e16, 1e22, 0.1 + 0.2, rng.random(), float(rng.randint(0, 9))])
    return None


def random_config(seed: int) -> Config:
    rng = random.Random(seed)
    config = parse_config(TEXT, "my.yaml", [f"seed={seed}"])
    config = dataclasses.replace(config, output_dir=random_value(typing.Annotated[str, ""], rng))
    for field in dataclasses.fields(config):
        section = getattr(config, field.name)
        if dataclasses.is_dataclass(section):
            for name, hint in typing.get_type_hints(type(section), include_extras=True).items():
                try:
                    section = dataclasses.replace(section, **{name: random_value(hint, rng)})
                    config = dataclasses.replace(config, **{field.name: section})
                except (ValueError, TypeError):
                    section = getattr(config, field.name)  # what no run can use cannot be in a file either
    return config


@pytest.mark.parametrize(
    "root", ["données/Équipe générative/modèles pré-entraînés/vérité terrain/latents imagenet", "a  b" * 99]
)
def test_long_texts_come_back_without_other_blanks(root):
    config = parse_config(TEXT, "my.yaml")
    config = dataclasses.replace(config, output_dir=root)
    assert parse_config(dump_config(config), "dump") == config


def test_any_values_come_back():
    base = parse_config(TEXT, "my.yaml")
    configs = [random_config(seed) for seed in range(200)]
    changed = {line.partition(":")[0] for config in configs for line in compare_configs(base, config)}
    assert {"network.name", "optim.lr", "optim.clip_norm", "times.gap_method", "network.depth"} <= changed
    for config in configs:
        assert parse_config(dump_config(config), "dump") == config


def test_dump_states_every_field():
    raw = YAML(typ="safe", pure=True).load(dump_config(parse_config(TEXT, "my.yaml")))
    dumped = [
        f"{section}.{field}" if isinstance(value, dict) else section
        for section, value in raw.items()
        for field in (value if isinstance(value, dict) else [""])
    ]
    assert dumped == [field.name for field in describe_fields()]


def test_compare_finds_nothing_between_equals():
    assert compare_configs(parse_config(TEXT, "a"), parse_config(TEXT, "b")) == []


def test_describe_fields_says_name_type_default_and_help():
    fields = {field.name: field for field in describe_fields()}
    assert fields["network.name"].default == "required"
    assert fields["optim.betas"][1:3] == ("a list of 2 numbers", "[0.9, 0.99]")
    assert fields["optim.clip_norm"][1:3] == ("a number or null", "null")
    assert fields["flow.path"][1:3] == ("one of linear, trig", "linear")
    assert fields["train.batch_size"].help == "global batch, over all processes"


# ------------------------------------------------------------------------------------------------
# Recipes and the official keys.


@pytest.mark.parametrize(
    ("name", "network", "patch", "steps"),
    [
        ("b4", "DiT-B-4", 4, 400_000),
        ("b2", "DiT-B-2", 2, 1_200_000),
        ("m2", "DiT-M-2", 2, 1_200_000),
        ("l2", "DiT-L-2", 2, 1_200_000),
        ("xl2", "DiT-XL-2", 2, 1_200_000),
    ],
)
def test_imagenet_recipes_equal_the_official_configuration(name, network, patch, steps):
    """Our recipe and the official file differ in nothing that is computed, but for what the official table changes."""
    recipe = next(path for path in CONFIGS if path.stem == f"imagenet-{name}")
    text = OFFICIAL.replace("DiT-XL-2", network).replace("time_std: [1.0, 0.8, 0.9]", "time_std: [1.0, 0.8, 0.8]")
    text = text.replace("total_steps: 400000", f"total_steps: {steps}")
    official = parse_config(text, "official.yaml", notice=lambda text: None)
    assert official.network.name.endswith(f"/{patch}")
    assert [line.partition(":")[0] for line in compare_configs(load_config(recipe, []), official)] == [
        "name",
        "output_dir",
        "data.root",
        "train.sample_nfe",
    ]


def test_cifar10_recipe_equals_the_official_configuration():
    changes = {
        "model_type": "UNet",
        "dataset_type": "CIFAR10",
        "dataset_path": "./CIFAR10",
        "velocity_loss_ratio": "0.0",
        "p": "0.75",
        "eps": "0.001",
        "time_mean": "[-0.9, -4.0, -0.9]",
        "time_std": "[1.6, 1.6, 1.6]",
        "cfg_scale": "1.0",
        "mix_ratio": "1.0",
        "cfg_drop_rate": "0.0",
        "cfg_decay_time": "1.0",
        "l_init_ratio": "1.0",
        "l_end_ratio": "0.0003125",
        "total_steps": "800000",
        "betas": "[0.9, 0.999]",
        "batch_size": "1024",
        "eval_NFE": "1",
    }
    lines = [line.partition(": ") for line in OFFICIAL.strip().splitlines()]
    text = "\n".join(f"{key}: {changes.get(key, value)}" for key, _, value in lines)
    official = parse_config(text, "official.yaml", notice=lambda text: None)
    recipe = load_config(next(path for path in CONFIGS if path.stem == "cifar10"), [])
    assert [line.partition(":")[0] for line in compare_configs(recipe, official)] == [
        "name",
        "output_dir",
        "network.dropout",  # its default, which the recipe states
        "data.root",
    ]
    assert (recipe.ema.every, recipe.ema.dtype, recipe.optim.name, recipe.data.augment_p) == (
        16,
        "float64",
        "radam",
        0.12,
    )


GRIDS = ("train.sample_every=500", "train.sample_vae=vae")


def test_official_keys_are_translated():
    assert parse_config(OFFICIAL, "official.yaml", GRIDS, notice=lambda text: None).train.sample_every == 500
    notices: list[str] = []
    config = parse_config(OFFICIAL, "official.yaml", ["train.batch_size=32"], notices.append)
    assert (config.name, config.output_dir, config.seed) == ("first", "experiments", 42)
    assert config.network == NetworkConfig(name="DiT-XL/2", input_size=32, in_channels=4, num_classes=1000)
    assert (config.data.source, config.data.root) == ("latents", "./imagenet_latent")
    assert config.times == TimesConfig(
        velocity_mean=-0.2, s_mean=-1.0, t_mean=0.2, velocity_std=1.0, s_std=0.8, t_std=0.9, gap_init=0.1, gap_end=0.002
    )
    assert (config.train.batch_size, config.train.sample_nfe) == (32, 2)
    assert (config.optim.name, config.optim.lr, config.engine.precision) == ("adamw", 1e-4, "tf32")
    assert notices == [
        "official.yaml: official configuration; not needed here and ignored: "
        "num_workers, prefetch_factor, eval_steps, eval_batch_size, eval_demo_shape, "
        "eval_demo_steps (grids of latents need train.sample_vae)"
    ]


def test_official_latents_are_read_in_the_format_that_lies_there(tmp_path):
    """The root that counts is the one after the overrides, and a source that was asked for stays."""

    def source(root: Path, *overrides: str) -> tuple[str, list[str]]:
        text, notices = OFFICIAL.replace("./imagenet_latent", str(root)), []
        return parse_config(text, "official.yaml", overrides, notices.append).data.source, notices[1:]

    file = tmp_path / "imagenet_latent.hdf5"
    assert source(tmp_path) == ("latents", [])
    assert source(file) == ("latents", [])
    file.touch()
    remark = "; what soflow convert makes of it is read faster"
    for root in (tmp_path, file):
        chosen, (notice,) = source(root)
        assert chosen == "hdf5"
        assert notice == f"official.yaml: data.source is hdf5, because {root} is or holds such a file{remark}"
    assert source(tmp_path, f"data.root={tmp_path / 'shards'}") == ("latents", [])
    assert source(tmp_path / "shards", f"data.root={file}")[0] == "hdf5"
    assert source(tmp_path, "data.source=latents") == ("latents", [])
    assert source(tmp_path, "data={source: digits}") == ("digits", [])


def test_the_notice_goes_to_stderr(capsys):
    parse_config(OFFICIAL, "official.yaml")
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert captured.err.startswith("note: official.yaml: ")


@pytest.mark.parametrize(
    ("key", "values"),
    [
        ("noising_type", {"Linear": "linear", "Trig": "trig"}),
        ("coefficient_type", {"Euler": "euler", "Trig": "trig"}),
        ("l_schedule", {"Const": "const", "Linear": "linear", "Cosine": "cosine", "Exponent": "exponential"}),
    ],
)
def test_official_choices(key, values):
    for theirs, ours in values.items():
        lines = [f"{key}: {theirs}" if line.startswith(key) else line for line in OFFICIAL.splitlines()]
        config = parse_config("\n".join(lines), "official.yaml", notice=lambda text: None)
        found = {
            "noising_type": config.flow.path,
            "coefficient_type": config.flow.parameterization,
            "l_schedule": config.times.gap_method,
        }
        assert found[key] == ours


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        (
            "noising_type: Linear",
            "noising_type: Triangular",
            "noising_type: got 'Triangular', expected one of Linear, Trig",
        ),
        (
            "coefficient_type: Euler",
            "coefficient_type: Triangular",
            "coefficient_type: got 'Triangular', expected one of",
        ),
        ("model_type: DiT-XL-2", "model_type: Unet", "model_type: got 'Unet', expected one of UNet, DiT-B-4, "),
        ("model_type: DiT-XL-2", "model_type: [UNet]", "model_type: got ['UNet'], expected one of UNet, DiT-B-4, "),
        (
            "dataset_type: Imagenet",
            "dataset_type: CIFAR",
            "dataset_type: got 'CIFAR', expected one of Imagenet, CIFAR10",
        ),
        ("[-0.2, -1.0, 0.2]", "[-0.2, -1.0]", "time_mean: got [-0.2, -1.0], expected a list of 3 numbers"),
        ("[-0.2, -1.0, 0.2]", "0.2", "time_mean: got 0.2, expected a list of 3 numbers"),
        ("seed: 42", "", "seed: missing"),
        ("betas:", "beta:", "beta: unknown key of an official configuration; the nearest known one is 'betas'"),
        ("batch_size: 256", "batch_size: big", "train.batch_size: got 'big', expected an integer"),
        ("./experiments/first", ".", "name: got ''"),
    ],
)
def test_official_files_this_engine_cannot_follow_are_refused(old, new, problem):
    assert old in OFFICIAL
    with pytest.raises(ConfigError) as caught:
        parse_config(OFFICIAL.replace(old, new, 1), "official.yaml", notice=lambda text: None)
    assert str(caught.value).startswith(f"official.yaml: {problem}")


@pytest.mark.parametrize("key", ["noising_type", "coefficient_type"])
def test_triangular_is_explained(key):
    old = {"noising_type": "Linear", "coefficient_type": "Euler"}[key]
    assert "crashes there or silently runs as Trig" in refusal(OFFICIAL.replace(f"{key}: {old}", f"{key}: Triangular"))
