# Two commands set everything up on a fresh machine: `make demo` and `make test`. Both work offline once installed.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
# GPU=1 installs onnxruntime-gpu instead of onnxruntime (never both: they overwrite each other).
ENGINE := $(if $(GPU),gpu,cpu)
OTHER_ENGINE := $(if $(GPU),cpu,gpu)
BIN := .venv/bin
RUN_STAMP := .venv/.installed-$(ENGINE)
TEST_STAMP := .venv/.installed-$(ENGINE)-test
export GRADIO_ANALYTICS_ENABLED := False

.DEFAULT_GOAL := help
.PHONY: help demo docs test test-slow test-triton test-tensorrt test-perf-analyzer bench-exports check format lint types bench bench-training bench-training-peer bench-training-gpu bench-views bench-curation bench-evaluators bench-serving bench-serving-peers reliability clean

help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 12

demo: $(RUN_STAMP)  ## install, start the server with the bundled checkpoint and the demo page, print the URLs
	$(BIN)/python app.py $(DEMO_ARGS)

test: $(TEST_STAMP) lint types docs  ## install, then everything CI runs: lint, import direction, types, documentation, tests
	$(BIN)/python -m pytest $(PYTEST_ARGS)

docs: $(TEST_STAMP)  ## the documentation as a site in build/site; a warning or a broken link ends it
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict

test-slow: $(TEST_STAMP)  ## the long checks that `make test` leaves out
	$(BIN)/python -m pytest -m slow $(PYTEST_ARGS)

# Big packages that pin what the others may not have: an environment of their own each, outside the tree.
VENVS := $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/dinoscope/venvs
TRITON_PACKAGES := nvidia-pytriton==0.7.0 "onnxruntime<1.24" "pillow==12.3.0"
TENSORRT_PACKAGES := tensorrt-rtx-cu13-libs==1.7.1.116 tensorrt-rtx-cu13-bindings==1.7.1.116 numpy

test-triton: $(TEST_STAMP) $(VENVS)/triton/.installed  ## exported repositories inside a real Triton (downloads it once, 60 MB)
	$(BIN)/python -m pytest -m triton $(PYTEST_ARGS)

test-tensorrt: $(TEST_STAMP) $(VENVS)/trtx/.installed  ## exported graphs through TensorRT-RTX's parser and builder (downloads it once, 95 MB)
	$(BIN)/python -m pytest -m tensorrt $(PYTEST_ARGS)

test-perf-analyzer: $(TEST_STAMP) $(VENVS)/perf_analyzer/perf_analyzer  ## NVIDIA's load generator on our server (downloads it once, 14 MB)
	$(BIN)/python -m pytest -m perf_analyzer $(PYTEST_ARGS)

$(VENVS)/perf_analyzer/perf_analyzer: tests/server/install_perf_analyzer.sh
	tests/server/install_perf_analyzer.sh $(BIN)/python $(VENVS)/perf_analyzer

# OpenCV 5 asks for NumPy 2 and runs with 1.26, which this server's wheel pins; equal decoders are the point of the test.
$(VENVS)/triton/.installed: Makefile
	$(PYTHON) -m venv $(VENVS)/triton
	$(VENVS)/triton/bin/python -m pip install -q --disable-pip-version-check $(TRITON_PACKAGES)
	$(VENVS)/triton/bin/python -m pip install -q --disable-pip-version-check --no-deps -c constraints.txt opencv-python-headless
	@touch $@

$(VENVS)/trtx/.installed: Makefile
	$(PYTHON) -m venv $(VENVS)/trtx
	$(VENVS)/trtx/bin/python -m pip install -q --disable-pip-version-check $(TENSORRT_PACKAGES)
	@touch $@

$(VENVS)/schemathesis/.installed: benchmarks/peers/schemathesis.txt
	$(PYTHON) -m venv $(VENVS)/schemathesis
	$(VENVS)/schemathesis/bin/python -m pip install -q --disable-pip-version-check -r benchmarks/peers/schemathesis.txt
	@touch $@

PEERS := kserve mlserver litserve

$(foreach peer,$(PEERS),$(VENVS)/$(peer)/.installed): $(VENVS)/%/.installed: benchmarks/peers/%.txt
	$(PYTHON) -m venv $(VENVS)/$*
	$(VENVS)/$*/bin/python -m pip install -q --disable-pip-version-check -r $<
	@touch $@

check: $(TEST_STAMP)  ## formatting, then everything `make test` does
	$(BIN)/ruff format --check .
	$(MAKE) test

format: $(TEST_STAMP)  ## rewrite the sources in the common format
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

lint: $(TEST_STAMP)  ## ruff, and the check that imports point up the stream
	$(BIN)/ruff check .
	$(BIN)/lint-imports --no-cache

types: $(TEST_STAMP)  ## mypy over all rooms
	$(BIN)/mypy

bench: $(TEST_STAMP)  ## every performance figure of the README, as ratios measured in one run
	$(BIN)/python -m benchmarks.runtimes
	$(BIN)/python -m benchmarks.serving --part two-blocks

bench-exports: $(TEST_STAMP)  ## exported files beside the engine's bare matrix product and a plain export; what an export needs
	$(BIN)/python -m benchmarks.exports

bench-training: $(TEST_STAMP)  ## what a training step reaches of the machine's matrix product rate, and its memory; bfloat16 beside float32
	$(BIN)/python -m benchmarks.training
	$(BIN)/python -m benchmarks.narrow

bench-evaluators: $(TEST_STAMP)  ## evaluators beside the products they need, faiss and scikit-learn
	$(BIN)/python -m benchmarks.evaluators

bench-training-peer:  ## the environment of what training is measured beside (large)
	$(PYTHON) -m venv benchmarks/peers/.venv
	benchmarks/peers/.venv/bin/python -m pip install -q --disable-pip-version-check -r benchmarks/peers/lightly_train.txt

bench-training-gpu: $(TEST_STAMP)  ## check training on a GPU, then images/s, MFU and peak memory of ViT-S, B and L
	$(BIN)/python -m benchmarks.training_gpu

bench-curation: $(TEST_STAMP)  ## near-duplicate removal beside the bare search of the same vectors, up to a million
	$(BIN)/python -m benchmarks.curation

bench-views: $(TEST_STAMP)  ## CPU time of an image's views: Pillow, our workers, and workers that only decode
	$(BIN)/python -m benchmarks.views

bench-serving: $(TEST_STAMP)  ## what serving costs beside the bare runtime and a real Triton, and what becomes of overload
	$(BIN)/python -m benchmarks.serving

bench-serving-peers: $(TEST_STAMP) $(VENVS)/triton/.installed $(foreach peer,$(PEERS),$(VENVS)/$(peer)/.installed)  ## requests without compute beside Triton, KServe's SDK, MLServer and LitServe (downloads them once, 300 MB)
	$(BIN)/python -m benchmarks.serving --part peers --rounds 3

reliability: $(TEST_STAMP) $(VENVS)/schemathesis/.installed  ## hostile requests, reloads, stalling clients, a full disk, SIGTERM (20 minutes)
	$(BIN)/python -m benchmarks.reliability

clean:  ## remove the virtual environment and all caches
	rm -rf .venv .cache .mypy_cache .ruff_cache .pytest_cache .hypothesis *.egg-info build

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "error: $(PYTHON) is older than Python 3.11; run: make PYTHON=/path/to/python3.11 ..." >&2; exit 2; }
	$(PYTHON) -m venv .venv

# Whoever changes the engine loses both first, because taking one away breaks the other's files.
define drop_other_engine
	@if ls .venv/.installed-$(OTHER_ENGINE)* >/dev/null 2>&1; then \
		$(BIN)/python -m pip uninstall -qq -y onnxruntime onnxruntime-gpu && rm -f .venv/.installed-*; fi
endef

$(RUN_STAMP): $(BIN)/python pyproject.toml constraints.txt
	$(drop_other_engine)
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e ".[$(ENGINE)]"
	@touch $@

$(TEST_STAMP): $(BIN)/python pyproject.toml constraints.txt
	$(drop_other_engine)
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e ".[$(ENGINE),test,dev]"
	@touch $(RUN_STAMP) $@
