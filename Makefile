# The commands of the README. Everything runs in .venv, which any of them creates on first use.

PYTHON ?= python3
BIN := .venv/bin
PYTEST := $(BIN)/python -m pytest -n 2 --dist loadfile

.PHONY: quickstart test test-all lint comfy docs

quickstart: .venv/installed
	$(BIN)/python tools/quickstart.py

test: .venv/installed-dev
	$(PYTEST) -m "not slow"

test-all: .venv/installed-dev
	$(PYTEST)

lint: .venv/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

comfy: .venv/installed-dev
	$(BIN)/python tools/fetch_comfy.py

docs: .venv/installed-dev
	$(BIN)/python -m library.config.reference

.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/installed: .venv/bin/python requirements.txt
	$(BIN)/python -m pip install --quiet -r requirements.txt
	touch $@

.venv/installed-dev: .venv/installed requirements-dev.txt
	$(BIN)/python -m pip install --quiet -r requirements-dev.txt
	touch $@
