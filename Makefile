# Verbs of the project. `make` alone lists them.

GO       ?= go
PREFIX   ?= /usr/local
DESTDIR  ?=
RELEASE  ?= $(shell git describe --tags --always --dirty 2>/dev/null || echo dev)
TAGS     := containers_image_openpgp,nri_no_wasm
BIN      := bin
CYCLES   ?= 200
CUTS     ?= 100
KILLS    ?= 500
SOAK     ?= 15m
FUZZTIME ?= 10s

# Everything is static: cgo is off, and signatures are checked in Go (the first
# tag). The second one leaves out WebAssembly, for which no plugin is written.
export CGO_ENABLED := 0
export GOFLAGS := -buildvcs=false -tags=$(TAGS)

STATICCHECK := honnef.co/go/tools/cmd/staticcheck@v0.8.2
# What the tests and the demo run: an OCI runtime, CNI plugins and what they
# call, a static shell for images, a C compiler for the race detector.
PACKAGES := runc containernetworking-plugins iptables iproute2 busybox-static ca-certificates gcc libc6-dev libseccomp-dev pkg-config e2fsprogs xfsprogs
# Debian's runc is the oldest that berth supports; the tests run with this one,
# too, as only it has idmapped mounts and is what native execs are like.
RUNC        := github.com/opencontainers/runc@v1.5.2
NEW_RUNC    := $(CURDIR)/$(BIN)/tools/runc-$(lastword $(subst @, ,$(RUNC)))/runc
UNIT      = $(shell $(GO) list ./... 2>/dev/null | grep -v '/test/')

.DEFAULT_GOAL := help
.PHONY: help build runc install deps test unit race conformance crash power soak demo lint fuzz bench bench-pull docs clean

help: ## list the verbs
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):[^#]*## /\1\t/' | expand -t 14

build: ## build berthd, berth, berth-shim and berth-init into ./bin
	@mkdir -p $(BIN)
	$(GO) build -trimpath -ldflags '-s -w -X main.release=$(RELEASE)' -o $(BIN)/ ./cmd/...

install: build ## install below PREFIX (/usr/local), with the systemd unit
	install -d $(DESTDIR)$(PREFIX)/bin $(DESTDIR)$(PREFIX)/libexec/berth $(DESTDIR)/etc/berth $(DESTDIR)/etc/systemd/system
	install -m 0755 $(BIN)/berthd $(BIN)/berth $(DESTDIR)$(PREFIX)/bin/
	install -m 0755 $(BIN)/berth-shim $(BIN)/berth-init $(DESTDIR)$(PREFIX)/libexec/berth/
	install -m 0644 packaging/berthd.service $(DESTDIR)/etc/systemd/system/berthd.service

deps: ## install what tests and demo need (Debian packages; as root)
	@missing=; for p in $(PACKAGES); do dpkg -s $$p >/dev/null 2>&1 || missing="$$missing $$p"; done; \
	if [ -z "$$missing" ]; then exit 0; fi; \
	if [ "$$(id -u)" != 0 ]; then echo "deps: not root, left out:$$missing"; exit 0; fi; \
	echo "deps: installing$$missing"; \
	apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $$missing >/dev/null

test: deps lint unit race conformance ## everything: lint, unit and integration tests, race detector, conformance
	@if [ "$$(id -u)" != 0 ]; then echo "make test: not root, so every test that needs root was skipped"; fi

runc: $(NEW_RUNC) ## build the current runc that the tests use beside the installed one

$(NEW_RUNC):
	@if ! pkg-config --exists libseccomp; then echo "runc: no libseccomp-dev, left out: tests with a current runc"; exit 0; fi; \
	echo "runc: building $(RUNC)"; \
	GOFLAGS= CGO_ENABLED=1 GOBIN=$(dir $@) $(GO) install -tags seccomp $(RUNC)

unit: deps $(NEW_RUNC) ## unit and integration tests
	RUNTIME=$$(test -x $(NEW_RUNC) && echo $(NEW_RUNC)) $(GO) test -timeout 15m $(UNIT) ./test/deps ./test/registry

race: deps ## the same with the race detector, where there is a C compiler
	CGO_ENABLED=1 $(GO) test -race -timeout 20m $(filter-out %/shim/shimd %/cmd/berth-shim %/cmd/berth-init,$(UNIT))

conformance: deps $(NEW_RUNC) ## black-box tests over the socket, with the oldest and a current runc; the upstream critest if it is on PATH
	$(GO) test -timeout 20m -v ./test/critest ./test/crash | grep -vE '^(=== | +--- (PASS|SKIP)|--- PASS)'; exit $${PIPESTATUS[0]}
	if [ -x $(NEW_RUNC) ]; then BERTH_RUNC=$(NEW_RUNC) $(GO) test -timeout 20m -v ./test/critest | grep -vE '^(=== |    --- (PASS|SKIP)|--- PASS)'; exit $${PIPESTATUS[0]}; fi

crash: deps ## every step broken in every way; CYCLES (200) lives with kill -9 at random
	BERTH_CRASH_MATRIX=1 $(GO) test -timeout 60m -v -run 'Matrix$$|Clock$$' ./test/crash | grep -vE '^ *(=== |--- PASS)'; exit $${PIPESTATUS[0]}
	BERTH_CRASH_CYCLES=$(CYCLES) $(GO) test -timeout 60m -v -run Cycles ./test/crash

power: deps ## pulls and removals with CUTS (100) power cuts on ext4 and xfs, KILLS (500) of berthd
	BERTH_POWER_CUTS=$(CUTS) $(GO) test -timeout 60m -v -run PowerLoss ./imageservice
	BERTH_PULL_KILLS=$(KILLS) $(GO) test -timeout 60m -v -run PullKilled ./test/crash

soak: deps ## SOAK (15m) of ten clients and random kills, each answer checked against a model
	BERTH_SOAK=$(SOAK) $(GO) test -timeout 0 -v -run 'Soak$$' ./test/crash

demo: deps build ## a pod from pull to removal, with a killed daemon in between
	$(GO) run ./test/demo -bin $(BIN)

lint: ## gofmt, go vet, staticcheck
	@out=$$(gofmt -l .); if [ -n "$$out" ]; then echo "not gofmt-ed:"; echo "$$out"; exit 1; fi
	$(GO) vet ./...
	$(GO) run $(STATICCHECK) ./...

fuzz: ## each fuzz target for FUZZTIME (10s)
	@for p in $$(grep -rl --include=*_test.go '^func Fuzz' . | xargs -n1 dirname | sort -u); do \
	  for f in $$(grep -h '^func Fuzz' $$p/*_test.go | sed -E 's/func (Fuzz[A-Za-z0-9_]*).*/\1/'); do \
	    echo "$$p $$f"; $(GO) test -run '^$$' -fuzz "^$$f$$" -fuzztime $(FUZZTIME) -fuzzminimizetime 100x $$p || exit 1; done; done

bench: ## what pods cost, through CRI; ARGS such as '-endpoint a=unix:///… -endpoint b=unix:///…', '-cases start,exec', '-dir DIR'
	$(GO) run ./test/bench/life $(ARGS)

bench-pull: ## pulls and removals through CRI; ARGS such as '-endpoint a=unix:///… -endpoint b=unix:///…', '-rounds 9', '-dir DIR'
	$(GO) run ./test/bench/pull $(ARGS)

docs: ## write docs/configuration.md and the golden files anew
	$(GO) test ./cmd/berthd -run Documentation -update

clean: ## remove what was built
	rm -rf $(BIN)

conformance race crash: SHELL := /bin/bash
