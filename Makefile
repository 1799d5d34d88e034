# `make` alone lists the targets. PYTHON=/path/to/python3 chooses the interpreter, ARGS="..." is passed on.
PYTHON ?= python3 python3.13 python3.12 python3.11 python3.10
BIN := .venv/bin
PIP := $(BIN)/pip install --quiet --disable-pip-version-check --no-input
RECIPE ?= glyphs_pretrain
RUNS ?=
COMPILED := $(wildcard vizattn/attention/csrc/*)

.DEFAULT_GOAL := help
.PHONY: help demo vtab-mini test test-slow faults timm-suite bench lint format cards docs docs-serve notebooks \
	wheel-smoke pretrain clean

help:  ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' Makefile

demo: .venv/.installed  ## Adapt a pretrained backbone to handwritten digits by six methods
	$(BIN)/vizattn demo $(ARGS)

vtab-mini: .venv/.installed  ## Compare six methods on eight small tasks that need no download
	$(BIN)/vizattn vtab run --suite vtab-mini --out work_dirs/vtab-mini --workers 2 --seeds 3 \
		--adapter linear_probe efficient_probing vpt apla hst full $(ARGS)

test: .venv/.installed-test  ## Run the tests
	$(BIN)/python -m pytest $(ARGS)

test-slow: .venv/.installed-test .venv/.installed-docs  ## Run the tests that take long
	$(BIN)/python -m pytest -m slow $(ARGS)

faults: .venv/.installed-test  ## Kill, starve and damage commands and files, and count what is lost (10 minutes)
	PYTHONPATH=tools $(BIN)/python -m faults $(ARGS)

timm-suite: .venv/.installed-test  ## Run timm's own model tests on our backbones
	$(BIN)/python tools/timm_suite.py $(ARGS)

bench: .venv/.installed  ## Measure all of docs/performance.md (hours on a quiet machine), or some: RUNS="ops growth"
	$(BIN)/python tools/measure_performance.py $(RUNS) $(ARGS)

lint: .venv/.installed-test  ## Check style, formatting and types, and that the model cards are up to date
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python tools/make_cards.py --check

format: .venv/.installed-test  ## Format the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

cards: .venv/.installed  ## Write the model cards and the index of the zoo from what is registered and measured
	$(BIN)/python tools/measure_zoo.py cost
	$(BIN)/python tools/make_cards.py

docs: .venv/.installed-docs  ## Build the documentation into site/; fails on a broken link
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet $(ARGS)

docs-serve: .venv/.installed-docs  ## Show the documentation at http://127.0.0.1:8000 while you write
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs serve $(ARGS)

notebooks: .venv/.installed-docs  ## Run the notebooks, with their outputs into work_dirs/notebooks
	$(BIN)/python tools/run_notebooks.py $(ARGS)

wheel-smoke: .venv/.installed-test  ## Build the wheel and use it from a fresh environment elsewhere
	.ci/wheel_smoke.sh $(BIN)/python

pretrain: .venv/.installed  ## Rebuild the weights that ship with a nano size: RECIPE=glyphs_nat_nano, ... (default: the ViT's)
	$(BIN)/vizattn train classification/$(RECIPE) --work-dir work_dirs/$(RECIPE) $(ARGS)
	$(BIN)/python tools/pack_weights.py work_dirs/$(RECIPE)

clean:  ## Remove what the other targets made, but for work_dirs
	rm -rf .venv build dist site *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# pip comes last into a new environment: one that was interrupted is made again.
$(BIN)/pip:
	@for python in $(PYTHON); do \
		if $$python -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 10))' >/dev/null 2>&1; then \
			echo "Making .venv with $$($$python --version)"; \
			exec $$python -m venv .venv; \
		fi; \
	done; \
	echo "No Python 3.10 or newer with venv among: $(PYTHON)." >&2; \
	echo "Install one (Debian and Ubuntu: apt install python3-venv) or name it: make PYTHON=/path/to/python3 ..." >&2; \
	exit 1

.venv/.installed: pyproject.toml $(COMPILED) | $(BIN)/pip
	@echo "Installing vizattn into .venv (minutes the first time: torch is large)"
	@$(PIP) --editable .
	@$(BIN)/python tools/editable_first.py
	@touch $@

.venv/.installed-test: pyproject.toml $(COMPILED) | $(BIN)/pip
	@echo "Installing vizattn and its test tools into .venv (minutes the first time: torch is large)"
	@$(PIP) --editable '.[test]'
	@$(BIN)/python tools/editable_first.py
	@touch $@ .venv/.installed

.venv/.installed-docs: pyproject.toml .venv/.installed
	@echo "Installing what the documentation and the notebooks need into .venv"
	@$(PIP) --editable '.[docs,notebooks]'
	@touch $@
