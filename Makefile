# make demo   photographs in, two registered models out, on this machine (about ten minutes the first time)
# make test   the test suite;   make lint, make bench, make clean: as they say
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready

.PHONY: demo test lint bench soak validate-infra clean
.DEFAULT_GOAL := demo

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "inpaint needs Python 3.11 or later: make PYTHON=python3.11")'
	@echo "Installing into $(VENV) (a few minutes, once) ..."
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[weights,dev]'
	@touch $@

demo: $(READY)
	@$(BIN)/inpaint run demo

# what starts clusters of its own has the machine to itself; everything else shares it
test: $(READY)
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests --ignore tests/cluster -n auto --maxprocesses 4 --dist loadfile
	@$(BIN)/python -m pytest tests/cluster -n 2 --dist loadfile --no-loadscope-reorder

lint: $(READY)
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

bench: $(READY)
	@$(BIN)/python -m pytest -m benchmark tests -s

# INPAINT_SOAK: how many random schedules of faults, two minutes each (20)
soak: $(READY)
	@$(BIN)/python -m pytest -m soak tests/cluster

# CRDS: a folder with KubeRay's published CRDs (helm pull kuberay/kuberay-operator --untar brings them)
validate-infra: $(READY)
	@test -n "$(CRDS)" || { echo "name the folder of KubeRay's CRDs: make validate-infra CRDS=FOLDER"; exit 2; }
	@$(BIN)/python infra/validate.py $(CRDS)
	@if docker compose version > /dev/null 2>&1; then \
	  docker compose --env-file tests/infra/filled.env -f infra/compose.yaml config --quiet && echo "the compose file is valid"; \
	else echo "docker compose is not here: the compose file was not validated"; fi

clean:
	rm -rf $(VENV) runs build *.egg-info .pytest_cache .mypy_cache .ruff_cache
