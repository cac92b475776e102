# Everything runs in .venv, which the first target makes; a second `make` installs nothing again.
#
#   make demo    install, merge a few tiny models, show what came out
#   make test    the test suite
#   make check   lint, format, types, layers
#   make wheel   build the wheel, and try it in an environment of its own

PYTHON ?= python3

# The build of torch: the CPU's, unless an NVIDIA driver answers. Another: make test TORCH='torch==2.9.1'
TORCH ?= $(shell nvidia-smi >/dev/null 2>&1 && echo torch || echo torch==2.13.0)

PIP := .venv/bin/python -m pip -qq --disable-pip-version-check
METADATA := setup.cfg pyproject.toml

.PHONY: demo test check wheel install install-dev clean

demo: install
	.venv/bin/largemerge demo

test: install-dev
	scripts/test

check: install-dev
	scripts/check

wheel:
	TORCH='$(TORCH)' PYTHON='$(PYTHON)' scripts/try_wheel

install: .venv/.installed

install-dev: .venv/.installed-dev

.venv/.torch:
	$(PYTHON) -m venv .venv
	$(PIP) install '$(TORCH)'
	touch $@

.venv/.installed: .venv/.torch $(METADATA)
	$(PIP) install --editable .
	touch $@

.venv/.installed-dev: .venv/.torch $(METADATA)
	$(PIP) install --editable '.[test,check]'
	touch .venv/.installed $@

clean:
	rm -rf .venv build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
