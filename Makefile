# make ablation and make test need only python3, make and a network.
PYTHON ?= python3
VENV   ?= .venv
README ?= README
RUNS   ?= runs
# further words for papermill (make ablation ABLATION="-p seeds 3") and for JupyterLab (make lab);
# where the ablation's files go is said by RUNS
ABLATION ?=
LAB    ?=
BOOK   ?= _book
BIN    := $(VENV)/bin
READY  := $(VENV)/ready

# freed memory stays with the process: a step takes less time and gives the same numbers
# (nbs/benchmark.ipynb); glibc needs both
export MALLOC_TRIM_THRESHOLD_ := 1073741824
export MALLOC_MMAP_THRESHOLD_ := 1073741824

SHELL        := /bin/bash
.SHELLFLAGS  := -eu -o pipefail -c
.DEFAULT_GOAL := help
# tables of paired differences for a terminal
define SHOW
import sys, pandas
pandas.set_option("display.width", 100)
for path in sys.argv[1:]:
    table = pandas.read_csv(path, index_col=0)
    if len(table):  # images without labels have no accuracy
        table = table.drop(columns=["baseline_sd", "setting_sd"]).astype({"n": int}).round(1)
        print(path, table, sep="\n", end="\n\n")
endef
export SHOW

.PHONY: help env ablation figures test faults cluster clean readme book lab

help: ## list these commands
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "make %-10s %s\n", $$1, $$2}'

$(READY): settings.ini constraints.txt setup.py
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --constraint constraints.txt --editable '.[dev]'
	touch $@

env: $(READY) ## create .venv and install ftcl into it

ablation: $(READY) ## the main job on the built-in shapes: none against posneg; goes on after a stop
	mkdir -p $(RUNS)/ablation
	@# papermill opens /dev/stderr anew, which would empty a log file: a pipe has nothing to lose
	$(BIN)/papermill --no-progress-bar --stderr-file /dev/stderr \
		nbs/ablation.ipynb $(RUNS)/ablation.ipynb -p out $(RUNS)/ablation -p resume True $(ABLATION) \
		2>&1 | (trap '' INT TERM; exec cat >&2)
	@find $(RUNS)/ablation -name '*.csv' -exec $(BIN)/python -c "$$SHOW" {} +
	@echo "Open $(RUNS)/ablation.ipynb (make lab) for the curves; records and scores are in $(RUNS)/ablation/."

figures: $(READY) ## redraw what changed; the first time in a clone, every figure
	$(BIN)/snakemake --cores 2 figures --quiet rules host

test: $(READY) ## every notebook, then tests/
	OMP_NUM_THREADS=1 $(BIN)/nbdev_test --n_workers 2 --do_print
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist loadfile

faults: $(READY) ## 5,000 mutated inputs and 100 kills, counted in results/reliability
	mkdir -p runs
	$(BIN)/papermill --no-progress-bar nbs/reliability.ipynb runs/reliability.ipynb \
		-p inputs 5000 -p kills 100 -p out results/reliability

cluster: $(READY) ## two runs on a Slurm of its own: one is killed, a second call finishes it
	OMP_NUM_THREADS=1 $(BIN)/python tests/cluster.py

clean: $(READY) ## strip the notebooks and export them to ftcl/; leaves a committed tree as it is
	$(BIN)/nbdev_clean
	$(BIN)/nbdev_export

readme: $(READY) ## README.md from nbs/index.ipynb
	$(BIN)/jupyter nbconvert --log-level ERROR --to markdown --execute --no-input --stdout \
		nbs/index.ipynb | sed 's#\.\./#./#g' | cat -s > $(README).md

book: $(READY) ## the notebooks as they are, as a book in _book; open _book/index.html
	$(BIN)/sphinx-build -E -j 2 -W --keep-going --quiet -c book . $(BOOK)

lab: $(READY) ## open the notebooks in JupyterLab; make lab LAB="--allow-root --ip 0.0.0.0"
	JUPYTER_CONFIG_PATH=$(CURDIR)/profiles/jupyterlab$${JUPYTER_CONFIG_PATH:+:$$JUPYTER_CONFIG_PATH} \
		$(BIN)/jupyter lab --ServerApp.root_dir=. \
		--LabApp.default_url=/lab/tree/nbs/index.ipynb $(LAB)
