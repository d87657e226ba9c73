"""Importing the package registers its classes with FunASR, at no cost of its own."""

import subprocess
import sys

import pytest


def python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip().splitlines()[-1]


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


LOOK_FOR_FUNASR = "import importlib.util, funasr_mooer; importlib.util.find_spec('funasr')"
ENCODER_OF_FUNASRS_LAYERS = "from funasr_mooer.register import find; find('encoder_classes', 'MooerParaformerEncoder')"


@pytest.mark.parametrize(
    "imports",
    [
        f"{LOOK_FOR_FUNASR}; {ENCODER_OF_FUNASRS_LAYERS}",
        pytest.param(LOOK_FOR_FUNASR, marks=pytest.mark.slow),  # each of these imports FunASR in a process of its own
        pytest.param("import funasr; import funasr_mooer", marks=pytest.mark.slow),
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
