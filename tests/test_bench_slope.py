import json
import sys

import pytest

from bench import slope

TINY = {"name": "DiT", "input_size": 8, "patch_size": 2, "hidden_size": 64, "depth": 2, "num_heads": 1}


@pytest.mark.parametrize("weights", ["initial", "drawn"])
def test_difference_keeps_its_precision_and_two_evaluations_do_not(weights):
    records = slope.measure(TINY, weights)
    assert [record["r"] for record in records] == list(slope.GAPS)
    for record in records:
        assert record["difference fp32"] < 5e-6
        assert record["difference tf32-like"] < 2e-3
        assert record["difference bf16"] < 1e-2
        if weights == "initial":
            assert record["bf16 dF"] < 2 * record["bf16 F"]
    by_gap = {record["r"]: record for record in records}
    for way in ("two_pass fp32", "two_pass tf32-like", "two_pass bf16"):
        assert by_gap[0.0003125][way] > 50 * by_gap[0.1][way]


def test_prints_a_table_and_json(capsys, monkeypatch):
    monkeypatch.setattr(slope, "SHAPES", {slope.SMALL: TINY})
    monkeypatch.setattr(sys, "argv", ["bench.slope", "--network", slope.SMALL, "--weights", "initial"])
    slope.main()
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(slope.GAPS) + 3
    (table,) = json.loads(lines[-1])["tables"]
    assert [row["r"] for row in table["rows"]] == list(slope.GAPS)
