# A bare machine needs Python 3.11 or 3.12 with pip, make and git. Everything else comes into .venv.
FITS := import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))
PYTHON ?= $(shell for p in python3.11 python3.12 python3; do \
	$$p -c '$(FITS)' 2>/dev/null && echo $$p && break; done)
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.ready
LOCKS := requirements.lock requirements-nodeps.lock pyproject.toml

.PHONY: setup demo test check audit lint docs clean

setup: $(STAMP)                 ## .venv with everything; does nothing when it is up to date

$(STAMP): $(LOCKS)
	@test -n "$(PYTHON)" || { echo "Python 3.11 or 3.12 is needed: make PYTHON=/path/to/python3.11"; exit 1; }
	$(BIN)/python -c '$(FITS)' 2>/dev/null || $(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv
	$(BIN)/uv pip install --compile-bytecode --python $(BIN)/python -r requirements.lock
	$(BIN)/uv pip install --python $(BIN)/python --no-deps -r requirements-nodeps.lock -e .
	touch $@

demo: setup                     ## the whole method on bundled photos, about four minutes
	$(BIN)/ddsr demo

test: setup                     ## the test suite
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile

check: setup                    ## format, lint, spelling, types and security
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/codespell
	$(BIN)/mypy
	$(BIN)/bandit --quiet --recursive --configfile pyproject.toml ddsr_core tasks flows deployments

audit: setup                    ## known vulnerabilities of the locked packages; needs the network
	$(BIN)/uv tool run pip-audit --strict --requirement requirements.lock --no-deps --disable-pip

lint: setup                     ## fix what can be fixed automatically
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: setup                     ## the site in build/site; a dead link is an error
	$(BIN)/python -m docs.stage_table --check
	$(BIN)/zensical build --clean --strict

clean:                          ## remove caches and .venv, never a home folder with results
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis build dist *.egg-info
