# `make demo` and `make test` set up everything they need in .venv.
PYTHON ?= python3
BIN := .venv/bin
# A pretend accelerator changes what torch and its libraries see of the machine, so its tests have processes of their own.
CORES := --numprocesses auto --maxprocesses 4 --dist loadfile

.PHONY: demo test test-oldest check check-style docs browser clean

demo: .venv/ready
	$(BIN)/parewell demo

test: .venv/ready-dev browser
	$(BIN)/python -m pytest $(CORES) --ignore tests/device
	$(BIN)/python -m pytest $(CORES) tests/device

# The suite on the oldest versions that pyproject.toml allows, in a venv of its own. On Linux torch 2.11 brings CUDA
# libraries along, so this takes 6 GB.
test-oldest: .venv-oldest/ready browser
	.venv-oldest/bin/python -m pytest $(CORES) --ignore tests/device
	.venv-oldest/bin/python -m pytest $(CORES) tests/device

check: test check-style docs

check-style: .venv/ready-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The pages of docs/ and of docstrings, into site/; warnings are errors.
docs: .venv/ready-dev
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet

# Tests look at the reports' pages in Chromium. Where there is none, root on a Debian gets one (unless it takes more than
# five minutes to fetch); everywhere else those tests skip, saying so.
browser:
	@for name in chromium chromium-browser google-chrome google-chrome-stable; do \
	  command -v $$name >/dev/null && exit; \
	done; \
	get="apt-get -qq -y --no-install-recommends install chromium fonts-dejavu-core"; \
	export DEBIAN_FRONTEND=noninteractive; \
	{ [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && echo "installing Chromium, to look at pages with" && \
	  { timeout 300 apt-get -qq update && timeout 300 $$get --download-only && $$get; } >/dev/null 2>&1; } || \
	  echo "no Chromium here: tests of pages in a browser will skip"

.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "parewell needs Python 3.11 or newer")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable .
	touch $@

.venv/ready-dev: .venv/ready
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

.venv-oldest/ready: pyproject.toml constraints-oldest.txt
	$(PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/python -m pip install --quiet --constraint constraints-oldest.txt --editable '.[test]'
	touch $@

clean:
	rm -rf .venv .venv-oldest site parewell-demo
