# Needs Python 3.10 to 3.13 and make; everything else is installed into .venv. `make help` lists the commands.

VENV := .venv
REFERENCE := .venv-reference
READY := $(VENV)/.ready
REFERENCE_READY := $(REFERENCE)/.ready
DOCS := .venv-docs
DOCS_READY := $(DOCS)/.ready

# Another one: make demo PYTHON=/path/to/python3.12
PYTHON ?=
CANDIDATES := $(or $(PYTHON),python3.11 python3.12 python3.13 python3.10 python3)
IS_USABLE = import ensurepip, sys, venv; sys.exit(not (3, $(1)) <= sys.version_info < (3, 14))

.DEFAULT_GOAL := help
.PHONY: help install demo check lint types quick test soak parity bench docs clean

# The rooms whose tests start no training.
QUICK := $(addprefix tests/,chat recipe report rows tools) \
    $(patsubst %,tests/test_%.py,cli console doctor files layering)

# A venv is ready when its mark, written last, names the place where it stands: an interrupted installation has none, a
# moved or broken one another place. What is not ready is made anew.
IS_READY := import sys; sys.exit(open(sys.argv[1] + "/.ready").read() != sys.prefix)
ready = $(shell "$(1)/bin/python" -c '$(IS_READY)' "$(1)" 2>/dev/null && echo yes)
ifneq ($(call ready,$(VENV)),yes)
$(shell rm -f $(READY))
endif
ifneq ($(call ready,$(REFERENCE)),yes)
$(shell rm -f $(REFERENCE_READY))
endif
ifneq ($(call ready,$(DOCS)),yes)
$(shell rm -f $(DOCS_READY))
endif

help:
	@echo 'make demo      the main job on this CPU: base model, SFT, DPO, generate, export; numbers before and after'
	@echo 'make check     lint and types, in seconds'
	@echo 'make lint      what ruff finds, and whether it would format anything'
	@echo 'make types     what mypy finds'
	@echo 'make quick     the tests that start no training, in a minute and a half'
	@echo 'make test      make check, then the whole test suite with the coverage it must reach'
	@echo 'make soak      100 kills of training runs, every damage to a checkpoint, 40,000 fuzz cases, 5,000 request bodies; FINETUNE_SOAK_BODIES=100 for about 10 minutes'
	@echo 'make install   only make .venv and install the pinned dependencies, which the others do when needed'
	@echo 'make parity    compare with torch, transformers, trl and peft, in an environment of their own'
	@echo 'make bench     speed and memory beside TRL on this machine; hours. BENCH="sft_lora --rounds 1" for less'
	@echo 'make docs      the pages of docs/ as a site, in site/index.html'
	@echo 'make clean     remove the environments and what was built; outputs/ stays'

install: $(READY)

demo: $(READY)
	@$(VENV)/bin/python -m finetune.quickstart

check: lint types

lint: $(READY)
	@$(VENV)/bin/python -m ruff check --quiet
	@$(VENV)/bin/python -m ruff format --check --quiet

types: $(READY)
	@$(VENV)/bin/python -m mypy --no-error-summary

quick: $(READY)
	@$(VENV)/bin/python -m pytest -n 2 --dist loadfile $(QUICK)

# Python 3.12 takes minutes to trace a module that is one large literal, as jieba and chardet have them: 200 times as
# long as 3.13. No coverage is measured there.
IS_TRACED := import sys; print("" if sys.version_info[:2] == (3, 12) else "--cov --cov-report=term:skip-covered")
test: check
	@$(VENV)/bin/python -m pytest -n 2 --dist loadfile $(shell $(VENV)/bin/python -c '$(IS_TRACED)') tests --ignore=tests/parity

soak: $(READY)
	@$(VENV)/bin/python -m pytest tests/soak

parity: $(READY) $(REFERENCE_READY)
	@FINETUNE_REFERENCE_PYTHON="$(CURDIR)/$(REFERENCE)/bin/python" $(VENV)/bin/python -m pytest tests/parity

bench: $(READY) $(REFERENCE_READY)
	@$(VENV)/bin/python -m benchmarks $(BENCH)

docs: $(DOCS_READY)
	@NO_MKDOCS_2_WARNING=true $(DOCS)/bin/python -m mkdocs build --quiet --strict --clean
	@echo 'Wrote site/index.html'

clean:
	rm -rf $(VENV) $(REFERENCE) $(DOCS) site build dist *.egg-info .hypothesis
	find finetune tests benchmarks -name __pycache__ -prune -exec rm -rf {} +

# $(1) folder, $(2) the install commands' words, each in quotes, $(3) least Python, 3.x.
define environment
	@set -e; python=''; \
	for candidate in $(CANDIDATES); do \
	    if "$$candidate" -c '$(call IS_USABLE,$(3))' 2>/dev/null; then python="$$candidate"; break; fi; \
	done; \
	if [ -z "$$python" ]; then \
	    echo 'Python 3.$(3) to 3.13 with its venv module is needed; none of these is one: $(CANDIDATES)' >&2; \
	    echo 'Install one (Debian, Ubuntu: apt-get install python3 python3-venv) or name one:' >&2; \
	    echo 'make PYTHON=/path/to/python3.11' >&2; \
	    exit 2; \
	fi; \
	"$$python" tools/environment.py $(1) $(2)
endef

# paddlenlp's pin of numpy keeps it out of pyproject.toml on Python 3.13; elsewhere the second command finds it there.
$(READY): pyproject.toml constraints.txt
	$(call environment,$(VENV),'-c constraints.txt -e .[cpu$(comma)dev]' '-c constraints.txt --no-deps paddlenlp',10)

$(REFERENCE_READY): tests/parity/requirements.txt
	$(call environment,$(REFERENCE),'-r tests/parity/requirements.txt',11)

$(DOCS_READY): docs/requirements.txt
	$(call environment,$(DOCS),'-r docs/requirements.txt',10)

comma := ,
