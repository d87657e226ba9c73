# What to type: make help
SHELL := bash
.DEFAULT_GOAL := help
.PHONY: help setup demo demo-u2pp test lint bench

VENV ?= .venv
PYTHON ?= python3
export VENV
bin := $(abspath $(VENV))/bin
shell_scripts = setup.sh .ci/run $(wildcard egs/common/*.sh egs/*/*/*.sh)

help: ## say what there is to make
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / { printf "  make %-9s %s\n", $$1, $$2 }' Makefile

setup: ## .venv with everything the rest needs; an existing torch is kept (about 3 minutes, once)
	@PYTHON=$(PYTHON) bash setup.sh

demo: setup ## synthesise speech, train MooER on it, decode and score: egs/mini/mooer, offline, on a CPU
	@PYTHON=$(bin)/python bash egs/mini/mooer/run.sh

demo-u2pp: setup ## the same speech for U2++ MoE beside its dense twin, streaming and not: egs/mini/u2pp_moe
	@PYTHON=$(bin)/python bash egs/mini/u2pp_moe/run.sh

test: setup ## every test that takes seconds (pytest -m slow runs the others)
	@$(bin)/python -m pytest -q -n 2 --dist worksteal

lint: setup ## ruff check, ruff format --check, shellcheck
	@$(bin)/ruff check -q . && $(bin)/ruff format --check -q .
	@$(bin)/shellcheck -x $(shell_scripts)
	@echo "lint         clean"

bench: setup ## every benchmark: each prints ratios measured in one run
	@for file in benchmarks/*.py; do echo "== $$file"; $(bin)/python $$file || exit 1; done
