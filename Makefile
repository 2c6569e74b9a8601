# The commands of isouq. Each makes the environment it needs once; `make help` lists them.
# Plain sh and make 3.81 (macOS) are enough.

PROFILE ?= embedded
CORES ?= all
# PYTHON: the interpreter to build .venv with. TORCH_INDEX: a pip index for torch, such as PyTorch's own CPU one.
PYTHON ?=
TORCH_INDEX ?=
# CHAPTERS: what `keep` keeps; all that have run, if none is named.
CHAPTERS ?=
# VERSION: a torch for test-torch; the oldest that pyproject.toml allows, if none is named.
VERSION ?= 2.11.0

PY := .venv/bin/python
READY := .venv/isouq-installed
# machine=100: one job at a time that needs the machine for itself. --nolock: the Snakefile has a lock that ends with
# the process, while Snakemake's own outlives a kill. Jobs tell what they do themselves, so `rules` is quiet.
# A process for each core.
PARALLEL := -n auto --dist loadgroup
SNAKEMAKE := $(PY) -m snakemake --cores $(CORES) --quiet host progress rules --resources machine=100 --nolock --rerun-incomplete
CONFIG := --config profile="$$PROFILE"
export PROFILE
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.DEFAULT_GOAL := help
.PHONY: help book site keep pdf epub canary plan assets test test-quick test-torch test-polygraph lint verify dist address clean distclean lock FORCE

help: ## this list
	@sed -n 's/^\([a-z-]*\):.*## /  make \1|/p' Makefile | awk -F'|' '{ printf "%-22s%s\n", $$1, $$2 }'
	@echo "  PROFILE=NAME        smoke, embedded (default), or a file of your own: make book PROFILE=my.yml"
	@echo "  CORES=N             processor cores to use (default: all)"
	@echo "  PYTHON=PATH         the Python to make .venv with (3.11 or newer)"
	@echo "  VERSION=X.Y.Z       the torch of test-torch (default: $(VERSION), the oldest supported)"
	@echo "  TORCH_INDEX=URL     where to get torch, for example a CPU build in place of PyPI's CUDA one"

book: $(READY) ## run what has changed and build the book in build/PROFILE/html
	@$(SNAKEMAKE) $(CONFIG)
	@name=$${PROFILE##*/}; echo "The book: build/$${name%.y*ml}/html/index.html"

site: PROFILE := $(if $(filter file,$(origin PROFILE)),published,$(PROFILE))
site: $(READY) ## build the pages from the run kept in results/published, in build/site/html; runs nothing
	@$(PY) book/build.py build/site/html --kept "results/$$PROFILE"
	@echo "The site: build/site/html/index.html"

keep: $(READY) ## keep a run, or its CHAPTERS="01_derivation …", in results/PROFILE, and quote it in the README
	@$(PY) -m isouq.pipeline.jobs keep --profile "$$PROFILE" $(CHAPTERS)
	@name=$${PROFILE##*/}; $(PY) book/readme.py "results/$${name%.y*ml}/results.json"
	@$(PY) -m isouq.pipeline.jobs describe --profile "$$PROFILE"

pdf: book ## the book as one PDF, build/PROFILE/html/isouq.pdf, which the first page then offers (needs Chromium)
epub: book ## the same for e-readers, build/PROFILE/html/isouq.epub (needs Chromium, which sets the formulas)
pdf epub:
	@name=$${PROFILE##*/}; $(PY) book/paper.py $@ build/$${name%.y*ml}/html

plan: $(READY) ## what `make book` would run, and why
	@$(SNAKEMAKE) --dry-run --quiet host progress $(CONFIG)

assets: $(READY) ## fetch the models and data that the profile needs, and nothing else
	@$(SNAKEMAKE) fetch $(CONFIG)

test: $(READY) ## all tests; fetches models and data and builds the book at smoke size first
	@$(PY) book/chromium.py
	@$(PY) -m isouq.cli assets fetch gemma-3-270m
	@$(SNAKEMAKE) --config profile=smoke
	@OMP_NUM_THREADS=1 $(PY) -m pytest $(PARALLEL)

test-quick: $(READY) ## the tests that need no download and run no notebook
	@ISOUQ_FUZZ=100 OMP_NUM_THREADS=1 $(PY) -m pytest $(PARALLEL) -m 'not assets and not book'

# The environment is requirements.lock with another torch, which comes first with what its build needs.
test-torch: .venv-torch-$(VERSION)/installed ## the tests of the gradients under torch VERSION, in an environment of its own
	@.venv-torch-$(VERSION)/bin/python -m pytest tests/gradients -m 'not assets and not book'

.venv-torch-%/installed: requirements.lock
	@set -e; $(FIND_PYTHON); \
	"$$python" -m venv --clear .venv-torch-$*; pip=".venv-torch-$*/bin/python -m pip"; \
	$$pip install $(if $(TORCH_INDEX),--index-url "$(TORCH_INDEX)") "torch==$*"; \
	sed '/^torch==/d' requirements.lock > .venv-torch-$*/requirements.lock; \
	$$pip install --quiet --no-deps -r .venv-torch-$*/requirements.lock; \
	touch $@

# Packages that are not there come from .venv, whose notebooks and modules the pages show.
canary: book ## the same pages by plain, newest Sphinx, in an environment of its own; prints what breaks
	@set -e; new=.venv-canary/bin/python; where='import sysconfig; print(sysconfig.get_path("purelib"))'; \
	$(PY) -m venv --clear .venv-canary; \
	$$new -m pip install --quiet sphinx myst-nb sphinx-book-theme sphinxcontrib-bibtex sphinx-external-toc \
	  sphinx-copybutton sphinx-togglebutton sphinx-design sphinx-mathjax-offline sphinx-multitoc-numbering; \
	$(PY) -c "$$where" > "$$($$new -c "$$where")/zz-isouq.pth"; \
	name=$${PROFILE##*/}; $(PY) book/canary.py build/$${name%.y*ml}/html $$new

# lm-polygraph needs packages that the lock has no use for, so it has an environment of its own, above this one.
test-polygraph: .venv-polygraph/installed ## the tests of isouq within lm-polygraph, in an environment of its own
	@OMP_NUM_THREADS=1 .venv-polygraph/bin/python -m pytest tests/integrations

.venv-polygraph/installed: $(READY)
	@set -e; $(PY) -m venv --clear .venv-polygraph; packages='import sysconfig; print(sysconfig.get_path("purelib"))'; \
	$(PY) -c "$$packages" > "$$(.venv-polygraph/bin/python -c "$$packages")/isouq-environment.pth"; \
	.venv-polygraph/bin/python -m pip install --quiet -c requirements.lock lm-polygraph==0.7.0; \
	touch $@

lint: $(READY) ## ruff, formatting, types, and notebooks without stored outputs
	@$(PY) -m ruff check
	@$(PY) -m ruff format --check
	@$(PY) -m mypy
	@$(PY) -m nbstripout --verify notebooks/*.ipynb

verify: $(READY) ## compute a part of every chapter again and compare it with results/published (ten minutes)
	@$(PY) -m isouq.cli verify --slice

# Tools and package each have an environment of their own in build/, so that nothing of .venv helps the package along.
dist: ## build wheel and sdist in build/dist, check them, and run the README's first snippet with the wheel alone
	@set -e; $(FIND_PYTHON); rm -rf build/dist build/dist-tools build/dist-alone; \
	"$$python" -m venv build/dist-tools; build/dist-tools/bin/python -m pip install --quiet build==1.6.1 twine==7.0.0; \
	build/dist-tools/bin/python -m build --outdir build/dist .; build/dist-tools/bin/twine check --strict build/dist/*; \
	"$$python" -m venv build/dist-alone; alone=build/dist-alone/bin/python; \
	if [ -n "$(TORCH_INDEX)" ]; then $$alone -m pip install --quiet --index-url "$(TORCH_INDEX)" torch; fi; \
	$$alone -m pip install --quiet build/dist/*.whl; \
	sed -n '/^```python/,/^```/p' README.md | sed '1d; /^```/,$$d' > build/dist-alone/snippet.py; \
	cd build/dist-alone; bin/python snippet.py

address: $(READY) ## write the repository's URL=https://… into pyproject.toml, CITATION.cff and _config.yml
	@$(PY) scripts/address.py "$(URL)"

lock: ## resolve pyproject.toml anew into requirements.lock
	@set -e; scratch=$$(mktemp -d); trap 'rm -rf "$$scratch"' EXIT; $(FIND_PYTHON); \
	"$$python" -m venv "$$scratch"; "$$scratch/bin/python" -m pip install --quiet uv; \
	"$$scratch/bin/uv" pip compile --quiet --universal --python-version 3.11 --fork-strategy fewest --all-extras \
	  --no-emit-package torchvision --no-emit-package playwright --no-header pyproject.toml -o requirements.lock

clean: ## remove what was built; the scored questions in build/store stay
	@if [ -d build ]; then find build -mindepth 1 -maxdepth 1 ! -name store -exec rm -rf {} +; fi

distclean: clean ## remove the scored questions and the environment too
	@rm -rf build .venv .venv-torch-* .venv-polygraph .venv-canary .snakemake isouq.egg-info .pytest_cache .mypy_cache .ruff_cache

# Sets $python to PYTHON, or to the first on the PATH that is new enough and runs.
define FIND_PYTHON
new_enough() { "$$1" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; }; \
python=; for candidate in $(or $(PYTHON),python3.11 python3.12 python3.13 python3.14 python3); do \
  if new_enough "$$candidate"; then python=$$candidate; break; fi; \
done; \
if [ -z "$$python" ]; then \
  echo "make: no Python 3.11 or newer with venv among: $(or $(PYTHON),python3.11 to python3.14, python3)." >&2; \
  echo "Install one (Debian: apt-get install python3 python3-venv), or name it: make PYTHON=/path/to/python3" >&2; exit 1; \
fi
endef

# Torch comes first, with whatever its own build needs; then the lock as it is, and nothing that it does not name.
# A clone that was moved gets its paths renewed: the stamp holds the folder it was made in.
$(READY): requirements.lock pyproject.toml $(shell [ "$$(cat $(READY) 2>/dev/null)" = "$$(pwd -P)" ] || echo FORCE)
	@set -e; \
	if ! $(PY) -c '' 2>/dev/null; then \
	  $(FIND_PYTHON); \
	  echo "Making .venv with $$("$$python" --version)"; "$$python" -m venv --clear .venv; \
	fi; \
	pin=$$(sed -n 's/^torch==\([^ ;]*\).*/\1/p' requirements.lock); \
	has=$$($(PY) -c 'from importlib.metadata import version as v; print(v("torch").split("+")[0])' 2>/dev/null || true); \
	if [ "$$has" != "$$pin" ]; then \
	  echo "Installing torch $$pin, the largest download"; \
	  if [ -n "$(TORCH_INDEX)" ]; then $(PY) -m pip install --index-url "$(TORCH_INDEX)" "torch==$$pin"; \
	  else $(PY) -m pip install -c requirements.lock "torch==$$pin"; fi; \
	fi; \
	echo "Installing the other $$(grep -c '^[a-z0-9]' requirements.lock) pinned packages (some minutes)"; \
	$(PY) -m pip install --quiet --no-deps -r requirements.lock; \
	$(PY) -m pip install --quiet --no-deps -e .; \
	printf '%s' "$$(pwd -P)" > $(READY)

FORCE:
