"""Reading configs: overrides on the command line, and what cannot be a config or a value of one."""

import dataclasses
from collections.abc import Mapping

import pytest

from funasr_mooer.config import construct, load_config, override, section
from funasr_mooer.errors import ConfigError


@dataclasses.dataclass
class Settings:
    speed: list[float] = dataclasses.field(default_factory=list)
    tasks: Mapping | list | None = None
    weights: Mapping | None = None


def test_overrides_reach_into_sections_lists_and_what_is_not_there_yet():
    config = {"a": {"b": 1}, "stages": [{"steps": 1}, {"steps": 2}], "size": "${a.b}"}
    found = override(config, ["++a.b=3", "++stages.1.steps=5", "++new.key=[x, y]", "++a.c={d: 1e-4}", "++e="])
    assert found["a"] == {"b": 3, "c": {"d": 1e-4}}
    assert found["stages"] == [{"steps": 1}, {"steps": 5}]
    assert found["new"] == {"key": ["x", "y"]}
    assert found["size"] == 3


@pytest.mark.parametrize("text", ["a.b=1", "++a.b", "++=1", "++a..b=1", "++a.b=[1,", "++stages.x=5", "++a.b=${zzz}"])
def test_an_override_that_cannot_be_meant_is_one_error(text):
    with pytest.raises(ConfigError):
        override({"a": {"b": 1}, "stages": [1]}, [text])


@pytest.mark.parametrize("content", [b"- a\n- b\n", b"hello", b"a: \xe9", b"a:\n\tb: 1"])
def test_a_file_that_is_no_config_is_named(tmp_path, content):
    path = tmp_path / "conf.yaml"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"conf\.yaml"):
        load_config(path)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"speed": [1, "fast"]}, r"conf\.speed\[1\]: expected a number, found 'fast'"),
        ({"speed": "fast"}, r"conf\.speed: expected list, found 'fast'"),
        ({"tasks": "asr"}, r"conf\.tasks: expected Mapping or list, found 'asr'"),
        ({"weights": 3}, r"conf\.weights: expected Mapping, found 3"),
        ("fast", r"conf: expected a mapping of keys to values, found 'fast'"),
    ],
)
def test_a_value_of_another_kind_is_named_with_its_place(values, message):
    with pytest.raises(ConfigError, match=message):
        section(Settings, values, "conf")


def test_numbers_in_lists_and_either_of_two_kinds_are_taken():
    conf = section(Settings, {"speed": [1, "9e-1"], "tasks": ["asr"], "weights": {"asr": 1}}, "conf")
    assert (conf.speed, conf.tasks, conf.weights) == ([1.0, 0.9], ["asr"], {"asr": 1})
    assert section(Settings, {"tasks": {"asr": None}}, "conf").tasks == {"asr": None}


def test_what_builds_a_module_must_be_a_mapping():
    with pytest.raises(ConfigError, match="encoder_conf: expected a mapping of keys to values, found 5"):
        construct(Settings, 5, "encoder_conf")
