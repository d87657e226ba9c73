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


def test_the_encoder_made_of_funasrs_layers_is_found_first_of_all():
    code = "from funasr_mooer.register import find; find('encoder_classes', 'MooerParaformerEncoder')"
    assert python(f"{code}; from funasr.register import tables; print('MooER' in tables.model_classes)") == "True"


def test_names_of_others_are_found_in_funasr_s_tables():
    from funasr_mooer.register import find, name_of

    frontend = find("frontend_classes", "WavFrontend")
    assert name_of("frontend_classes", frontend) == "WavFrontend"
    assert name_of("tokenizer_classes", find("tokenizer_classes", "MooerTokenizer")) == "MooerTokenizer"
    assert find("model_classes", "NobodysModel") is None


@pytest.mark.parametrize(
    "imports",
    [
        "import funasr_mooer, importlib.util; importlib.util.find_spec('funasr'); from funasr.register import tables",
        pytest.param("import funasr; import funasr_mooer; from funasr.register import tables", marks=pytest.mark.slow),
    ],
)
def test_classes_are_registered_in_whatever_order(imports):
    found = python(
        imports + "; print('MooER' in tables.model_classes, 'MooerLinearAdapter' in tables.adaptor_classes,"
        " 'LoRAQwenDecoder' in tables.decoder_classes, 'MooerTokenizer' in tables.tokenizer_classes)"
    )
    assert found == "True True True True"


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
