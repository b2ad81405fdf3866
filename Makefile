# make demo      train and register two models on bundled photographs, on this machine (about ten minutes the first time)
# make check     lint and the fast tests, without Ray and servers (two minutes);   make test   the test suite
# make soak      the long tests: every model instead of one or two, runs with many injected faults, the wheel
# make test-browser   the studio in Debian's chromium: what make test leaves out, which has the main way; skipped without chromium
# make lint      ruff and mypy;   make bench   the benchmarks
# make gpu       on a machine with a GPU: is training right, and how fast? five minutes, needs torch but neither Ray nor MLflow
# make bfloat16  which bfloat16 convolutions does torch compute right on this CPU? ten minutes
# make docs      the site, from docs/ into build/docs; warnings are errors
# make coverage  the fast tests with coverage.py: prints the lines covered per file and in total
# make wheel     the package, into dist/
# make clean     remove the environment and all outputs
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready

.PHONY: demo check test test-browser lint bench soak gpu bfloat16 docs coverage wheel validate-infra clean
.DEFAULT_GOAL := demo

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "inpaint needs Python 3.11 or later: make PYTHON=python3.11")'
	@echo "Installing into $(VENV) (a few minutes, once) ..."
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[weights,dev,docs]'
	@touch $@

demo: $(READY)
	@$(BIN)/inpaint run demo

# three processes on two cores: some tests wait for servers
UNITS := OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests --ignore tests/cluster -n 3 --dist loadfile

check: lint
	@$(UNITS) -m fast

# tests that start Ray clusters run after the others, to have the machine to themselves
test: $(READY)
	@$(UNITS)
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/cluster -n 2 --dist loadfile --no-loadscope-reorder

# STUDIO_SCREENSHOTS=1: also writes pictures of all pages, light and dark, narrow and wide, into build/studio-screenshots
test-browser: $(READY)
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/browser -m browser -n 2 --dist loadfile

lint: $(READY)
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

bench: $(READY)
	@$(BIN)/python -m pytest -m benchmark tests -s

# ARGUMENTS="--isa avx512_bf16 --minutes 10"
bfloat16: $(READY)
	@PYTHONPATH=.:tests $(BIN)/python -m bfloat16 --models $(ARGUMENTS)

# with the machine's own Python, which has a torch for its GPU; ONLY="gradients speed" runs two parts
gpu:
	@PYTHONPATH=.:tests $(PYTHON) -m gpu $(if $(ONLY),--only $(ONLY))

# INPAINT_SOAK: number of random fault schedules (default 20), two minutes each
soak: $(READY)
	@$(UNITS) -m soak
	@$(BIN)/python -m pytest -m soak tests/cluster

# INPAINT_REPOSITORY_URL: where the site's links to source files lead; by default to this checkout (docs/conf.py)
docs: $(READY)
	@$(BIN)/sphinx-build -W --keep-going --quiet -d build/doctrees -b html docs build/docs
	@echo "build/docs/index.html"

coverage: $(READY)
	@rm -rf build/coverage
	@OMP_NUM_THREADS=1 $(BIN)/coverage run -m pytest tests --ignore tests/cluster -n 3 --dist loadfile -m fast
	@$(BIN)/coverage combine --quiet
	@$(BIN)/coverage report

# setuptools would pack modules that an earlier build left in build/lib
wheel: $(READY)
	@rm -rf build/lib build/bdist.*
	@$(BIN)/pip wheel --quiet --disable-pip-version-check --no-deps --wheel-dir dist .
	@ls dist/*.whl

# CRDS: a folder with KubeRay's published CRDs (from helm pull kuberay/kuberay-operator --untar)
validate-infra: $(READY)
	@test -n "$(CRDS)" || { echo "give the folder of KubeRay's CRDs: make validate-infra CRDS=FOLDER"; exit 2; }
	@$(BIN)/python infra/validate.py $(CRDS)
	@if docker compose version > /dev/null 2>&1; then \
	  docker compose --env-file tests/infra/filled.env -f infra/compose.yaml config --quiet && echo "the compose file is valid"; \
	else echo "docker compose is not installed: the compose file was not validated"; fi

clean:
	rm -rf $(VENV) runs build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
