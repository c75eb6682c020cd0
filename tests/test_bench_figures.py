import json
from pathlib import Path

import pytest

from bench.figures import keep


def test_figures_that_are_cut_off_leave_those_before(tmp_path, monkeypatch):
    file = tmp_path / "figures.json"
    keep(None, {"rows": []})
    keep(file, {"rows": [1]})

    def cut_off(path: Path, text: str, encoding: str) -> int:
        path.write_bytes(text.encode(encoding)[:5])
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "write_text", cut_off)
    with pytest.raises(KeyboardInterrupt):
        keep(file, {"rows": [1, 2]})
    assert json.loads(file.read_text(encoding="utf-8")) == {"rows": [1]}
