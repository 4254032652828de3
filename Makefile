# Everything runs from here; each target sets itself up from nothing.
SHELL := /bin/bash
PYTHON ?= python3
CACHE ?= $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/skyward_lite
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# One build directory for all checkouts of a user, and one profile for the extension and the tests.
export CARGO_TARGET_DIR := $(CACHE)/target
export PYO3_PYTHON := $(CURDIR)/$(BIN)/python
export VIRTUAL_ENV := $(CURDIR)/$(VENV)
export PATH := $(CURDIR)/$(BIN):$(PATH)
CARGO := cargo
FUZZ_TARGETS ?= frame client agent resume
FUZZ_SECONDS ?= 60
FUZZ_RUNS ?=
FUZZ_BOUND = $(if $(FUZZ_RUNS),-runs=$(FUZZ_RUNS),-max_total_time=$(FUZZ_SECONDS))
# `address` finds what unsafe code of other crates does wrong, at half the speed.
FUZZ_SANITIZER ?= none
CARGO_FUZZ := $(CACHE)/tools/bin/cargo-fuzz
DENY_VERSION := 0.20.2
DENY := $(CACHE)/tools/cargo-deny-$(DENY_VERSION)/bin/cargo-deny
DENY_CHECK := $(DENY) --manifest-path rust/Cargo.toml --config rust/deny.toml
MANIFEST := --manifest-path rust/Cargo.toml --locked

.PHONY: all demo test test-fast test-rust test-python conformance lint lint-code lint-house lint-crates audit format bench chart chaos searches fuzz docs build dist version system clean

all: lint test

$(STAMP): pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --group build --group test --group lint
	touch $@

# What the tests need of the system: an OpenSSH server to talk to, pkill to cut its connections; tmux for a terminal;
# chromium to look at a report; Slurm, of which tests start a cluster of their own; and, for those tests that only root
# can run, namespaces and login shells.
PACKAGES := openssh-server procps iproute2 sudo zsh fish tcsh tmux chromium slurmctld slurmd slurm-client munge
system:
	@missing=; for program in sshd pkill ip sudo zsh fish tcsh tmux chromium slurmctld slurmd srun munged; do \
	  PATH="$$PATH:/usr/sbin:/sbin" command -v $$program >/dev/null || missing="$$missing $$program"; done; \
	if [ -n "$$missing" ]; then \
	  if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	    apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq $(PACKAGES) >/dev/null; \
	  else case $$missing in *sshd*|*pkill*) \
	    echo "the tests need sshd and pkill: install openssh-server and procps" >&2; exit 1;; esac; fi; fi

# maturin does not expect that its backend is called by another one (rust/build_backend.py).
BACKEND_WARNING := 'build-backend. in pyproject.toml is not set'
build: $(STAMP)
	$(BIN)/maturin develop --release --quiet 2> >(grep -v $(BACKEND_WARNING) >&2)

demo: build
	$(BIN)/python benches/demo.py

test: test-rust test-python

test-rust: $(STAMP) system
	$(CARGO) test $(MANIFEST) --release

# Two at a time: most of them wait for other processes. A file's tests share what they started, and stay together.
test-python: build
	$(CARGO) build $(MANIFEST) --release --quiet --examples
	$(BIN)/python -m pytest -n 2 --dist loadfile

# What most changes can break, in less than a minute: everything without a process, and Local() but for its slow tests.
FAST := dispatch frame honest liveness outbox queue recalls state text worlds
test-fast: build
	$(CARGO) test $(MANIFEST) --release --quiet --lib $(FAST:%=--test %)
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "not slow" tests/unit tests/pool

# joblib's own tests of Parallel, with skyward in the place of loky: the oldest joblib and the newest, both executors.
conformance: build
	$(BIN)/python tests/parallel/conformance/run.py --cache $(CACHE)/conformance

# Without optimization it is built in a minute, which its checks do not take longer for.
$(DENY):
	env -u CARGO_TARGET_DIR CARGO_PROFILE_DEV_DEBUG=0 \
	  $(CARGO) install --quiet --locked --debug cargo-deny --version $(DENY_VERSION) --root $(patsubst %/bin/cargo-deny,%,$@)

# The crates come last: without a network cargo-deny cannot be built, and all else is known by then.
lint: lint-code lint-house lint-crates

lint-code: $(STAMP)
	$(CARGO) fmt --manifest-path rust/Cargo.toml --check
	$(CARGO) clippy $(MANIFEST) --release --all-targets -- -D warnings
	$(CARGO) clippy $(MANIFEST) --release --features python -- -D warnings
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/basedpyright --project pyproject.toml
	$(BIN)/codespell
	$(BIN)/check-jsonschema --quiet --builtin-schema vendor.github-workflows .github/workflows/*.yml
	$(BIN)/check-jsonschema --quiet --builtin-schema vendor.dependabot .github/dependabot.yml
	$(BIN)/check-jsonschema --quiet --builtin-schema vendor.citation-file-format CITATION.cff
	$(BIN)/shellcheck --external-sources --source-path=SCRIPTDIR $$(git ls-files '*.sh')

# The rules of the house: directions of imports, sizes, private names.
lint-house: $(STAMP)
	PYTHONPATH=python $(BIN)/lint-imports
	$(BIN)/python tests/support/house.py

lint-crates: $(DENY)
	$(CARGO) fetch --quiet $(MANIFEST)
	$(DENY_CHECK) --frozen check bans licenses sources

# Known vulnerabilities, for which the databases of RustSec (on GitHub) and PyPI are asked: in the crates, and in the
# oldest and the newest packages that pyproject.toml admits.
audit: $(STAMP) $(DENY)
	$(BIN)/python -m pip install --quiet --group audit
	$(DENY_CHECK) --locked check
	for which in lowest-direct highest; do \
	  pinned=$(CACHE)/audit-$$which.txt; \
	  $(BIN)/uv pip compile --quiet --all-extras --generate-hashes --resolution $$which -o $$pinned pyproject.toml && \
	  $(BIN)/pip-audit --strict --disable-pip -r $$pinned || exit 1; done

format: $(STAMP)
	$(CARGO) fmt --manifest-path rust/Cargo.toml
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The opponents' packages are large, and in an environment of their own: no test needs them.
OPPONENTS := $(CACHE)/opponents
$(OPPONENTS)/.installed: pyproject.toml
	$(PYTHON) -m venv $(OPPONENTS)
	$(OPPONENTS)/bin/python -m pip install --quiet --upgrade pip
	$(OPPONENTS)/bin/python -m pip install --quiet --group bench
	touch $@

bench: build system $(OPPONENTS)/.installed
	$(BIN)/python benches/bench.py
	$(BIN)/python benches/ssh.py
	$(BIN)/python benches/ways.py
	$(BIN)/python benches/rekeys.py
	$(BIN)/python benches/modules.py
	$(BIN)/python benches/round_trips.py
	$(BIN)/python benches/progress.py
	$(BIN)/python benches/data.py --opponents $(OPPONENTS)/bin/python $(DATA)

# The chart of the README and the docs, from a run of its own: on a machine that does nothing else meanwhile.
chart: build system $(OPPONENTS)/.installed
	$(BIN)/python benches/data.py --opponents $(OPPONENTS)/bin/python --json $(CACHE)/chart.json start tiny shared
	$(BIN)/python benches/chart.py $(CACHE)/chart.json docs/_static/speed.svg docs/performance.md

# Whatever can die, be cut, stall or lie, at seeded moments: CHAOS="--only storm --seeds 20"; see tests/support/chaos.py.
# Rules that drop packets need root and nft, in a network namespace of their own; without them those rows are left out.
chaos: build system
	$(CARGO) build $(MANIFEST) --release --quiet --example embedded_server
	$(BIN)/python tests/support/chaos.py $(CHAOS)

# Ten rounds of grid searches at once against a serial run; the tests have two.
searches: build
	ROUNDS=10 $(BIN)/python -m pytest tests/parallel/test_searches.py

# Fuzz the decoder of frames, the deciders of both ends, and streams that are cut, each for FUZZ_SECONDS, or FUZZ_RUNS times. The last line has the
# number of all executions. libFuzzer needs a flag that stable Rust hides behind RUSTC_BOOTSTRAP.
fuzz:
	test -x $(CARGO_FUZZ) || env -u CARGO_TARGET_DIR $(CARGO) install cargo-fuzz --locked --debug --root $(CACHE)/tools
	@set -eo pipefail; cd rust; total=0; for target in $(FUZZ_TARGETS); do \
	  corpus=$(CACHE)/fuzz-corpus/$$target; seeds=fuzz/corpus/$$target; mkdir -p $$corpus; test -d $$seeds || seeds=; \
	  case $$target in frame) longest=70000;; *) longest=4000;; esac; \
	  RUSTC_BOOTSTRAP=1 CARGO_TARGET_DIR=$(CACHE)/fuzz $(CARGO_FUZZ) run --sanitizer $(FUZZ_SANITIZER) $$target \
	    $$corpus $$seeds -- $(FUZZ_BOUND) -max_len=$$longest -rss_limit_mb=4096 -timeout=20 -print_final_stats=1 -print_funcs=0 \
	    2>&1 | tee $(CACHE)/fuzz-$$target.log | grep -vE '(NEW|REDUCE|pulse|RELOAD) |NEW_FUNC|^"|[Rr]ecommended dictionary'; \
	  runs=$$(sed -n 's/stat::number_of_executed_units: *//p' $(CACHE)/fuzz-$$target.log); \
	  echo "$$target: $$runs executions"; total=$$((total + runs)); \
	done; echo "$$total executions without a fault"

# A source distribution and a manylinux wheel in dist/, and whether they are what users can install: sizes, tags, metadata, a
# new environment without a compiler. zig links against an old glibc, whatever this system's is. The tools are large, and
# in an environment of their own. DIST="--skip-sdist" leaves out that pip builds the source distribution. Files in a source
# distribution have a date of long ago, by which cargo would take what it built before for new: so that is forgotten first.
# zig would link an unwinder of its own into the wheel. Python until 3.13 ends threads by unwinding them with libgcc's, and a
# second unwinder makes that a crash at the end of a program: so libgcc_s is named.
DIST_TOOLS := $(CACHE)/dist-tools
$(DIST_TOOLS)/.installed: pyproject.toml
	$(PYTHON) -m venv $(DIST_TOOLS)
	$(DIST_TOOLS)/bin/python -m pip install --quiet --upgrade pip
	$(DIST_TOOLS)/bin/python -m pip install --quiet --group dist
	touch $@

dist: $(DIST_TOOLS)/.installed
	rm -rf dist $(CACHE)/dist/release/.fingerprint/skyward_lite-* $(CACHE)/dist/*/release/.fingerprint/skyward_lite-*
	PATH=$(DIST_TOOLS)/bin:$$PATH CARGO_TARGET_DIR=$(CACHE)/dist PYO3_PYTHON=$(DIST_TOOLS)/bin/python VIRTUAL_ENV=$(DIST_TOOLS) \
	  maturin build --quiet --release --strip --sdist --zig --compatibility manylinux_2_17 --out dist \
	  -- -C link-arg=$$(gcc -print-file-name=libgcc_s.so.1) 2> >(grep -v $(BACKEND_WARNING) >&2)
	CARGO_TARGET_DIR=$(CACHE)/dist env -u VIRTUAL_ENV -u PYO3_PYTHON \
	  $(DIST_TOOLS)/bin/python tests/support/distribution.py dist $(DIST)

# Set the version everywhere: make version VERSION=0.2.0
version:
	$(PYTHON) tests/support/release.py version $(VERSION)

# Warnings are errors. Read docs/_build/html/index.html.
docs: build
	$(BIN)/python docs/make_errors.py
	$(BIN)/python -m sphinx -q -W --keep-going -j auto docs docs/_build/html

clean:
	rm -rf docs/_build $(VENV)
