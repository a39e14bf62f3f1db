# Two commands: `make demo` runs the main job, `make test` runs every test. Both set up what they need first.
export PATH := $(HOME)/.cargo/bin:$(PATH)
.PHONY: demo test sanitize setup-demo setup-test

demo: setup-demo
	cargo build --release --locked -p brightrun-worker
	./target/release/brightrun demo

test: setup-test
	cargo fmt --check
	cargo clippy --release --locked --workspace --all-targets -- -D warnings
	cargo test --release --locked --workspace --no-fail-fast

# The conformance suite on the emulated kernels under the address sanitizer, beside the checks of undefined behaviour that they are
# always compiled with. Cases of more work than this many multiply-adds are left out: 2 million keep every tile's edges.
SANITIZED_WORK ?= 2000000
sanitize:
	cargo test --release --locked -p brightrun-kernels --test conformance --no-run
	LD_PRELOAD="$$(g++ -print-file-name=libasan.so)" ASAN_OPTIONS=detect_leaks=0 BRIGHTRUN_EMULATION_SANITIZE=1 \
	BRIGHTRUN_BACKENDS=emulated BRIGHTRUN_REQUIRED_BACKENDS=emulated BRIGHTRUN_MOST_WORK=$(SANITIZED_WORK) \
	cargo test --release --locked -p brightrun-kernels --test conformance

setup-demo:
	@scripts/setup demo

setup-test:
	@scripts/setup test
	@scripts/fetch-test-assets
