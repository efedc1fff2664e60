# `make demo` shows it, `make test` proves it, `make quick` is for in between, `make docs` is to read. Each makes the
# environment first, once.
PYTHON ?= python3
VENV := .venv/bin
EXECUTED := notebooks/executed
# Processes that take file after file, in the order given by tests/conftest.py: two that start engines, which compute,
# and three that start none, which also wait for servers and disks. nbmake takes seconds to import, and runs notebooks
# alone.
PYTEST = $(NOTEBOOK_ENV) $(VENV)/python -m pytest --dist loadfile --no-loadscope-reorder --durations=15
LIGHT = $(PYTEST) -n 3 -p no:nbmake
HEAVY := engine or server or notebook
NOTEBOOK_ENV := TQDM_DISABLE=1 PLOTLY_RENDERER=plotly_mimetype HF_HUB_OFFLINE=1 VLLM_NO_USAGE_STATS=1 JUPYTER_PLATFORM_DIRS=1
# Without bytecode, which images of containers often switch off, a process takes 20 s to import vLLM, else 7.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: core demo test quick lab check docs clean env-core env-demo env-test env-dev env-docs model

env-core env-demo env-test env-dev env-docs:
	@$(PYTHON) scripts/setup_env.py $(@:env-%=%)

# kvlab without an engine: sizes, simulation and stores, on any machine.
core: env-core
	@$(VENV)/kvlab --help

model: env-demo
	@$(VENV)/python -m kvlab.datasets.demo_model $(MODEL)

# make demo MODEL=path-or-hub-id runs it on a model you have.
demo: model
	@echo "running notebooks/00_quickstart.ipynb: about a minute on two cores"
	@mkdir -p $(EXECUTED)
	@$(NOTEBOOK_ENV) KVLAB_MODEL="$(MODEL)" $(VENV)/jupyter execute notebooks/00_quickstart.ipynb --output=$(CURDIR)/$(EXECUTED)/00_quickstart.ipynb
	@$(VENV)/python scripts/show_table.py $(EXECUTED)/00_quickstart.ipynb

test: env-test
	@$(VENV)/python -m kvlab.datasets.demo_model > /dev/null
	@$(VENV)/python scripts/get_servers.py
	@$(VENV)/python scripts/get_browser.py
	@$(LIGHT) -m "not ($(HEAVY))" tests || failed=1; \
	$(PYTEST) -n 2 -m "$(HEAVY)" --nbmake --nbmake-timeout=1200 tests notebooks --ignore=$(EXECUTED) || failed=1; \
	exit $${failed:-0}

# All tests that start neither an engine nor a server, but for those marked slow.
quick: env-test
	@$(VENV)/python -m kvlab.datasets.demo_model > /dev/null
	@$(VENV)/python scripts/get_servers.py
	@$(LIGHT) -m "not ($(HEAVY) or slow)" tests

# As root, as in a container, JupyterLab wants to be told. make lab LAB_ARGS="--ip 0.0.0.0 --port 8889 --no-browser"
lab: model
	@cd notebooks && ../$(VENV)/jupyter lab $$([ "$$(id -u)" -ne 0 ] || echo --allow-root) $(LAB_ARGS)

check: env-dev
	@$(VENV)/ruff check .
	@$(VENV)/mypy

# Any warning is an error. The pages of docs/measured/ are made by scripts/report.py and committed.
docs: env-docs
	@$(VENV)/python scripts/report.py --check
	@NO_MKDOCS_2_WARNING=1 $(VENV)/mkdocs build --strict --quiet
	@echo "site/index.html"

clean:
	rm -rf site .venv .pytest_cache .hypothesis .mypy_cache .ruff_cache $(EXECUTED)
