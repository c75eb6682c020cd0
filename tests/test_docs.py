"""What README.md and docs/ name is there, and their examples run (those of docs/extending.md: test_extending.py)."""

import dataclasses
import importlib.util
import re
import typing
from pathlib import Path

import pytest
import torch
from torch import nn

from soflow.cli import COMMANDS
from soflow.config import Config

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
SECTIONS = {
    name: {field.name for field in dataclasses.fields(section)}
    for name, section in typing.get_type_hints(Config).items()
    if dataclasses.is_dataclass(section)
}
# their examples have variables of the reader's
GIVEN = {"docs/optimizer.md": {"network": nn.Linear(2, 2)}}


@pytest.fixture(params=PAGES, ids=lambda page: page.name)
def page(request) -> Path:
    return request.param


def test_links_lead_somewhere(page):
    targets = re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8"))
    assert not [target for target in targets if "://" not in target and not (page.parent / target).exists()]


def test_modules_commands_and_files_exist(page):
    text = page.read_text(encoding="utf-8")
    modules = {name for name in re.findall(r"\bpython -m ([\w.]+)", text) if name.startswith(("bench.", "soflow."))}
    assert not [name for name in modules if importlib.util.find_spec(name) is None]
    commands = re.findall(r"(?:^ +|`|soflow )soflow ([a-z]+)\b", text, re.MULTILINE)
    assert not set(commands) - COMMANDS.keys()
    files = re.findall(r"(?<![\w./-])((?:bench|configs|csrc|docs|kernels|launch|soflow|tests)/[\w./-]*\w)", text)
    assert not [name for name in files if not (ROOT / name).exists()]


def test_fields_of_the_configuration_exist(page):
    names = re.findall(rf"(?<![\w./])({'|'.join(SECTIONS)})\.([a-z_]+)\b(?!\()", page.read_text(encoding="utf-8"))
    assert not [f"{section}.{name}" for section, name in names if name not in SECTIONS[section] | {"py"}]


@pytest.mark.parametrize("name", ["README.md", "docs/kernels.md", "docs/optimizer.md"])
def test_examples_run(name):
    torch.manual_seed(0)
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / name).read_text(encoding="utf-8"), re.DOTALL)
    assert blocks
    for block in blocks:
        exec(block, dict(GIVEN.get(name, {})))


def test_every_page_is_linked_from_another():
    text = {page: page.read_text(encoding="utf-8") for page in PAGES}
    for page in PAGES[1:]:
        assert any(f"{page.name})" in text[other] for other in PAGES if other != page), page.name
