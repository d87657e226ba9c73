"""Importing the package registers its classes with FunASR, at no cost of its own."""

import subprocess
import sys

import pytest


def lines(code: str) -> list[str]:
    """What Python code prints in a process of its own."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip().splitlines()


def python(code: str) -> str:
    return lines(code)[-1]


def test_importing_us_does_not_import_funasr_or_transformers():
    loaded = python(
        "import sys, funasr_mooer; print([m for m in ('funasr', 'transformers', 'torch', 'peft') if m in sys.modules])"
    )
    assert loaded == "[]"


def test_our_models_are_found_without_the_seconds_that_funasr_takes():
    code = "import sys; from funasr_mooer.register import find; find('model_classes', 'U2ppMoE')"
    assert python(f"{code}; print('funasr' in sys.modules)") == "False"


def test_names_of_others_are_found_in_funasr_s_tables():
    from funasr_mooer.register import find, name_of

    frontend = find("frontend_classes", "WavFrontend")
    assert name_of("frontend_classes", frontend) == "WavFrontend"
    assert name_of("tokenizer_classes", find("tokenizer_classes", "MooerTokenizer")) == "MooerTokenizer"
    assert find("model_classes", "NobodysModel") is None


def test_every_class_is_in_funasrs_tables():
    from funasr.register import tables

    from funasr_mooer.register import CLASSES, find

    assert [name for table, name in CLASSES if getattr(tables, table).get(name) is not find(table, name)] == []


def test_looking_for_funasr_does_not_run_it_and_running_it_registers_us(tmp_path):
    (tmp_path / "funasr").mkdir()  # in the place of the real one, which takes seconds
    (tmp_path / "funasr/__init__.py").write_text("print('runs')")
    code = f"""
import importlib.util, sys
sys.path.insert(0, {str(tmp_path)!r})
from funasr_mooer import plugin
plugin._register = lambda: print("registered")
importlib.util.find_spec("funasr")
print("found")
import funasr
"""
    assert lines(code) == ["found", "runs", "registered"]


@pytest.mark.slow  # each imports FunASR in a process of its own
@pytest.mark.parametrize(
    "imports",
    [
        "import importlib.util, funasr_mooer; importlib.util.find_spec('funasr')",
        "import funasr; import funasr_mooer",
        "from funasr_mooer.register import find; find('encoder_classes', 'MooerParaformerEncoder')",
    ],
)
def test_classes_are_registered_in_whatever_order(imports):
    names = [
        ("model_classes", "MooER"),
        ("adaptor_classes", "MooerLinearAdapter"),
        ("decoder_classes", "LoRAQwenDecoder"),
        ("tokenizer_classes", "MooerTokenizer"),
    ]
    code = f"{imports}; from funasr.register import tables; print(*[n in getattr(tables, t) for t, n in {names}])"
    assert python(code) == "True True True True"


def test_a_name_that_is_taken_is_an_error():
    from funasr.register import tables

    from funasr_mooer.errors import ConfigError
    from funasr_mooer.register import register_all

    class Other:
        pass

    ours = tables.model_classes["MooER"]
    tables.model_classes["MooER"] = Other
    try:
        with pytest.raises(ConfigError, match="model_classes already has 'MooER'"):
            register_all()
    finally:
        tables.model_classes["MooER"] = ours
    register_all()
