"""The file that takes the figures of a benchmark."""

import json
from pathlib import Path
from typing import Any


def keep(file: Path | None, figures: Any) -> None:
    """Write `figures` as JSON to `file`, where there is one, whole: a benchmark that is cut off keeps what it has."""
    if file is not None:
        partial = file.with_name(file.name + ".tmp")
        partial.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
        partial.replace(file)
