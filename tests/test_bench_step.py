"""The benches of a step: plain implementations equal to the engine's, and the commands at a small size."""

import json

import pytest
import torch
from test_objective import NULL, make_batch, make_flow

from bench import memory, plain, step, variants
from soflow import MeanFlow, Objective
from soflow.config import ObjectiveConfig

CPU = torch.device("cpu")
SMALLER = (
    "name: DiT, input_size: 8, in_channels: 2, num_classes: 5, patch_size: 4, hidden_size: 16, depth: 2, num_heads: 2"
)


@pytest.mark.parametrize(("loss", "objective"), [(plain.soflow_loss, Objective), (plain.meanflow_loss, MeanFlow)])
def test_plain_losses_and_gradients_are_the_engines(loss, objective):
    """In float64, where two evaluations and difference propagation agree."""
    settings = {"cfg_scale": 3.0, "cfg_decay_time": 0.6, "mix_ratio": 0.25, "loss_p": 0.75, "loss_eps": 0.02}
    flow, batch = make_flow(), make_batch()
    assert flow.network.num_classes == NULL
    ours = loss(flow.network, batch, ObjectiveConfig(**settings, label_dropout=0.1))
    theirs = objective(**settings)(flow, batch).loss
    parameters = [p for p in flow.parameters() if p.requires_grad]
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-10)
    for a, b in zip(*(torch.autograd.grad(x, parameters, allow_unused=True) for x in (ours, theirs)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-9)


def test_six_network_calls(monkeypatch):
    flow, batch = make_flow(), make_batch()
    calls = []
    forward = flow.network.forward
    monkeypatch.setattr(flow.network, "forward", lambda x, *rest: calls.append(len(x)) or forward(x, *rest))
    plain.soflow_loss(flow.network, batch, ObjectiveConfig(cfg_scale=3.0, label_dropout=0.1))
    nv, nc = batch.num_velocity, len(batch) - batch.num_velocity
    assert sorted(calls) == sorted([nv, nv, nc, nc, nc, nc])


@pytest.fixture
def smaller(monkeypatch):
    monkeypatch.setattr(variants, "SMALL", SMALLER)


def test_every_variant_trains(smaller):
    made = {name: make() for name, make in variants.variants("small", 8, CPU).items()}
    variants.require_equal_losses(made)
    for variant in made.values():
        before = [p.detach().clone() for p in variant.network.parameters()]
        variant.step()
        assert any(not torch.equal(a, b) for a, b in zip(before, variant.network.parameters(), strict=True))


def test_another_loss_is_noticed(smaller):
    made = {name: make() for name, make in variants.variants("small", 8, CPU).items()}
    made["six calls"].loss_function = lambda *arguments: 1.01 * plain.soflow_loss(*arguments)
    with pytest.raises(AssertionError, match="six calls: loss"):
        variants.require_equal_losses(made)


def test_command_times_variants_by_turns(smaller, tmp_path, capsys):
    file = tmp_path / "step.json"
    assert step.main(["--batch", "8", "--rounds", "7", "--json", str(file)]) == 0
    rows = json.loads(file.read_text(encoding="utf-8"))["rows"]
    assert [row["variant"] for row in rows] == ["engine", "six calls", "MeanFlow, one JVP", "MeanFlow, engine"]
    for row in rows:
        low, high = row["quartiles"]
        assert 0 < low <= row["seconds"] <= high
        assert row["images_per_s"] == pytest.approx(8 / row["seconds"])
    assert list(rows[0]["stages"]) == ["draw", "guidance", "forward with guidance", "backward", "update"]
    assert "1.00x" in capsys.readouterr().out


def test_in_line_each_has_the_batch_that_fits(smaller, monkeypatch):
    """And the stages are those of an engine without a graph, beside whose memory they would not fit."""
    train, graphs = variants.Engine.step, []

    def train_if_it_fits(engine: variants.Engine) -> None:
        if engine.config.train.batch_size > 4:
            raise torch.cuda.OutOfMemoryError("a pretended GPU's")
        train(engine)

    def note(engine: variants.Engine, device: torch.device, rounds: int) -> dict[str, float]:
        graphs.append((engine.name, engine.config.train.batch_size, engine.config.engine.cuda_graph))
        return {}

    monkeypatch.setattr(variants.Engine, "step", train_if_it_fits)
    monkeypatch.setattr(step, "stage_times", note)
    names = ("engine", "six calls", "MeanFlow, one JVP", "MeanFlow, engine")
    rows = list(step.measure_in_line("small", names, 8, CPU, 7))
    assert [(row["variant"], row["batch"]) for row in rows] == list(
        zip((*names, "engine"), (4, 8, 8, 4, 4), strict=True)
    )
    assert graphs == [(name, 4, "off") for name in ("engine", "MeanFlow, engine")]


def test_a_variant_that_fails_does_not_keep_the_others_from_being_timed(smaller, monkeypatch, capsys):
    monkeypatch.setattr(variants.Plain, "step", lambda self: 1 / 0)
    engine, plainly, again = step.measure_in_line("small", ("engine", "six calls"), 8, CPU, 7)
    assert (engine["variant"], again["variant"], plainly) == (
        "engine",
        "engine",
        {"model": "small", "variant": "six calls", "error": "ZeroDivisionError: division by zero"},
    )
    assert step.table([engine, plainly, again]).endswith("small six calls: ZeroDivisionError: division by zero")


def test_some_variants_alone(smaller, tmp_path, capsys):
    file = tmp_path / "step.json"
    assert step.main(["--batch", "8", "--rounds", "7", "--variant", "six calls", "--json", str(file)]) == 0
    assert [row["variant"] for row in json.loads(file.read_text(encoding="utf-8"))["rows"]] == ["six calls"]
    with pytest.raises(SystemExit):
        step.main(["--variant", "seven calls"])
    assert "--variant: got 'seven calls', expected one of engine, six calls, " in capsys.readouterr().err


def test_command_weighs_as_it_predicts(smaller, tmp_path, capsys):
    file = tmp_path / "memory.json"
    assert memory.main(["--model", "small", "--batch", "8", "--measure", "--json", str(file)]) == 0
    rows = {row["variant"]: row for row in json.loads(file.read_text(encoding="utf-8"))["rows"]}
    for row in rows.values():
        assert row["measured"] == pytest.approx(row["activations"], rel=0.01)
        assert row["total"] == pytest.approx(row["state"] + row["gradients"] + row["activations"])
    sizes = [rows[f"engine{how}"]["activations"] for how in ("", ", norms recomputed", ", blocks recomputed")]
    assert sizes == sorted(sizes, reverse=True)
    assert rows["engine"]["activations"] < rows["MeanFlow, one JVP"]["activations"]


def test_too_few_rounds_are_refused():
    with pytest.raises(SystemExit) as stopped:
        step.main(["--rounds", "6"])
    assert stopped.value.code == 2
