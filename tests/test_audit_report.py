"""What an audit looks like as tables, JSON and a plot."""

import json
import math

import pytest
from matplotlib.figure import Figure
from PIL import Image

from soflow.audit import WAYS, GapErrors, StepAudit
from soflow.audit_report import save_json, save_plot, table
from soflow.rounding import ROUNDED


def made_up(step: int, r: float = 0.01) -> StepAudit:
    """Predictions are 2 times the noise in the geometric mean."""

    def at(gap: float, off: float) -> GapErrors:
        noise = {way: 1e-5 * (number + 1) / gap for number, way in enumerate(WAYS)}
        return GapErrors(gap, step * gap, noise, {way: off * value for way, value in noise.items()})

    gaps = [at(0.1, 2.0), at(0.01, 8.0), at(0.001, 0.5)]
    crossing = dict.fromkeys(WAYS, 0.02) | {"difference fp32": math.nan}
    F_error = dict(zip(ROUNDED, (1e-7, 3e-4, 2e-3), strict=True))
    return StepAudit(step, r, F_error, 0.98765, crossing, gaps)


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_table():
    first, second, third = table([made_up(100, 0.1), made_up(200)]).split("\n\n")[1::2]
    header, _, *lines = map(cells, first.splitlines())
    assert header == ["step", "r", "order of bias", "bias", *WAYS]
    assert [line[:5] for line in lines] == [
        ["100", "0.1", "0.988", "10", "0.0001"],
        ["200", "0.01", "0.988", "2", "0.001"],
    ]
    header, _, *lines = map(cells, second.splitlines())
    assert header == ["r", "bias", *WAYS]
    assert [line[0] for line in lines] == ["0.1", "0.01", "0.001"]
    assert lines[2] == ["0.001", "0.2", "0.01", "0.02", "0.03", "0.04", "0.05", "0.06"]
    _, _, *lines = map(cells, third.splitlines())
    assert [line[0] for line in lines] == list(WAYS)
    assert [line[1] for line in lines] == ["1e-07", "0.0003", "0.002"] * 2
    assert lines[0][2:] == ["0.5", "0.02"]
    assert lines[3][-1] == "-"
    assert len({len(line) for line in first.splitlines()}) == 1


def test_json_has_null_where_there_is_no_number(tmp_path):
    save_json(tmp_path / "audit.json", [made_up(100)], {"run": "tiny", "seed": 3})
    content = json.loads((tmp_path / "audit.json").read_text(), parse_constant=pytest.fail)
    assert (content["run"], content["seed"]) == ("tiny", 3)
    (step,) = content["steps"]
    assert step["crossing"]["difference fp32"] is None
    assert step["gaps"][1]["bias"] == 1.0
    assert step["gaps"][1]["noise"].keys() == set(WAYS)


@pytest.mark.parametrize("num", [1, 3])
def test_plot_has_bias_and_every_noise(tmp_path, monkeypatch, num):
    drawn = []
    save = Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda figure, *args, **kw: drawn.append(figure) or save(figure, *args, **kw)
    )
    audits = [made_up(100 * (index + 1), 0.1 / 10**index) for index in range(num)]
    save_plot(tmp_path / "audit.png", audits, 0.1, 0.002)
    with Image.open(tmp_path / "audit.png") as image:
        assert image.format == "PNG"
    panels = [{line.get_label(): list(line.get_ydata()) for line in axes.lines} for axes in drawn[0].axes]
    assert len(panels) == min(num, 2)
    last = audits[-1]
    assert panels[0]["bias of the finite difference"] == [at.bias for at in last.gaps]
    for way in WAYS:
        assert panels[0][f"noise, {way}"] == [at.noise[way] for at in last.gaps]
    if num > 1:
        assert panels[1]["bias of the finite difference"] == [audit.at(audit.r).bias for audit in audits]
    assert [file.name for file in tmp_path.iterdir()] == ["audit.png"]
