"""Overrides on the command line."""

from funasr_mooer.config import override


def test_overrides_reach_into_sections_lists_and_what_is_not_there_yet():
    config = {"a": {"b": 1}, "stages": [{"steps": 1}, {"steps": 2}], "size": "${a.b}"}
    found = override(config, ["++a.b=3", "++stages.1.steps=5", "++new.key=[x, y]", "++a.c={d: 1e-4}", "++e="])
    assert found["a"] == {"b": 3, "c": {"d": 1e-4}}
    assert found["stages"] == [{"steps": 1}, {"steps": 5}]
    assert found["new"] == {"key": ["x", "y"]}
    assert found["size"] == 3
