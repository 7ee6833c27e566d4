PYTHON ?= .venv/bin/python

.PHONY: test fast lint types parity

test:  ## all tests
	$(PYTHON) -m pytest -n 2 --dist loadfile

fast:  ## without the slow ones
	$(PYTHON) -m pytest -m "not slow"

lint:
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .

# mypy sees the mapped packages through a link tree that looks like an installed package
types:
	@rm -rf build/typing && mkdir -p build/typing/diffrep
	@for item in diffrep/*; do ln -s "$(CURDIR)/$$item" build/typing/diffrep/; done
	@ln -s "$(CURDIR)/heads" build/typing/diffrep/heads
	@ln -s "$(CURDIR)/eval" build/typing/diffrep/eval
	@cd build/typing && MYPYPATH=. $(abspath $(PYTHON)) -m mypy --config-file ../../pyproject.toml -p diffrep

parity:  ## every case under DIFFREP_PARITY
	$(PYTHON) -m pytest tests/parity
