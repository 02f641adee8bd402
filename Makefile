VENV ?= .venv
PORT ?= 8888
PYTHON := $(VENV)/bin/python
INSTALLED := $(VENV)/.installed
# Two processes on the cores make spinning OpenMP threads wait for each other.
export OMP_WAIT_POLICY := passive

.PHONY: lab test full notebooks bench bench-merge clean
.DELETE_ON_ERROR:

# torch first: another package's requirement could pull another build of it.
$(INSTALLED): pyproject.toml constraints.txt
	python3 -m venv $(VENV)
	$(PYTHON) -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(PYTHON) -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[test,oracles,offline]"
	touch $@

# JupyterLab on notebooks/, on localhost, with a token. Trusting the notebooks lets their sliders move before a cell is run.
lab: $(INSTALLED)
	$(VENV)/bin/jupyter trust notebooks/*.ipynb
	$(VENV)/bin/jupyter lab --ip 127.0.0.1 --port $(PORT) $(if $(filter 0,$(shell id -u)),--allow-root) --notebook-dir notebooks

test: $(INSTALLED)
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m pytest -n 2 --dist worksteal

# Hours: fifty killed fine-tunes, and the two largest tables anew. Stopped, it goes on where it was (build/cells).
full: $(INSTALLED)
	$(PYTHON) tests/full.py

# Re-execute every notebook in place.
notebooks: $(INSTALLED)
	$(PYTHON) -m qlab.teach.execute notebooks/*.ipynb

bench: $(INSTALLED)
	$(PYTHON) tests/bench.py

# qlab merge beside PEFT on a synthetic checkpoint of several gigabytes: minutes, and three times its size on the disk.
bench-merge: $(INSTALLED)
	$(PYTHON) tests/bench_merge.py

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
	find . -name .ipynb_checkpoints -type d -prune -exec rm -rf {} +
