"""Data and networks of one's own: docs/extending.md as it stands, and what its examples meet beyond it."""

import functools
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from torch import nn

from soflow.checkpoint import CheckpointError
from soflow.cli import main
from soflow.config import Config
from soflow.distributed import Processes
from soflow.kernels import reference
from soflow.memory import predict_peak
from soflow.models import build_network, build_own_network
from soflow.run_folder import load_flow
from soflow.trainer import Trainer

PAGE = Path(__file__).parents[1] / "docs" / "extending.md"
ALONE = Processes(0, 1, torch.device("cpu"))
OWN = "network={name: own, input_size: 8, in_channels: 1, num_classes: 10}"
SHAPE = {"input_size": 8, "in_channels": 1, "num_classes": 10}


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> dict[str, Any]:
    """What the code of the page leaves, run from its first line to its last in an empty folder."""
    torch.use_deterministic_algorithms(True)
    folder = tmp_path_factory.mktemp("page")
    names: dict[str, Any] = {"folder": folder}
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for block in blocks:
            exec(block, names)
    return names


def test_the_code_of_the_page_trains_and_samples(page, tmp_path):
    runs = page["folder"] / "runs"
    assert sorted(path.name for path in runs.iterdir()) == ["discs", "mlp", "shades"]
    assert page["step"] == 50
    assert page["images"].shape == (3, 1, 8, 8)
    assert torch.isfinite(page["images"]).all()
    for run in ("shades", "discs"):
        assert main(["sample", str(runs / run), "--seeds", "0-5", "--grid", str(tmp_path / f"{run}.png")]) == 0


def test_the_source_of_the_page_draws_discs(page):
    mean, std, labels = page["Discs"](30, 8).read(np.array([4, 0, 2]))
    assert std is None
    assert labels.tolist() == [1, 0, 2]
    # pixels nearer to the centre, between four of them, than 2, 1 and 3
    assert (mean == 1).flatten(1).sum(1).tolist() == [12, 4, 24 + 8]
    assert set(mean.unique().tolist()) == {-1.0, 1.0}


def test_the_network_of_the_page_carries_its_difference(page):
    torch.manual_seed(0)
    network = build_own_network(page["Mlp"], **SHAPE, ops=reference).double()
    x, dx = torch.randn(5, 1, 8, 8).double(), torch.randn(3, 1, 8, 8).double()
    t, s = torch.rand(2, 5).double()
    dt, labels = torch.rand(3).double(), torch.arange(5)
    F_t, dF = network.forward_difference(x, dx, t, dt, s, labels)
    assert torch.equal(F_t, network(x, t, s, labels))
    moved = network(x[2:] + dx, t[2:] + dt, s[2:], labels[2:])
    torch.testing.assert_close(dF, moved - F_t[2:])
    null = torch.full((5,), 10)
    assert torch.equal(network(x, t, s), network(x, t, s, null))


def trainer(config: Config, network: object, **extra: Any) -> Trainer:
    return Trainer(config, ALONE, network=network, **extra)


def test_an_own_network_starts_from_the_seed_and_continues_to_the_bit(page, tmp_path):
    whole = trainer(tiny.config(tmp_path / "whole", OWN), page["Mlp"])
    torch.manual_seed(99)
    config = tiny.config(tmp_path / "parts", OWN)
    assert not trainer(config, page["Mlp"]).fit(until=3)
    parts = trainer(config, page["Mlp"])
    assert whole.fit()
    assert parts.finished == 3
    assert parts.fit()
    for name, tensor in whole.flow.network.state_dict().items():
        assert torch.equal(tensor, parts.flow.network.state_dict()[name]), name


def test_weights_of_another_network_are_refused_by_name(page, tmp_path):
    config = tiny.config(tmp_path, OWN)
    run = trainer(config, page["Mlp"])
    run.fit(until=1)
    wider = functools.partial(page["Mlp"], width=65)
    message = r"classes\.weight: got \[11, 64\], expected \[11, 65\], as the network has it"
    with pytest.raises(CheckpointError, match=message):
        trainer(config, wider)
    with pytest.raises(CheckpointError, match=message):
        load_flow(run.folder.path, network=wider)
    assert load_flow(run.folder.path, network=page["Mlp"])[1] == 1


def test_an_own_network_rounds_what_it_names(page, tmp_path):
    class Rounded(page["Mlp"]):
        def bf16_modules(self):
            return (self.last,)

    config = tiny.config(tmp_path, OWN, "engine.precision=bf16")
    run = trainer(config, Rounded)
    computing = run.step.flow.network
    assert (computing.first.weight.dtype, computing.last.weight.dtype) == (torch.float32, torch.bfloat16)
    assert run.fit()
    assert run.flow.network.last.weight.dtype == torch.float32


def test_memory_of_an_own_network_is_predicted(page, tmp_path):
    config = tiny.config(tmp_path, OWN)
    narrow, wide = (
        predict_peak(config, (1, 8, 8), torch.device("cpu"), network=functools.partial(page["Mlp"], width=width))
        for width in (64, 64 + 1000)
    )
    # weights, average, two moments and the gradient, in float32
    assert wide - narrow >= 5 * 4 * 1000 * (11 + 64 + 64 + 1 + 64)


def test_two_evaluations_need_no_difference(page, tmp_path):
    class NoDifference(page["Mlp"]):
        def forward_difference(self, *arguments):
            raise NotImplementedError

    assert trainer(tiny.config(tmp_path, OWN, "objective.lookahead=two_pass"), NoDifference).fit()


@pytest.mark.parametrize(
    ("builder", "message"),
    [
        (
            lambda **shape: nn.Linear(1, 1),
            "network: got a builder of a Linear, expected one of a soflow.models.Network",
        ),
        (lambda **shape: tiny.network("DiT"), "network.in_channels: got 3 from the builder, expected 1, with which"),
        (tiny.network("DiT"), "network: got a DiT, expected what builds one, such as its class"),
    ],
)
def test_what_is_no_network_of_the_configuration_is_refused(tmp_path, builder, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        trainer(tiny.config(tmp_path, OWN), builder)
    assert not list(tmp_path.iterdir())


def test_a_network_without_its_ops_or_in_another_precision_is_refused(page):
    class Bare(page["Mlp"]):
        def __init__(self, **shape):
            super().__init__(**shape)
            del self.ops

    with pytest.raises(ValueError, match=r"^network.ops: expected PairOps\(ops\)"):
        build_own_network(Bare, **SHAPE, ops=reference)
    halves = lambda **shape: page["Mlp"](**shape).half()  # noqa: E731
    with pytest.raises(ValueError, match=r"^classes.weight: got torch.float16, expected torch.float32"):
        build_own_network(halves, **SHAPE, ops=reference)


def test_a_network_that_is_not_asked_for_or_missing_is_refused(page, tmp_path):
    with pytest.raises(
        ValueError, match=r"^network.name: got 'DiT', expected 'own', because a network was handed over"
    ):
        trainer(tiny.config(tmp_path), page["Mlp"])
    with pytest.raises(ValueError, match=r"^network.name: got 'own' and no network, expected Trainer\("):
        trainer(tiny.config(tmp_path, OWN), None)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["train", "{}/config.yaml"], "got 'own' and no network"),
        (["train", "{}/config.yaml", "--dry-run"], "got 'own' and no network"),
        (["sample", "{}", "--grid", "{}.png"], "got 'own' and no network"),
        (["audit", "{}"], "got 'own', expected a network of soflow"),
        (["export", "{}", "{}.export"], "got 'own', expected a network of soflow"),
    ],
)
def test_commands_say_that_python_loads_an_own_network(page, tmp_path, capsys, command, message):
    run = trainer(tiny.config(tmp_path, OWN), page["Mlp"])
    assert run.fit()
    before = sorted(tmp_path.rglob("*"))
    capsys.readouterr()
    assert main([word.format(run.folder.path) for word in command]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: network.name: {message}")
    assert "load_flow(path, network=...)" in error
    assert sorted(tmp_path.rglob("*")) == before


def test_shape_fields_are_the_builders(tmp_path):
    with pytest.raises(ValueError, match=r"network.depth: got 3, expected nothing, because network.name is own"):
        tiny.config(tmp_path, OWN, "network.depth=3")
    with pytest.raises(ValueError, match=r"network.dropout: got 0.0, expected nothing"):
        tiny.config(tmp_path, OWN, "network.dropout=0.0")


@pytest.mark.parametrize("field", ["input_size", "in_channels", "num_classes"])
def test_a_network_of_another_shape_is_refused(field):
    shape = {"input_size": 8, "in_channels": 1, "num_classes": 10}

    def build(*, ops, **asked):
        return build_network("DiT-B-4", **{**asked, field: 2 * asked[field]}, ops=ops)

    message = f"network.{field}: got {2 * shape[field]} from the builder, expected {shape[field]}"
    with torch.device("meta"), pytest.raises(ValueError, match=message):
        build_own_network(build, **shape, ops=reference)
