"""A YAML file and the overrides of a command line become a `Config`, or a message that says what to change.

The YAML is version 1.2 (`1e-4` is a number, `off` is text), read without constructing Python objects; duplicate keys
are refused. Files of the official implementation are accepted as they are: `soflow.official_config` translates them.
"""

import dataclasses
import difflib
import io
import reprlib
import sys
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, TypeVar

import msgspec
from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError

from soflow import official_config
from soflow.config import Config

T = TypeVar("T")

# A cyclic or huge YAML value must not fill the screen.
_shorten = reprlib.Repr()
_shorten.maxstring = _shorten.maxother = _shorten.maxlong = 120

_TYPE_TEXTS = {bool: "true or false", int: "an integer", float: "a number", str: "text", type(None): "null"}


class ConfigError(ValueError):
    """A configuration that no run can use; the message says file, field, value and what was expected."""


class FieldHelp(NamedTuple):
    """One line of `--help`: the dotted name, the type in words, the default as text (or 'required'), the help."""

    name: str
    type: str
    default: str
    help: str


def print_notice(text: str) -> None:
    """Print `text` on stderr; what `parse_config` does with notices unless told otherwise."""
    print(f"note: {text}", file=sys.stderr)


def load_config(path: Path, overrides: Sequence[str] = (), *, accept_official: bool = True) -> Config:
    """Return the configuration of a YAML file, changed by overrides `section.field=value` (the last of a field wins).

    Raises ConfigError for a file that cannot be read and for everything `parse_config` refuses.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: expected UTF-8 text: {error}") from error
    return parse_config(text, str(path), overrides, accept_official=accept_official)


def parse_config(
    text: str,
    origin: str,
    overrides: Sequence[str] = (),
    notice: Callable[[str], None] = print_notice,
    *,
    accept_official: bool = True,
) -> Config:
    """Return the configuration of a YAML text; `origin` names it in messages, `notice` receives remarks.

    accept_official: whether a file in the official keys is translated, or refused.
    Raises ConfigError for malformed YAML, unknown or missing fields, wrong types and values `Config` refuses: all of
    them at once, except that what `Config` itself checks is only known when the fields have their types.
    """
    raw = _read_yaml(text, origin)
    if not isinstance(raw, dict):
        raise ConfigError(f"{origin}: got {_shorten.repr(raw)}, expected the sections {_field_names(Config)}")
    official = official_config.is_official(raw)
    if official and not accept_official:
        raise ConfigError(f"{origin}: got a configuration of the official code, expected one that this engine wrote")
    if official:
        try:
            raw, ignored = official_config.translate(raw)
        except ValueError as error:
            raise ConfigError(f"{origin}: {error}") from error
        if ignored:
            notice(f"{origin}: official configuration; not needed here and ignored: {', '.join(ignored)}")
    for override in overrides:
        _apply_override(raw, override)
    # what lies at the root is asked of the one that was chosen in the end
    remark = official_config.choose_source(raw) if official else None
    if remark is not None:
        notice(f"{origin}: {remark}")
    problems: list[str] = []
    config = _build(Config, raw, "", problems)
    if config is None:
        where = f"{origin} with {' '.join(overrides)}" if overrides else origin
        raise ConfigError(f"{where}: {_joined(problems)}")
    return config


def parse_section(cls: type[T], raw: Any, name: str, origin: str) -> T:
    """Return the section called `name`, of class `cls`, of what a YAML or JSON file holds; ConfigError as above."""
    problems: list[str] = []
    section = _build(cls, raw, f"{name}.", problems)
    if section is None:
        raise ConfigError(f"{origin}: {_joined(problems)}")
    return section


def dump_config(config: Config) -> str:
    """Return YAML text, every field stated, that `parse_config` reads back to an equal Config."""
    yaml = _yaml()
    yaml.default_flow_style = False
    yaml.sort_base_mapping_type_on_output = False  # type: ignore[assignment]  # untyped there, but for its first value
    # Some non-ASCII characters (U+0085) are line breaks to YAML and would not come back.
    yaml.allow_unicode = False
    # a text that is folded may come back with another blank
    yaml.width = 2**31
    text = io.StringIO()
    yaml.dump(dataclasses.asdict(config), text)
    return text.getvalue()


def compare_configs(a: Config, b: Config) -> list[str]:
    """Return one line 'section.field: value of a, value of b' per field in which the two differ."""
    flat_a, flat_b = _flatten(a), _flatten(b)
    return [f"{name}: {value!r}, {flat_b[name]!r}" for name, value in flat_a.items() if value != flat_b[name]]


def describe_fields() -> list[FieldHelp]:
    """Return name, type, default and help of every field of `Config`, in the order of the classes."""
    return list(_describe(Config, ""))


def _yaml() -> YAML:
    # One instance per text: a %YAML directive would otherwise outlive its document.
    return YAML(typ="safe", pure=True)


def _read_yaml(text: str, origin: str) -> Any:
    # Besides YAMLError, the constructors of explicit tags (`!!int x`, `!!bool x`) raise builtin errors.
    try:
        return _yaml().load(text)
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise ConfigError(f"{origin}{place}: malformed YAML: {error.problem or error.context}") from error
    except (YAMLError, ValueError, LookupError, TypeError, RecursionError) as error:
        raise ConfigError(f"{origin}: malformed YAML: {error}") from error


def _apply_override(raw: dict[Any, Any], override: str) -> None:
    origin = f"override {override!r}"
    dotted, equals, text = override.partition("=")
    *sections, field = dotted.split(".")
    if not equals or not all((*sections, field)):
        raise ConfigError(f"{origin}: expected section.field=value")
    node = raw
    for depth, section in enumerate(sections):
        child = node.get(section)
        if child is None:
            child = {}
        if not isinstance(child, dict):
            raise ConfigError(f"{origin}: {'.'.join(sections[: depth + 1])} is {_shorten.repr(child)}, not a section")
        # A copy, because a YAML alias can make two sections the same object.
        node[section] = dict(child)
        node = node[section]
    node[field] = _read_yaml(text, origin)


def _build(cls: type[T], raw: Any, prefix: str, problems: list[str]) -> T | None:
    if not isinstance(raw, Mapping):
        problems.append(f"{prefix[:-1]}: got {_shorten.repr(raw)}, expected {_type_text(cls)}")
        return None
    before = len(problems)
    hints = typing.get_type_hints(cls, include_extras=True)
    problems += [_unknown(f"{prefix}{key}", cls) for key in raw if key not in hints]
    values: dict[str, Any] = {}
    for field in dataclasses.fields(cls):  # type: ignore[arg-type]
        dotted, hint = f"{prefix}{field.name}", hints[field.name]
        if field.name not in raw:
            if _is_required(field):
                problems.append(f"{dotted}: missing, expected {_type_text(hint)}")
        elif dataclasses.is_dataclass(hint):
            values[field.name] = _build(typing.cast(type, hint), raw[field.name], f"{dotted}.", problems)
        else:
            values[field.name] = _convert(raw[field.name], hint, dotted, problems)
    if len(problems) > before:
        return None
    try:
        return cls(**values)
    except ValueError as error:
        problems.append(str(error))
        return None


def _convert(value: Any, hint: Any, dotted: str, problems: list[str]) -> Any:
    try:
        return msgspec.convert(value, hint, strict=True)
    except msgspec.ValidationError:
        choices = typing.get_args(_bare(hint)) if typing.get_origin(_bare(hint)) is Literal else ()
        near = difflib.get_close_matches(str(value), choices, n=1)
        hint_text = f"; did you mean {near[0]!r}?" if near else ""
        problems.append(f"{dotted}: got {_shorten.repr(value)}, expected {_type_text(hint)}{hint_text}")
        return None


def _joined(problems: list[str]) -> str:
    return "\n  ".join(problems if len(problems) == 1 else ["", *problems])


def _unknown(dotted: str, section: type) -> str:
    near = _nearest(dotted)
    advice = f"did you mean {near!r}?" if near else f"known here are {_field_names(section)}"
    return f"{dotted}: unknown field; {advice}"


def _nearest(dotted: str) -> str | None:
    """The known field or section most alike by its last name; among equals, the one with the likeliest section."""

    def likeness(known: str) -> tuple[float, float]:
        last = difflib.SequenceMatcher(None, known.rpartition(".")[2], dotted.rpartition(".")[2]).ratio()
        return last, difflib.SequenceMatcher(None, known, dotted).ratio()

    names = [name for name, _, _ in _walk(Config, "")]
    sections = {name.rpartition(".")[0] for name in names} - {""}
    best = max([*names, *sorted(sections)], key=likeness)
    return best if likeness(best)[0] >= 0.6 else None


def _walk(cls: type, prefix: str) -> Iterator[tuple[str, "dataclasses.Field[Any]", Any]]:
    hints = typing.get_type_hints(cls, include_extras=True)
    for field in dataclasses.fields(cls):
        if dataclasses.is_dataclass(hints[field.name]):
            yield from _walk(hints[field.name], f"{prefix}{field.name}.")
        else:
            yield f"{prefix}{field.name}", field, hints[field.name]


def _describe(cls: type, prefix: str) -> Iterator[FieldHelp]:
    for name, field, hint in _walk(cls, prefix):
        default = "required" if _is_required(field) else _yaml_text(field.default)
        yield FieldHelp(name, _type_text(hint), default, typing.get_args(hint)[1])


def _flatten(config: Config) -> dict[str, Any]:
    flat = {}
    for name, _, _ in _walk(Config, ""):
        value: Any = config
        for part in name.split("."):
            value = getattr(value, part)
        flat[name] = value
    return flat


def _is_required(field: "dataclasses.Field[Any]") -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _field_names(cls: type) -> str:
    return ", ".join(field.name for field in dataclasses.fields(cls))


def _bare(hint: Any) -> Any:
    return typing.get_args(hint)[0] if typing.get_origin(hint) is Annotated else hint


def _type_text(hint: Any) -> str:
    hint = _bare(hint)
    arguments = typing.get_args(hint)
    if dataclasses.is_dataclass(hint):
        return f"a section with {_field_names(typing.cast(type, hint))}"
    if typing.get_origin(hint) is Literal:
        return f"one of {', '.join(arguments)}"
    if typing.get_origin(hint) is tuple:
        return "a list of numbers" if Ellipsis in arguments else f"a list of {len(arguments)} numbers"
    if isinstance(hint, types.UnionType):
        return " or ".join(_type_text(argument) for argument in arguments)
    return _TYPE_TEXTS[hint]


def _yaml_text(value: Any) -> str:
    if isinstance(value, tuple):
        return f"[{', '.join(map(_yaml_text, value))}]"
    return "null" if value is None else str(value)
