# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

CARGO ?= cargo
# In all combinations; those that nothing else depends on, with none of the others and with all.
FEATURES = queue iommufd type1 translate test-utils
LEAF_FEATURES = acpi fdt serde embed event-manager vhost vhost-user

.PHONY: all install uninstall package msrv reproducible quick demo test check unit model hostvm features conformance bench
.PHONY: bench-docs felt fuzz fuzz-smoke campaign mutants agreement soak sanitize
.PHONY: public-api

# Where `make install` puts things, each after DESTDIR. For systemd to find the units: unitdir=/usr/lib/systemd/system
prefix ?= /usr/local
bindir ?= $(prefix)/bin
datadir ?= $(prefix)/share
docdir ?= $(datadir)/doc/virtio-iommu
mandir ?= $(datadir)/man
unitdir ?= $(docdir)/systemd
# Where the programs are.
BUILD ?= target/release
CARGO_HOME ?= $(HOME)/.cargo

# The programs, with nothing in them of where they were built.
all:
	RUSTFLAGS="$(RUSTFLAGS) --remap-path-prefix=$(CURDIR)=/virtio-iommu --remap-path-prefix=$(CARGO_HOME)=/cargo" \
		$(CARGO) build --release --locked --bins

install uninstall: export DESTDIR := $(DESTDIR)
install uninstall: export BUILD := $(BUILD)
install uninstall: export bindir := $(bindir)
install uninstall: export datadir := $(datadir)
install uninstall: export docdir := $(docdir)
install uninstall: export mandir := $(mandir)
install uninstall: export unitdir := $(unitdir)
install uninstall:
	@sh dist/install $@

# What a registry would get builds. It has no tests/hosts, copies of hosts' files that some tests read.
package:
	@$(CARGO) package --locked
	@echo "package: OK"

# With the oldest compiler that is promised.
msrv:
	@sh dist/msrv

# The last commit, built in two places: the same bytes.
reproducible:
	@sh dist/reproducible

# The device and one behind it beside an unmodified QEMU with a stock Debian kernel: no KVM, no IOMMU and no kernel to build.
quick:
	@sh tests/quick/run

# The whole path on one screen, in a host VM: no KVM and no IOMMU needed.
demo:
	@sh tests/hostvm/demo

# Everything. The host VM's pieces are fetched once; see tests/hostvm/run.
test: check unit model fuzz-smoke quick hostvm
	@echo "test: OK"

check:
	@echo "check: format, lints, documentation"
	@$(CARGO) fmt --all --check
	@$(CARGO) fmt --manifest-path fuzz/Cargo.toml --all --check
	@$(CARGO) clippy --quiet --all-targets --all-features -- -D warnings
	@$(CARGO) clippy --quiet --all-targets -- -D warnings
	@$(CARGO) clippy --quiet --all-targets --no-default-features -- -D warnings
	@$(CARGO) clippy --quiet --manifest-path fuzz/inputs/Cargo.toml --all-targets -- -D warnings
	@RUSTDOCFLAGS="-D warnings" $(CARGO) doc --quiet --no-deps --all-features
	@sh tests/bare-dependencies
	@sh tests/manual-pages
	@$(CARGO) test --quiet --all-features --test conventions -- links messages pages
	@$(MAKE) --no-print-directory features

# Combinations of features build without a warning: see the script.
features:
	@sh tests/feature-combinations "$(FEATURES)" "$(LEAF_FEATURES)"

unit:
	@echo "unit: tests that need no host"
	@$(CARGO) test --quiet --all-features
	@$(CARGO) test --quiet --no-default-features

# Interleavings of the translation path, by the model checker.
model:
	@echo "model: interleavings of lookups and unmaps"
	@RUSTFLAGS="$(RUSTFLAGS) --cfg loom" $(CARGO) test --quiet --release --no-default-features --features translate --lib \
		--target-dir target/loom translate::model

hostvm:
	@sh tests/hostvm/run

# Puts the statements of the specification that tests/spec checks into the documentation.
conformance:
	@UPDATE_CONFORMANCE=1 $(CARGO) test --quiet --no-default-features --features queue --test spec document
	@echo "conformance: OK"

# What things cost, beside what others would; needs valgrind. All of it, or those with a word in their names: ONLY=request/map.
bench:
	@$(CARGO) bench --quiet --features queue,translate,vhost-user --bench main -- --only "$(ONLY)"

# Puts the figures of the last complete run of that into the documentation.
bench-docs:
	@test -f target/bench/report.md || { echo "bench-docs: run make bench first" >&2; exit 1; }
	@sed -i -e '/^<!-- figures -->$$/,/^<!-- end of figures -->$$/{//!d}' -e '/^<!-- figures -->$$/r target/bench/report.md' \
		docs/performance.md
	@echo "bench-docs: OK, docs/performance.md has the figures of target/bench/report.md"

# What a guest with an assigned disk feels, beside QEMU's own virtio-iommu, in the host VM.
felt:
	@sh tests/hostvm/felt --poll-us=0 --poll-us=auto

# Sequences of requests with a failure at each call of the kernel, and requests and translations at the same time, each for so many
# seconds.
soak: export SOAK_SECONDS = $(SECONDS)
soak:
	@$(CARGO) test --release --all-features --lib -- --ignored --nocapture generated::soak
	@$(CARGO) test --release --all-features --lib -- --nocapture stress::nothing_is_touched
	@$(CARGO) test --release --all-features --test concurrency -- --nocapture
	@echo "soak: OK"

TARGET ?= requests
SECONDS ?= 60

# One fuzz target under the address sanitizer, on what earlier runs found and its seeds; needs a nightly compiler and cargo-fuzz.
fuzz:
	@sh fuzz/run $(TARGET) $(SECONDS)

# Every fuzz target from its seeds and regressions for a while, on the compiler that builds the crate, after all inputs that are kept,
# those of campaigns too.
fuzz-smoke:
	@echo "fuzz: inputs that are kept"
	@$(CARGO) test --quiet --manifest-path fuzz/inputs/Cargo.toml
	@sh fuzz/smoke $(if $(filter file,$(origin SECONDS)),10,$(SECONDS))

# Every fuzz target, or those named in TARGETS, for so many seconds each, and what is found kept: needs what fuzz does.
campaign:
	@fuzz/campaign $(SECONDS) $(TARGETS)

# Whether the tests notice changes to the code of a room, ROOM=device say, or to every fifth place in it, PART=1/5: needs cargo-mutants.
mutants:
	@tests/mutants $(ROOM) $(PART)

# Debug and release builds answer alike, in so many sequences of operations.
CASES ?= 1024
agreement:
	@tests/agreement $(CASES)

# The public items are those of docs/public-api.md; needs a nightly compiler and cargo-public-api.
public-api:
	@tests/public-api

# The tests that need no host under a sanitizer, SANITIZER=address or thread; needs a nightly compiler with rust-src.
SANITIZER ?= thread
sanitize:
	@tests/sanitize $(SANITIZER)
