# Everything happens in .venv; a machine needs Python 3.11, make and a package index.
PYTHON ?= python3.11
BIN := .venv/bin

DATA ?= Anthropic/hh-rlhf:harmless-base

.PHONY: demo test check parity notebook bench load fuzz results plan-check setup setup-parity setup-notebook setup-plan

demo: setup
	$(BIN)/meetjax demo

test: setup
	$(BIN)/python -m pytest tests --ignore tests/parity -n auto --maxprocesses 4 --max-worker-restart 0 --dist loadfile

check: setup
	$(BIN)/ruff format --check meetjax experiments tests
	$(BIN)/ruff check meetjax experiments tests
	$(BIN)/pyright

parity: setup-parity
	$(BIN)/python -m pytest tests/parity

notebook: setup-notebook
	MEETJAX_STEPS=2 MEETJAX_LONGEST=24 $(BIN)/python -m pytest --nbmake --nbmake-timeout=600 experiments/colab_demo.ipynb

bench: setup-parity
	$(BIN)/python experiments/bench/bench.py --data $(DATA)

load: setup-parity
	$(BIN)/python experiments/bench/load.py $(if $(LLAMA),--llama-server $(LLAMA))

fuzz: setup
	FUZZ=400 $(BIN)/python -m pytest tests/serve/test_fuzz.py -s

results: setup
	$(BIN)/python experiments/results.py

plan-check: setup-plan
	$(BIN)/python experiments/plan_check.py

setup: .venv/installed

setup-parity: .venv/installed-parity

setup-plan: .venv/installed-plan

setup-notebook: .venv/installed-notebook

.venv/installed: requirements.txt pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv || python3 -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --editable .
	touch $@

.venv/installed-parity: .venv/installed requirements-parity.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-parity.txt
	touch $@

.venv/installed-plan: .venv/installed requirements-plan.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c requirements.txt -r requirements-plan.txt
	touch $@

.venv/installed-notebook: .venv/installed requirements-notebook.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-notebook.txt
	touch $@
