"""YAML in FunASR's sections, ``++key=value`` overrides, and typed sections with no unknown keys."""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml

from funasr_mooer.errors import ConfigError

T = TypeVar("T")


def section(cls: type[T], values: Mapping[str, Any] | None, name: str) -> T:
    """Turn one mapping of a config into the dataclass that reads it.

    Fields whose annotation is a dataclass are built from nested mappings.

    Args:
        cls: the dataclass.
        values: the mapping found under ``name``; None means all defaults.
        name: path of the mapping in the config, for messages (``adapter_conf``).

    Raises:
        ConfigError: an unknown key (with a suggestion), a missing one, or a value of the wrong type.
    """
    values = _mapping(values, name)
    fields = {field.name: field for field in dataclasses.fields(cls)}
    for key in values:
        if key not in fields:
            raise ConfigError(f"{name}.{key}: unknown key{suggest(key, fields)}")
    hints = typing.get_type_hints(cls)
    for key, field in fields.items():
        if key in values:
            values[key] = _convert(hints[key], values[key], f"{name}.{key}")
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise ConfigError(f"{name}.{key}: is required and not given")
    return cls(**values)


def construct(cls: type[T], values: Mapping[str, Any] | None, name: str, **given: Any) -> T:
    """Build a module from one mapping of a config: its constructor's signature is the schema.

    Args:
        cls: the class; every parameter of ``__init__`` is a key that ``values`` may hold.
        values: the mapping found under ``name``.
        name: path of the mapping in the config, for messages.
        given: arguments that are derived, not configured (``input_size``); ``values`` may not set them.

    Raises:
        ConfigError: an unknown, missing or derived key, or a value of the wrong type.
    """
    values = _mapping(values, name)
    hints = typing.get_type_hints(cls.__init__)
    parameters = dict(inspect.signature(cls).parameters)
    settable = [key for key in parameters if key not in given]
    for key in values:
        if key in given:
            raise ConfigError(f"{name}.{key}: is derived ({given[key]}), remove it")
        if key not in settable:
            raise ConfigError(f"{name}.{key}: unknown key{suggest(key, settable)}")
        values[key] = _convert(hints.get(key, Any), values[key], f"{name}.{key}")
    for key in settable:
        if key not in values and parameters[key].default is inspect.Parameter.empty:
            raise ConfigError(f"{name}.{key}: is required and not given")
    return cls(**given, **values)


def overlay(cls: type[T], values: Mapping[str, Any] | None, call: Mapping[str, Any] | None, name: str) -> T:
    """A section whose settings a call may replace.

    Args:
        cls: the dataclass.
        values: the mapping found under ``name``.
        call: what a caller gave, settings of others among it.
        name: path of the mapping in the config, for messages.

    Raises:
        ConfigError: as of :func:`section`; what the call holds besides is passed over.
    """
    known = [field.name for field in dataclasses.fields(cls)]
    given = {key: value for key, value in (call or {}).items() if key in known}
    return section(cls, {**_mapping(values, name), **given}, name)


def check_least(conf: Any, name: str, **least: float) -> None:
    """Refuse a section with a value below the least one that can work.

    Args:
        conf: the section's dataclass.
        name: path of the section in the config, for messages.
        least: its fields, and the least value of each.

    Raises:
        ConfigError: names the first such field.
    """
    for key, value in least.items():
        if getattr(conf, key) < value:
            raise ConfigError(f"{name}.{key}={getattr(conf, key)}: must be at least {value}")


def suggest(word: str, known: Sequence[str] | Mapping[str, Any]) -> str:
    """'; did you mean ...?' or '; known: ...' for a word that is not among ``known``."""
    close = difflib.get_close_matches(str(word), list(known), n=1)
    return f"; did you mean '{close[0]}'?" if close else f"; known: {', '.join(sorted(map(str, known)))}"


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Read a YAML config, apply ``++a.b=1`` overrides, resolve ``${...}``; a plain dict.

    Raises:
        ConfigError: the file does not exist, is not YAML, or an override is not ``++key=value``.
    """
    return override(read_yaml(path), overrides, str(path))


def read_yaml(path: str | Path) -> dict[str, Any]:
    """A YAML config as it stands in the file, with ``${...}`` and with values that a caller must still give (``???``).

    Raises:
        ConfigError: the file does not exist, or is not YAML of keys and values.
    """
    path = Path(path)
    if not path.is_file():
        raise ConfigError(f"{path}: no such config file")
    try:
        return _mapping(yaml.safe_load(path.read_text(encoding="utf-8")), str(path))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: {error}") from error


def override(config: Mapping[str, Any], overrides: Sequence[str], name: str = "config") -> dict[str, Any]:
    """A config with ``++a.b=1`` overrides applied and ``${...}`` resolved.

    Raises:
        ConfigError: an override is not ``++key=value``, or a reference leads nowhere.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    changes = [_override(text) for text in overrides]
    try:
        merged = OmegaConf.create(dict(config))
        for key, value in changes:
            OmegaConf.update(merged, key, value, merge=True)  # reaches into lists too: stages.0.steps
        return typing.cast(dict, OmegaConf.to_container(merged, resolve=True, throw_on_missing=True))
    except (OmegaConfBaseException, ValueError) as error:  # ValueError: a word where a list has numbers
        raise ConfigError(f"{name}: {error}") from error


def save_config(config: Mapping[str, Any], path: str | Path) -> None:
    """Write a config as YAML, keys in the order in which they were given."""
    text = yaml.safe_dump(dict(config), allow_unicode=True, sort_keys=False)
    Path(path).write_text(text, encoding="utf-8")


def _mapping(values: Any, name: str) -> dict[str, Any]:
    """A copy of a section; None is an empty one."""
    if values is not None and not isinstance(values, Mapping):
        raise ConfigError(f"{name}: expected a mapping of keys to values, found {values!r}")
    return dict(values or {})


def _override(text: str) -> tuple[str, Any]:
    """``++a.b=1`` -> ("a.b", 1)."""
    from omegaconf import OmegaConf

    key, equals, value = text.removeprefix("++").partition("=")
    if not text.startswith("++") or not equals or not all(key.split(".")):
        raise ConfigError(f"'{text}': an override is written ++section.key=value")
    try:
        return key, OmegaConf.to_container(OmegaConf.from_dotlist([f"value={value}"]))["value"]
    except yaml.YAMLError as error:
        raise ConfigError(f"'{text}': what follows = is not YAML ({str(error).splitlines()[0]})") from error


def _convert(hint: Any, value: Any, name: str) -> Any:
    """``value`` as the annotated type: a nested dataclass, a number, a list; else an error."""
    origin = typing.get_origin(hint)
    if origin in (types.UnionType, typing.Union):
        return _convert_either(typing.get_args(hint), value, name)
    if dataclasses.is_dataclass(hint):
        return value if isinstance(value, hint) else section(hint, value, name)
    if hint is Any:
        return value
    wanted, inner = origin or hint, typing.get_args(hint)
    if wanted is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if wanted is float and isinstance(value, str):  # YAML reads 1e-4 (no dot) as a string
        try:
            return float(value)
        except ValueError:
            raise ConfigError(f"{name}: expected a number, found {value!r}") from None
    if wanted is list and isinstance(value, (tuple, list)):
        return [_convert(inner[0] if inner else Any, item, f"{name}[{i}]") for i, item in enumerate(value)]
    if wanted is Mapping and isinstance(value, Mapping) and inner:
        return {key: _convert(inner[1], item, f"{name}.{key}") for key, item in value.items()}
    if wanted in (int, float) and isinstance(value, bool):
        raise ConfigError(f"{name}: expected a {wanted.__name__}, found {value!r}")
    if wanted is Path and isinstance(value, str):
        return Path(value)
    if isinstance(wanted, type) and not isinstance(value, wanted):
        raise ConfigError(f"{name}: expected {wanted.__name__}, found {value!r}")
    return value


def _convert_either(hints: Sequence[Any], value: Any, name: str) -> Any:
    """``value`` as the type among several that it has; as the one that is not None, where there are no others."""
    if value is None and type(None) in hints:
        return None
    kinds = [hint for hint in hints if hint is not type(None)]
    fitting = kinds if len(kinds) == 1 else [k for k in kinds if isinstance(value, typing.get_origin(k) or k)]
    if not fitting:
        raise ConfigError(f"{name}: expected {' or '.join(k.__name__ for k in kinds)}, found {value!r}")
    return _convert(fitting[0], value, name)
