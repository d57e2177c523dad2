# Every target does its own set-up; nothing but python3, pip, make and git is needed.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INTEGRATIONS := .venv-integrations

# Files of tests are shared out to so many processes, in the order of tests/conftest.py; WORKERS=0: one after another.
WORKERS ?= 2
IN_PARALLEL := -n $(WORKERS) --dist loadfile --no-loadscope-reorder

# Threads that wait without spinning: on a busy machine, spinning makes small models twenty times slower.
export OMP_WAIT_POLICY := PASSIVE

# What is imported is compiled at its first import, and kept, also where the environment says otherwise: to compile all
# that is installed takes minutes, and each process that a test starts would compile again. 0 is what pip wants to hear.
export PYTHONDONTWRITEBYTECODE :=
export PIP_NO_COMPILE := 0

.PHONY: help demo test test-fast test-integrations test-newest check bench calibration evaluation pictures embedded-model \
    format clean

help:  ## Show the targets.
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 18

# One stamp per set of extras: installing again is needed only when the project's metadata changes.
$(VENV)/base: pyproject.toml constraints.txt
	@echo "Setting up $(VENV) (a few minutes the first time) ..."
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e .
	@touch $@

$(VENV)/dev: $(VENV)/base
	@$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test,lint,train]'
	@touch $@

demo: $(VENV)/base  ## Ask the embedded model a question about a picture.
	@mkdir -p out
	@$(BIN)/latent-tool ask examples/images/shapes.png "What is below the blue square?" --always-search \
	    --overlay out/demo.png

# The report and the playground are tested in a real browser.
/usr/bin/chromium:
	@if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	    apt-get update -qq && DEBIAN_FRONTEND=noninteractive \
	    apt-get install -y -qq --no-install-recommends chromium chromium-driver >/dev/null; \
	else echo "Browser tests need /usr/bin/chromium: install Debian's chromium and chromium-driver." >&2; fi

test: $(VENV)/dev /usr/bin/chromium  ## Run all tests, or those that ARGS names: make test ARGS="tests/unit -k layers".
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(IN_PARALLEL) $(ARGS)

test-fast: $(VENV)/dev  ## Run the tests of single rooms, without a browser: a first check while you work.
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(IN_PARALLEL) tests/unit -m "not slow and not browser" $(ARGS)

# The frameworks have an environment of their own; there, a test that is skipped has failed.
$(INTEGRATIONS)/ready: pyproject.toml constraints.txt
	@echo "Setting up $(INTEGRATIONS) (a few minutes the first time) ..."
	@$(PYTHON) -m venv $(INTEGRATIONS)
	@$(INTEGRATIONS)/bin/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[all,test,test-integrations]'
	@touch $@

test-integrations: $(INTEGRATIONS)/ready  ## Run the tests of every agent framework, with the real libraries.
	OMP_NUM_THREADS=1 $(INTEGRATIONS)/bin/python -m pytest $(IN_PARALLEL) tests/integrations \
	    tests/surfaces/test_langgraph.py $(ARGS)

# Frameworks that do not go together with the others, or with each other: one environment for each, and the server ours.
MCP_CLIENTS := crewai dspy strands

.venv-mcp-%/ready: tests/mcp_clients/%.txt
	@echo "Setting up $(@D) (a minute or two the first time) ..."
	@$(PYTHON) -m venv $(@D)
	@$(@D)/bin/pip install --quiet --disable-pip-version-check -r $<
	@touch $@

.PHONY: test-mcp-clients $(MCP_CLIENTS:%=test-mcp-%)
test-mcp-clients: $(MCP_CLIENTS:%=test-mcp-%)  ## Run docs/frameworks.md with CrewAI, DSPy and Strands, through MCP.

$(MCP_CLIENTS:%=test-mcp-%): test-mcp-%: .venv-mcp-%/ready $(INTEGRATIONS)/ready
	OMP_NUM_THREADS=1 LATENT_TOOL_COMMAND=$(CURDIR)/$(INTEGRATIONS)/bin/latent-tool \
	    $(<D)/bin/python -m pytest -c tests/mcp_clients/pytest.ini tests/mcp_clients/test_$*.py

# What a plain install brings today: nothing is pinned but torch, whose build for CPUs is the one the others have.
NEWEST := .venv-newest

$(NEWEST)/ready: pyproject.toml
	@echo "Setting up $(NEWEST) (a few minutes the first time) ..."
	@$(PYTHON) -m venv $(NEWEST)
	@$(NEWEST)/bin/pip install --quiet --disable-pip-version-check -c constraints.txt torch
	@$(NEWEST)/bin/pip install --quiet --disable-pip-version-check -e '.[test]'
	@touch $@

test-newest: $(NEWEST)/ready  ## Run fast tests and LangChain's standard suites with the newest versions of everything.
	OMP_NUM_THREADS=1 $(NEWEST)/bin/python -m pytest tests/surfaces/test_standard.py \
	    tests/surfaces/test_structured_output.py tests/surfaces/test_langgraph.py tests/unit/test_attachments.py \
	    tests/unit/test_schema.py tests/models/test_models_answers.py tests/models/test_models_prompts.py \
	    tests/models/test_prefix_cache.py

.PHONY: test-install
test-install:  ## Install as the README says, each way in a fresh environment without pins.
	PYTHON=$(PYTHON) .ci/install

check: $(VENV)/dev  ## Lint, formatting and types.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	@rm -rf build/types && mkdir -p build/types/latent_tool
	@ln -s $(CURDIR)/latent_tool/* build/types/latent_tool/
	@ln -s $(CURDIR)/integrations build/types/latent_tool/integrations
	cd build/types && $(CURDIR)/$(BIN)/mypy --config-file $(CURDIR)/pyproject.toml

bench: $(VENV)/dev  ## Measure (about ten minutes): speed, does the search help, routing, the event loop.
	$(BIN)/python benchmarks/speed.py --write docs/measured/speed.md --plot docs/images/cost.svg
	$(BIN)/python benchmarks/search_gain.py --questions 100
	$(BIN)/python benchmarks/routing.py --questions 100
	$(BIN)/python benchmarks/event_loop.py
	$(BIN)/python benchmarks/calibration.py

calibration: $(VENV)/dev  ## Make the embedded model's calibration and domain check anew, from 3,000 held-out scenes.
	rm -rf out/calibration
	OMP_NUM_THREADS=1 $(BIN)/latent-tool eval scenes:held_out:4000000-4000999 --method search --no-visual \
	    --out out/calibration
	$(BIN)/latent-tool calibrate out/calibration --target-error 0.02 --false-alarms 0.02 \
	    --pictures scenes:held_out:4001000-4002999 --out latent_tool/models/embedded/calibration.json

evaluation: $(VENV)/dev  ## Measure methods and confidences on fresh questions (hours); goes on where it stopped.
	$(BIN)/python benchmarks/evaluation.py --write docs/measured/evaluation.md $(ARGS)

pictures: $(VENV)/dev /usr/bin/chromium  ## Make the pictures of the README anew.
	$(BIN)/python docs/make_pictures.py

embedded-model: $(VENV)/dev  ## Make the shipped model anew (about three hours on two cores); see training.
	$(BIN)/python -m training --out out/embedded-before $(ARGS)
	$(BIN)/python -m training --out latent_tool/models/embedded --from out/embedded-before --settle --seed 1 \
	    --run training/runs/settling --force $(ARGS)

format: $(VENV)/dev  ## Fix what the linter can fix.
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:  ## Remove the environment and everything generated.
	rm -rf $(VENV) $(INTEGRATIONS) $(NEWEST) .venv-mcp-* build dist out *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
