#!/usr/bin/env bash
# Makes .venv with this package and everything that demo, tests and training need. Run again it only does what is new.
#   bash setup.sh
#   PYTHON=python3.11 VENV=/somewhere/venv bash setup.sh
#
# Which torch: one that $PYTHON can import (a vendor's MUSA image, a CUDA image) is kept as it is; else, beside an
# NVIDIA driver, the newest that pip offers; else the one of constraints/cpu.txt. torch comes first and stays pinned,
# because peft and deepspeed would otherwise fetch a build of their own choice.
set -euo pipefail
cd "$(dirname "$0")"

PYTHON=${PYTHON:-python3}
VENV=${VENV:-.venv}
EXTRAS=train,score,mini,test
log_file=$VENV/setup.log
start=$SECONDS

say() { printf 'setup        %s\n' "$*"; }

die() {
  printf 'setup        error: %s\n' "$*" >&2
  exit 1
}

# install TITLE PIP_ARGUMENT...: pip, quiet but alive; all that it says goes to the log. Files are compiled when they are
# first imported: most never are.
install() {
  local title=$1
  shift
  say "$title"
  if ! "$VENV/bin/python" -m pip install --disable-pip-version-check --no-compile "$@" 2>&1 | tee -a "$log_file" | progress; then
    tail -n 20 "$log_file" >&2
    die "pip failed; all it said is in $log_file"
  fi
}

# pip's lines -> the package at hand: on a terminal in one changing line, elsewhere every 25th
progress() {
  local line count=0
  while IFS= read -r line; do
    case $line in
      Collecting* | "Requirement already satisfied"*) count=$((count + 1)) ;;
      "Installing collected packages"*) say "  unpacking ..." && continue ;;
      *) continue ;;
    esac
    line=${line#Collecting }
    line=${line#Requirement already satisfied: }
    line=${line%% *}
    if [ -t 1 ]; then
      printf '\r\033[Ksetup          %s packages: %s' "$count" "${line%%[<>=!~;(]*}"
    elif ((count % 25 == 0)); then
      say "  $count packages looked at"
    fi
  done
  if [ -t 1 ]; then printf '\r\033[K'; fi
}

# The version of a torch that $PYTHON can really import, or nothing.
existing_torch() {
  "$PYTHON" -W ignore -c 'import torch; print(torch.__version__)' 2>/dev/null || true
}

older_than() { [ "$1" != "$2" ] && [ "$(printf '%s\n' "$1" "$2" | sort -V | head -n 1)" = "$1" ]; }

command -v "$PYTHON" >/dev/null || die "no '$PYTHON' here; install Python 3.10 or newer, or name one: PYTHON=python3.11 make setup"
version=$("$PYTHON" -c 'import platform; print(platform.python_version())')
if older_than "$version" 3.10; then
  die "'$PYTHON' is Python $version, this needs 3.10 or newer: PYTHON=python3.11 make setup"
fi

# Done before, and nothing that decides about it has changed since?
stamp=$VENV/.setup-done
state=$(cat setup.sh setup.cfg pyproject.toml constraints/*.txt | cksum)
state="$state $PWD $version"
if [ -x "$VENV/bin/python" ] && [ "$(cat "$stamp" 2>/dev/null)" = "$state" ]; then
  say "$VENV is up to date"
  exit 0
fi

torch=$(existing_torch)
if [ ! -x "$VENV/bin/python" ]; then
  say "$VENV with Python $version"
  options=()
  if [ -n "$torch" ]; then options=(--system-site-packages); fi
  "$PYTHON" -m venv "${options[@]}" "$VENV" ||
    { rm -rf "$VENV" && die "'$PYTHON -m venv' failed; on Debian and Ubuntu: apt install python3-venv"; }
fi
rm -f "$stamp"
: >"$log_file"

pins=$VENV/constraints.txt
if [ -n "$torch" ]; then
  if older_than "$torch" 2.4; then die "torch $torch of '$PYTHON' is too old, this needs 2.4 or newer"; fi
  # A torch inside another virtual environment is not a "system" package; name its folder.
  if ! "$VENV/bin/python" -W ignore -c 'import torch' 2>/dev/null; then
    site=$("$VENV/bin/python" -c 'import site; print(site.getsitepackages()[0])')
    "$PYTHON" -W ignore -c 'import pathlib, torch; print(pathlib.Path(torch.__file__).parents[1])' >"$site/existing_torch.pth"
  fi
  "$VENV/bin/python" -c 'import importlib.metadata as m; print("torch==" + m.version("torch"))' >"$pins"
  if older_than "$torch" 2.6; then cat constraints/musa.txt >>"$pins"; fi
  say "torch $torch is here already and stays"
elif command -v nvidia-smi >/dev/null; then
  grep -v '^torch==' constraints/cpu.txt >"$pins"
  install "torch for this NVIDIA driver (several GB)" -c "$pins" torch
else
  cp constraints/cpu.txt "$pins"
  install "torch for the CPU" -c "$pins" torch
fi
if [ -z "$torch" ]; then
  "$VENV/bin/python" -c 'import importlib.metadata as m; print("torch==" + m.version("torch"))' >>"$pins"
fi
install "funasr, transformers, peft, deepspeed, ... (about 2 minutes)" -c "$pins" -e ".[$EXTRAS]"

"$VENV/bin/python" -W ignore -c 'import funasr_mooer, torch, transformers, peft; print("setup        torch", torch.__version__)'
printf '%s' "$state" >"$stamp"
say "done after $((SECONDS - start)) s: $VENV/bin/python"
