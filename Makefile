# make run    the main job, about 20 seconds, on 4 GiB of disk and 2 GiB of memory
# make test   all tests
# make bench  the project's own measurements against fio (Debian package: fio)
PYTHON ?= python3
VENV   := .venv
# Tests are run by so many processes, a file by one of them.
TEST_PROCESSES ?= 2
BIN    := $(VENV)/bin

.PHONY: run test lint format bench clean

run: $(VENV)/.installed
	$(BIN)/mlpstorage kvcache run --model tiny-1b --num-users 64 --generation-mode fast \
	  --prefill-tokens-per-s 20000 --decode-tokens-per-s 50 --duration 14 --warmup 3 --gpu-mem-gb 0 --cpu-mem-gb 0.25 --storage-gb 3

test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest --numprocesses $(TEST_PROCESSES) --dist loadfile

lint: $(VENV)/.installed-dev
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/mypy

format: $(VENV)/.installed-dev
	$(BIN)/ruff format
	$(BIN)/ruff check --fix

bench: $(VENV)/.installed-dev
	@command -v fio >/dev/null || { echo "make bench needs fio (Debian: apt-get install fio)" >&2; exit 1; }
	@status=0; for one in client storage engines merge ranks trials; do \
	  echo "bench/$$one.py"; $(BIN)/python bench/$$one.py || status=1; done; exit $$status

clean:
	rm -rf $(VENV) build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis

$(VENV)/.python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "mlpstorage needs Python 3.11 or later, $(PYTHON) is $$($(PYTHON) --version 2>&1); try: make PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV) || \
	  { rm -rf $(VENV); echo "$(PYTHON) cannot make a virtual environment (Debian: apt-get install python3-venv)" >&2; exit 1; }
	$(BIN)/python -m pip install --quiet --upgrade pip
	@touch $@

$(VENV)/.installed: $(VENV)/.python pyproject.toml
	$(BIN)/python -m pip install --quiet --editable .
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --editable '.[all]' --group dev
	@touch $@
