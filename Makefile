# Everything sets itself up: .venv is made from pyproject.toml and constraints.txt when needed.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
export HF_HUB_DISABLE_TELEMETRY := 1

.PHONY: demo test check bench docs fmt clean
demo: $(STAMP)
	$(BIN)/gradrank demo --out demo-out

test: $(STAMP)
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 8 --dist loadfile $(ARGS)

check: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright
	$(BIN)/lint-imports --no-cache

# The other allocators are installed here only; where they are missing, their rows are.
bench: $(STAMP)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[train,dev,docs,bench]"
	$(BIN)/python -m benchmarks $(ARGS)

# The site, in site/: a broken link, a page that nothing leads to, a missing name are errors.
docs: $(STAMP)
	$(BIN)/python -m sphinx -W -n --keep-going -q -b html -d site/.trees docs site/html
	GRADRANK_SITE=site/html HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q tests/test_docs.py tests/docs

fmt: $(STAMP)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[train,dev,docs]"
	touch $@

clean:
	rm -rf $(VENV) dist build site
