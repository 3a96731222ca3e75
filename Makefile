# make demo      set up, train both stages on the digits that ship with scikit-learn, sample, compare
# make test      set up, run the tests
# make help      everything else

PIPELINE ?= digits#  a recipe's name (glann recipes) or a TOML file
ARGS ?=#             options passed on: ARGS="--set glo.epochs=5 --device cuda"
STUDIES ?= modes gradients stability likelihood blur#  which ones: STUDIES=likelihood
EXTRAS ?=#           extras to install: EXTRAS=gpu, EXTRAS=faiss
PIP_FLAGS ?=#        options passed on to pip: PIP_FLAGS="--index-url ..."
PYTHON ?= python3

BIN := .venv/bin
RUN := $(if $(wildcard $(PIPELINE)/recipe.toml),$(PIPELINE:/=),runs/$(basename $(notdir $(PIPELINE:/=))))
comma := ,
space := $(subst ,, )
DEV_EXTRAS := $(subst $(space),$(comma),$(strip dev $(EXTRAS)))
USER_EXTRAS := $(subst $(space),$(comma),$(strip $(EXTRAS)))

.PHONY: help install install-dev train train-glo train-imle sample compare studies bench demo test lint format clean

help:
	@sed -n 's/^# \(make .*\)/\1/p' Makefile
	@echo "make install     set up .venv               EXTRAS=gpu PIP_FLAGS=..."
	@echo "make train-glo   stage one                  PIPELINE=mnist ARGS='--set glo.epochs=5'"
	@echo "make train-imle  stage two                  PIPELINE=mnist"
	@echo "make train       both stages                PIPELINE=mnist"
	@echo "make sample      new images of what was trained"
	@echo "make compare     GLANN beside GANs, scored  PIPELINE=mnist-short ARGS='--seeds 3'"
	@echo "make studies     the claims as experiments  ARGS='--quick --jobs 2'"
	@echo "make bench       how fast it is here        EXTRAS=faiss ARGS='--json bench.json'"
	@echo "make lint        ruff and mypy              make format: let ruff mend"
	@echo "make clean       delete .venv and caches; runs and data are kept"

# The marks hold what was installed: other extras, or a changed pyproject.toml, install again.
install: .venv/.installed$(if $(USER_EXTRAS),-with-$(USER_EXTRAS))
install-dev: .venv/.installed-with-$(DEV_EXTRAS)

.venv/.installed-with-%: pyproject.toml constraints.txt | .venv/bin/pip
	$(BIN)/pip install --quiet $(PIP_FLAGS) -c constraints.txt -e ".[$*]"
	@touch "$@"

.venv/.installed: pyproject.toml constraints.txt | .venv/bin/pip
	$(BIN)/pip install --quiet $(PIP_FLAGS) -c constraints.txt -e .
	@touch "$@"

.venv/bin/pip:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "Error: glann needs Python 3.11 or newer; $(PYTHON) is $$($(PYTHON) -V). Give another: make PYTHON=python3.12" >&2; exit 2; }
	$(PYTHON) -m venv .venv

train-glo: install
	$(BIN)/glann train-glo $(PIPELINE) $(ARGS)

train-imle: install
	$(BIN)/glann train-imle $(PIPELINE) $(ARGS)

train: install
	$(BIN)/glann train $(PIPELINE) $(ARGS)

sample: install
	$(BIN)/glann sample $(RUN) -o $(RUN)/samples.png $(ARGS)

compare: install
	$(BIN)/glann compare $(PIPELINE) $(ARGS)

studies: install
	$(BIN)/glann study $(STUDIES) $(ARGS)

bench: install
	$(BIN)/glann bench $(ARGS)

demo: install
	@$(BIN)/glann train digits --run runs/demo
	@$(BIN)/glann sample runs/demo -n 100 --seed 1 -o runs/demo/samples.png
	@$(BIN)/glann interpolate runs/demo -o runs/demo/interpolation.png
	@$(BIN)/glann compare digits --run runs/demo
	@echo
	@echo "Look at the pictures in runs/demo:"
	@echo "  samples.png        100 digits that nobody wrote"
	@echo "  side-by-side.png   reconstructions, one Gaussian on the codes, IMLE"
	@echo "  interpolation.png  from one sample to another"
	@echo "and, in a browser, at runs/demo/compare/report.html: GLANN beside two GANs, scored"

test: install-dev
	$(BIN)/pytest $(ARGS)

lint: install-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: install-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .venv build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
