"""`funasr-mooer doctor` finds what breaks, says what to do, and fails only for what we cannot do without."""

import sys

import pytest
from packaging.requirements import Requirement

from funasr_mooer.bin import doctor
from funasr_mooer.bin.doctor import Check


def test_a_check_is_one_line_with_its_advice():
    assert str(Check("warn", "ffmpeg", "not found", "install it")) == "warn ffmpeg             not found - install it"
    assert str(Check("ok", "disk", "9 GiB")) == "ok   disk               9 GiB"


@pytest.mark.parametrize(("status", "code"), [("ok", 0), ("warn", 0), ("FAIL", 1)])
def test_only_a_failed_check_fails_the_tool(monkeypatch, capsys, status, code):
    monkeypatch.setattr(doctor, "checks", lambda: iter([Check("ok", "a", "1"), Check(status, "b", "2")]))
    assert doctor.main([]) == code
    assert len(capsys.readouterr().out.splitlines()) == 2


@pytest.mark.parametrize(
    ("requirement", "extra", "status", "words"),
    [
        ("numpy>=1.0", "", "ok", ""),
        ("numpy>=99", "", "FAIL", "pip install 'numpy>=99'"),
        ("no-such-package-here>=1", "", "FAIL", "pip install 'no-such-package-here>=1'"),
        ("no-such-package-here>=1", "demo", "warn", "funasr-mooer[demo]"),
    ],
)
def test_a_requirement_fails_unless_only_an_extra_needs_it(requirement, extra, status, words):
    check = doctor.package(Requirement(requirement), extra, tested="")
    assert check.status == status
    assert words in check.advice


def test_a_version_other_than_the_tested_one_is_mentioned(tmp_path, monkeypatch):
    (tmp_path / "cpu.txt").write_text("# pins\nnumpy==1.0.1\nKaldi_Native.Fbank==1.20\n")
    monkeypatch.setattr(doctor, "CONSTRAINTS", tmp_path)
    assert doctor.tested_versions() == {"numpy": "1.0.1", "kaldi-native-fbank": "1.20"}
    assert doctor.package(Requirement("numpy"), "", "1.0.1").value.endswith("(tested with 1.0.1)")


@pytest.mark.parametrize(
    ("source", "status"), [("raise OSError('libtorch_cuda.so')", "FAIL"), ("__version__ = '2.0'", "ok")]
)
def test_a_torchaudio_that_does_not_load_is_found_without_loading_it_here(tmp_path, monkeypatch, source, status):
    (tmp_path / "torchaudio").mkdir()
    (tmp_path / "torchaudio" / "__init__.py").write_text(source)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.syspath_prepend(tmp_path)
    (check,) = doctor.torchaudio()
    assert check.status == status
    if status == "FAIL":
        assert "OSError: libtorch_cuda.so" in check.value
        assert "pip uninstall torchaudio" in check.advice


@pytest.mark.parametrize(
    ("told", "statuses"),
    [
        ((True, "51 13 registered"), ["ok", "ok"]),
        ((True, "8 0 registered"), ["FAIL", "ok"]),
        ((True, "51 13 ConfigError: two plugins"), ["ok", "FAIL"]),
        ((False, "ImportError: x"), ["FAIL"]),
    ],
)
def test_a_gutted_funasr_or_an_absent_plugin_fails(monkeypatch, told, statuses):
    monkeypatch.setattr(doctor, "probe", lambda code: told)
    assert [check.status for check in doctor.funasr()] == statuses


def test_a_probe_survives_a_crash_and_a_hang():
    assert doctor.probe("print('a'); print('b')") == (True, "b")
    assert doctor.probe("import os; os.abort()")[0] is False
    assert doctor.probe("import time; time.sleep(9)", timeout_s=0.3) == (False, "no answer in 0 s")


def test_a_driver_without_a_torch_that_uses_it_is_pointed_out(monkeypatch):
    monkeypatch.setattr(doctor, "driver_of", lambda kind: "550.54" if kind == "cuda" else "")
    monkeypatch.setattr("funasr_mooer.device.is_available", lambda kind: kind == "cpu")
    (line,) = [check for check in doctor.torch_and_devices() if check.name == "cuda driver"]
    assert line.status == "warn"
    assert "torch sees no cuda device" in line.advice


def test_a_torch_that_does_not_load_is_one_failed_check(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    (check,) = doctor.torch_and_devices()
    assert (check.status, check.name) == ("FAIL", "torch build")
    assert "import of torch halted" in check.value
    assert "reinstall torch" in check.advice


def test_the_quick_checks_pass_where_the_tests_run():
    checks = [*doctor.python(), *doctor.packages(), *doctor.torch_and_devices(), *doctor.audio(), *doctor.commands()]
    assert [str(check) for check in checks if check.status == "FAIL"] == []


@pytest.mark.slow
def test_the_whole_doctor_finds_this_machine_healthy(capsys):
    assert doctor.main([]) == 0, capsys.readouterr().out
