PYTHON ?= .venv/bin/python

SITE ?= $(CURDIR)/build/site

.PHONY: test fast lint types docs browser parity

test fast lint types docs parity: | $(filter .venv/%,$(PYTHON)) # a fresh checkout gets its environment
.venv/bin/python:
	python3 -m venv .venv && .venv/bin/pip install -e ".[test]"

test:  ## all tests
	$(PYTHON) -m pytest -n 2 --dist loadfile

fast:  ## without the slow ones
	$(PYTHON) -m pytest -m "not slow"

lint:
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .

# mypy and mkdocs see the mapped packages through a link tree that looks like an installed package
.PHONY: links
links:
	@rm -rf build/typing && mkdir -p build/typing/diffrep
	@for item in diffrep/*; do ln -s "$(CURDIR)/$$item" build/typing/diffrep/; done
	@ln -s "$(CURDIR)/heads" build/typing/diffrep/heads
	@ln -s "$(CURDIR)/eval" build/typing/diffrep/eval

types: links
	@cd build/typing && MYPYPATH=. $(abspath $(PYTHON)) -m mypy --config-file ../../pyproject.toml -p diffrep

docs: links  ## the site into build/site; a warning is an error
	@NO_MKDOCS_2_WARNING=1 $(PYTHON) -m mkdocs build --strict --quiet --site-dir $(SITE)

browser:  ## Chromium, for the tests of `diffrep app`; needs the rights to install packages
	@command -v chromium || command -v chromium-browser || command -v google-chrome || \
		{ apt-get update -qq && apt-get install -y -qq --no-install-recommends chromium; }

parity:  ## every case under DIFFREP_PARITY
	$(PYTHON) -m pytest tests/parity
