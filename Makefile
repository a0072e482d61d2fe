# The two commands that matter: `make demo` and `make test`. Each sets up what it needs; the second run is quick.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
.DEFAULT_GOAL := help
.PHONY: help demo test test-slow test-clients test-remote soak check format bench bench-peers clean

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## /  \1 · /p' $(MAKEFILE_LIST) | awk -F' · ' '{printf "  %-12s %s\n", $$1, $$2}'

demo: $(VENV)/.run ## text from the bundled model, with a report of what its cache did, then the proof; and compressed
	@$(BIN)/kvist run --prompt "ROMEO:" --max-tokens 300 --temperature 0.7 --seed 1
	@$(BIN)/kvist verify
	@$(BIN)/kvist verify --kv turbo4

# Files run side by side, one thread each: half the time on two cores, and fixtures are made once for each file.
test: $(VENV)/.dev ## the whole suite, offline
	@OMP_NUM_THREADS=1 $(BIN)/pytest -m "not slow" --numprocesses auto --dist loadfile

test-slow: $(VENV)/.dev ## the tests that take minutes
	@$(BIN)/pytest -m slow

# Each group in an environment of its own, for what one wants another forbids.
test-clients: $(VENV)/.dev ## other people's clients against the server (installs them first, 3 GB)
	@echo "installing what the tests of clients need into $(VENV)"
	@$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[plots,dev,clients]'
	@for name in sdks chains agents aider; do \
	  test -x build/clients/$$name/bin/python || $(PYTHON) -m venv build/clients/$$name; \
	  echo "installing build/clients/$$name"; \
	  build/clients/$$name/bin/pip install --quiet --disable-pip-version-check --requirement tests/clients/requirements/$$name.txt || exit 1; \
	done
	@mkdir -p build/clients/npm && cp tests/clients/requirements/package.json build/clients/npm/
	@if command -v npm >/dev/null; then echo "installing build/clients/npm"; npm install --prefix build/clients/npm --no-audit --no-fund --silent; else echo "npm is not here: clients in JavaScript are left out"; fi
	@PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/pytest -m slow --durations 10 tests/server/test_lm_eval.py tests/server/test_too_long.py tests/clients

test-remote: $(VENV)/.dev ## the shared cache against a real Redis or Valkey (Debian's package redis-server)
	@command -v valkey-server redis-server >/dev/null || { echo "neither valkey-server nor redis-server is here; on Debian: apt-get install redis-server"; exit 1; }
	@$(BIN)/pytest -m slow tests/cache/test_remote.py

soak: $(VENV)/.dev ## twenty minutes of clients that behave badly (KVIST_SOAK_SECONDS changes how long)
	@$(BIN)/pytest -s -m slow tests/server/test_soak.py

check: $(VENV)/.dev ## lint, format, types, layers
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports --no-logo

format: $(VENV)/.dev ## apply the formatter and the safe fixes
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

bench: $(VENV)/.run ## the figures of the README
	@$(BIN)/kvist bench attention
	@$(BIN)/kvist bench decode
	@$(BIN)/kvist bench cache
	@$(BIN)/kvist bench serve

# Every part of llama.cpp with native flags: without them its own library of types is the slow part. Several minutes on
# two cores. What exports models for OpenVINO brings a torchvision that need not fit, and is not needed.
LLAMA_CPP_PYTHON := 0.3.36
OPENVINO := openvino-genai==2026.4.0.0 openvino==2026.4.0 optimum-intel==2.2.0 nncf==3.4.0 torch==2.13.0 transformers==5.5.4
bench-peers: ## llama.cpp and openvino-genai, each in an environment of its own, for kvist bench decode --peer
	@for name in llama.cpp openvino; do test -x build/peers/$$name/bin/python || $(PYTHON) -m venv build/peers/$$name; done
	@echo "building llama.cpp for this processor (once, several minutes)"
	@CMAKE_BUILD_PARALLEL_LEVEL=$$(nproc) CMAKE_ARGS="-DCMAKE_BUILD_TYPE=Release -DGGML_NATIVE=ON -DCMAKE_C_FLAGS=-march=native -DCMAKE_CXX_FLAGS=-march=native -DLLAVA_BUILD=OFF" build/peers/llama.cpp/bin/pip install --quiet --disable-pip-version-check --no-binary llama-cpp-python llama-cpp-python==$(LLAMA_CPP_PYTHON)
	@echo "installing openvino-genai (once)"
	@build/peers/openvino/bin/pip install --quiet --disable-pip-version-check $(OPENVINO)
	@build/peers/openvino/bin/pip uninstall --quiet --yes torchvision 2>/dev/null || true

clean: ## remove the environment and what tools left behind
	@rm -rf $(VENV) build .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache

# A virtual environment with the pinned run-time dependencies and the package itself, editable.
$(VENV)/.run: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; (3, 11) <= sys.version_info < (3, 14) or sys.exit("kvist needs Python 3.11 to 3.13, and $(PYTHON) is " + sys.version.split()[0] + "; choose another with make PYTHON=python3.12")'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing the pinned dependencies into $(VENV) (once)"
	@$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[plots]'
	@touch $@

$(VENV)/.dev: $(VENV)/.run
	@echo "installing the pinned test dependencies into $(VENV) (once)"
	@$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[plots,dev]'
	@touch $@
