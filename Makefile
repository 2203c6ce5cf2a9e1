# make demo   set up .venv and run the main job (about ten minutes)
# make test   set up .venv if needed, lint, type-check, test; ORDER=7 for a random order
# make check  lint, formatting and type-check only; make browser Debian's Chromium for the browser tests, if it is not there
# make readers transformers 4.57 in .venv-readers for the tests of what older readers make of an artifact
# make coverage which lines the tests reach
# make bench [NAME=…] the benchmarks; make docs the pictures and generated pages
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PIP := PIP_DISABLE_PIP_VERSION_CHECK=1 $(BIN)/pip --quiet
export OMP_WAIT_POLICY := PASSIVE
export MLFLOW_DISABLE_TELEMETRY := true

.PHONY: demo test check coverage install browser readers bench docs clean

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "paretune needs Python 3.11 or newer: make PYTHON=python3.11 …")'
	@echo "setting up $(VENV) (a few minutes the first time)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(PIP) install -c constraints.txt "setuptools<81" wheel
	@$(PIP) install -c constraints.txt torch==2.13.0
	@$(PIP) install -c constraints.txt --no-build-isolation -e ".[dev]"
	@touch $(STAMP)

demo: install
	$(BIN)/paretune search --preset quick

check: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Without a browser the tests of pages skip; in CI they fail.
browser:
	-@scripts/install_browser.sh

# The oldest transformers that must read an artifact's hf/, as a folder of packages before the installed ones.
readers: install
	@scripts/install_readers.sh $(BIN)/python .venv-readers

# First what can run beside other work, on two processes; then, alone, what times things or searches against the clock.
# ORDER=7 runs files and their tests in a random order, the same for the same number.
RANDOM_ORDER = $(if $(ORDER),-p randomly --randomly-seed=$(ORDER) --randomly-dont-reset-seed)

test: check browser readers
	$(BIN)/python -m pytest -m "not machine" -n 2 --dist loadfile --no-loadscope-reorder $(RANDOM_ORDER)
	$(BIN)/python -m pytest -m machine $(RANDOM_ORDER)

# Which lines of the package the tests reach; what runs in processes of its own does not count.
coverage: install
	$(BIN)/python -m pytest -m "not machine" -n 2 --dist loadfile --no-loadscope-reorder --cov=paretune --cov-report=term:skip-covered

bench: install
	$(BIN)/python -m benchmarks.run $(NAME)

docs: install
	@$(PIP) install -c constraints.txt -e ".[docs]" --no-build-isolation
	$(BIN)/python docs/make_cli.py
	$(BIN)/python docs/make_api.py
	$(BIN)/python docs/make_models.py
	-$(BIN)/python docs/make_joint_pictures.py
	-$(BIN)/python docs/make_targets_picture.py
	$(BIN)/python docs/make_methods.py
	$(BIN)/python docs/make_pictures.py
	PARETUNE_PICTURES=1 PARETUNE_PICTURES_HOME=mlruns $(BIN)/python -m pytest tests/browser/test_mlflow_ui.py

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache build dist
