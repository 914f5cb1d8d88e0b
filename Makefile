# Each target makes the virtual environment it needs; `make clean` removes it.
PYTHON ?= python3
VENV ?= .venv
OUT ?= out
PIP := $(VENV)/bin/python -m pip --disable-pip-version-check --quiet install --no-compile --constraint constraints.txt
# Hundreds of processes are started, and each would compile all that it imports.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: quickstart flexmerge training adapters notebooks test check docs format clean

quickstart: $(VENV)/examples.stamp
	HF_HUB_OFFLINE=1 $(VENV)/bin/python -m examples.quickstart --out $(OUT)/quickstart

flexmerge: $(VENV)/examples.stamp
	HF_HUB_OFFLINE=1 $(VENV)/bin/python -m examples.flexmerge --out $(OUT)/flexmerge

adapters: $(VENV)/examples.stamp
	HF_HUB_OFFLINE=1 $(VENV)/bin/python -m examples.adapters --out $(OUT)/adapters

training: $(VENV)/examples.stamp
	HF_HUB_OFFLINE=1 $(VENV)/bin/python -m examples.training.plain
	HF_HUB_OFFLINE=1 $(VENV)/bin/python -m examples.training.trainer

notebooks: $(VENV)/notebooks.stamp
	mkdir -p $(OUT)/notebooks
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(VENV)/bin/jupyter-execute examples/notebooks/*.ipynb \
		--output='$(abspath $(OUT))/notebooks/{notebook_name}.ipynb'

test: $(VENV)/dev.stamp
	$(VENV)/bin/python -m pytest --numprocesses 2 --dist worksteal

check: $(VENV)/dev.stamp
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	cd tests/types && $(abspath $(VENV))/bin/mypy --explicit-package-bases \
		--config-file $(CURDIR)/pyproject.toml --cache-dir $(CURDIR)/.mypy_cache/user user.py

docs: $(VENV)/dev.stamp
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build --strict

format: $(VENV)/dev.stamp
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

$(VENV)/bin/python:
	$(PYTHON) -m venv --upgrade-deps $(VENV)  # a new pip takes half as long

$(VENV)/%.stamp: pyproject.toml constraints.txt mergekit_ext_autoload.pth | $(VENV)/bin/python
	$(PIP) --editable '.[$*]'
	touch $@ $(if $(filter dev,$*),$(VENV)/examples.stamp $(VENV)/notebooks.stamp)

clean:
	rm -rf $(VENV)
