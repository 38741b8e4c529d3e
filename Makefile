# make reproduce [PROFILE=quick] [DATASET=lidc-mini] [DATA_ROOT=folder] [SEED=0] [SET="histogram.weight=0 …"]   every table and figure
# make 05_fidelity [the same]   one notebook, after those whose stages it uses
# make readers [N=50] [READERS=readers]   the reader study of Table 2 as one page   make readers-score FILES="a.csv b.csv"
# make plan [PROFILE=paper]   steps, days and memory of each stage on this device, before any starts
# make claims   the verdicts, from the tables of all runs: seconds, no GPU
# make test · lab · docs · bench · clean · env
#
# A notebook is made when its stamp in .cache/make is newer than the notebook, the modules and data files it reaches
# (scripts/notebook_deps.py), the notebooks whose stages it uses, and the parameters. Stamps, not the executed
# notebooks, are the targets: git gives committed results the time of the checkout. Stages (trained weights, latents)
# are cached by the library under a hash of what they depend on, so a notebook run again does not train again.

PROFILE   ?= quick
DATASET   ?= lidc-mini
DATA_ROOT ?=
SEED      ?= 0
SET       ?=
override SEED := $(or $(SEED),0)

SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:
.SUFFIXES:
.DEFAULT_GOAL := reproduce
.PHONY: reproduce plan test lint lab docs bench claims readers readers-score clean env FORCE
FORCE:

# as one word of the shell, whatever is in it
quoted = '$(subst ','\'',$(1))'
export PYTHONHASHSEED := 0
export PYTHONUTF8 := 1
export PYTHONPATH := $(CURDIR)/notebooks$(if $(PYTHONPATH),:$(PYTHONPATH))
export PIP_DISABLE_PIP_VERSION_CHECK := 1

# -- the environment: PYTHON=… as given, else an active conda environment that holds hrldm, else .venv ------------------
BASE := $(shell for p in python3.11 python3 python3.12 python3.13 python; do \
	if $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then command -v $$p; break; fi; done)
ifeq ($(BASE),)
  $(error no Python of version 3.11 or later on the PATH)
endif
# everything given is checked before anything is written under it; what comes back is "=", the run's name, "=", DATA_ROOT in full
CHECKED := $(shell $(BASE) -I hrldm/paths.py $(call quoted,$(PROFILE)) $(call quoted,$(DATASET)) $(call quoted,$(DATA_ROOT)) $(call quoted,$(SEED)) \
	$(call quoted,$(SET)) $(call quoted,$(or $(HRLDM_CACHE),$(CURDIR)/.cache)) $(call quoted,$(or $(HRLDM_RESULTS),$(CURDIR)/results)) 2>&1)
ifeq ($(filter =%,$(firstword $(CHECKED))),)
  $(error $(CHECKED))
endif
RUN := $(firstword $(subst =, ,$(CHECKED)))
override DATA_ROOT := $(subst ^=$(RUN)=,,^$(CHECKED))
export HRLDM_CACHE := $(abspath $(or $(HRLDM_CACHE),.cache))
export HRLDM_RESULTS := $(abspath $(or $(HRLDM_RESULTS),results))

ifeq ($(origin PYTHON),command line)
  PY := $(PYTHON)
else ifneq ($(and $(CONDA_PREFIX),$(shell $(CONDA_PREFIX)/bin/python -I -c 'import hrldm; print(1)' 2>/dev/null)),)
  PY := $(CONDA_PREFIX)/bin/python
else
  PY  := .venv/bin/python
  ENV := .venv/.installed
endif

env: $(ENV)

.venv/.installed: pyproject.toml constraints.txt
	@[ -x .venv/bin/python ] || $(BASE) -m venv .venv
	@echo "installing the pinned packages into .venv (minutes)"
	@.venv/bin/python -m pip install --quiet --constraint constraints.txt torch
	@.venv/bin/python -m pip install --quiet --constraint constraints.txt --editable '.[docs,notebooks,test]'
	@touch $@

# -- the notebooks ------------------------------------------------------------------------------------------------------
NOTEBOOKS := $(sort $(wildcard notebooks/*.ipynb))
NAMES := $(NOTEBOOKS:notebooks/%.ipynb=%)
OUT   := $(HRLDM_RESULTS)/$(DATASET)/$(RUN)
STAMP := $(HRLDM_CACHE)/make/$(DATASET)/$(RUN)
done   = $(foreach n,$(filter $(1),$(NAMES)),$(STAMP)/$(n).done)

reproduce: $(STAMP)/all.done
	$(if $(RAN),,@echo "nothing to do: all $(words $(NAMES)) notebooks are up to date in $(OUT)")

$(STAMP)/all.done: $(call done,$(NAMES))
	$(eval RAN := yes)
	@$(PY) -m study.report.tables '$(OUT)'
	@touch $@

# one notebook, after those whose stages it uses: make 05_fidelity
.PHONY: $(NAMES)
$(NAMES): %: $(STAMP)/%.done

# one pattern for all; what each depends on besides follows
$(STAMP)/%.done: notebooks/%.ipynb $(STAMP)/parameters | $(ENV)
	@touch $@.begun
	@$(PY) scripts/run_notebook.py $< '$(OUT)/runs/$*.ipynb' \
		--profile '$(PROFILE)' --dataset '$(DATASET)' --data-root $(call quoted,$(DATA_ROOT)) --seed $(call quoted,$(SEED)) --set $(call quoted,$(SET))
	@cksum < '$(OUT)/runs/$*.ipynb' > $@ && touch -r $@.begun $@ && rm $@.begun  # what is edited meanwhile is newer

# changes its time only when a parameter, or a file of the user's data, changes
$(STAMP)/parameters: FORCE
	@mkdir -p $(@D)
	@text=$(call quoted,seed=$(SEED) set=$(SET) data_root=$(DATA_ROOT) results=$(HRLDM_RESULTS)); \
		text="$$text $$($(BASE) -I hrldm/paths.py --stamp $(call quoted,$(DATA_ROOT)))"; \
		[ "$$(cat $@ 2>/dev/null)" = "$$text" ] || echo "$$text" > $@

# stages: who reads what an earlier notebook made; "|" only keeps two notebooks from making the same stage at once
$(call done,01_data): | $(call done,00_start_here)
$(call done,02_autoencoder): $(call done,01_data)
$(call done,03_hrldm): $(call done,02_autoencoder)
$(call done,04_synthesis 05_fidelity 07_subtype 10_ablations): $(call done,03_hrldm)
$(call done,06_turing): $(call done,05_fidelity)
$(call done,08_scarcity 09_malignancy): $(call done,07_subtype)
$(call done,11_claims): $(call done,$(filter-out 11_%,$(NAMES)))

# executed notebooks that are not those of the stamp: removed, or put back by git
$(foreach n,$(NAMES),$(if $(shell [ "$$({ cksum < '$(OUT)/runs/$(n).ipynb'; } 2>/dev/null)" = \
	"$$(cat '$(STAMP)/$(n).done' 2>/dev/null)" ] && echo same),,$(eval $(STAMP)/$(n).done: FORCE)))

# the files each notebook reaches, looked up at every call: 0.2 s, never stale
DEPS := $(HRLDM_CACHE)/make/deps.mk
ifneq ($(shell mkdir -p $(dir $(DEPS)) && $(BASE) scripts/notebook_deps.py notebooks hrldm results/published results/released/lambda > $(DEPS).$$PPID \
	&& mv $(DEPS).$$PPID $(DEPS) && echo ok),ok)
  $(error scripts/notebook_deps.py failed, see above)
endif
include $(DEPS)

# -- tests --------------------------------------------------------------------------------------------------------------
# Own cache and results, so that a stage made by former code cannot pass for this one's; only the fetched wheels stay.
# One process a core, each of one thread and with about 2 GB; the cells of a notebook stay together.
TESTING := .cache/test
test: export HRLDM_CACHE := $(CURDIR)/$(TESTING)
test: export HRLDM_RESULTS := $(CURDIR)/$(TESTING)/results
test: export OMP_NUM_THREADS := 1
test: lint
	@mkdir -p $(TESTING) && find $(TESTING) -mindepth 1 -maxdepth 1 ! -name wheels -exec rm -rf {} +
	@[ -e $(TESTING)/wheels ] || [ ! -d .cache/wheels ] || cp -r .cache/wheels $(TESTING)/wheels
	$(PY) -m pytest -n logical --maxprocesses 4 --dist loadfile -p no:cacheprovider --nbval-lax --nbval-current-env --nbval-cell-timeout=600 --durations=10 tests $(NOTEBOOKS)

lint: $(ENV)
	$(PY) -m ruff check --output-format concise .
	$(PY) -m ruff format --check .
	$(if $(NOTEBOOKS),$(PY) -m nbstripout --verify --keep-id \
		--extra-keys "metadata.papermill cell.metadata.papermill" $(NOTEBOOKS))

# -- the rest -----------------------------------------------------------------------------------------------------------
# the executed copies, where there are some
lab: $(ENV)
	$(PY) -m jupyter lab --LabApp.default_url='/lab/tree/$(firstword $(patsubst $(CURDIR)/%,%,$(wildcard $(OUT)/runs/00_*.ipynb)) \
		notebooks/00_start_here.ipynb)'

# site/index.html; a dead link stops it
docs: $(ENV)
	$(PY) -m mkdocs build --quiet --site-dir site
	@echo site/index.html

bench: $(ENV)
	$(PY) -m study bench

plan: $(ENV)
	$(PY) -m study plan --profile '$(PROFILE)' --settings $(call quoted,$(SET))

claims: $(ENV)
	$(PY) -m study claims

READERS ?= readers
N ?= 50
readers: $(ENV)
	$(PY) -m study readers $(call quoted,$(READERS)) --profile '$(PROFILE)' --dataset '$(DATASET)' \
		--data-root $(call quoted,$(DATA_ROOT)) --settings $(call quoted,$(SET)) --seed $(call quoted,$(SEED)) --n $(N)

readers-score: $(ENV)
	$(PY) -m study readers-score $(FILES) --key $(call quoted,$(READERS)/key.csv) --out $(call quoted,$(READERS))

# committed results stay
clean:
	rm -rf .cache .pytest_cache .ruff_cache .hypothesis site results/*/smoke
	rm -f results/*/*/runs/*.part.ipynb
