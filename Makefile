# Two commands: `make demo` runs the main job, `make test` runs every test. Both set up what they need first.
export PATH := $(HOME)/.cargo/bin:$(PATH)
.PHONY: demo test setup-demo setup-test

demo: setup-demo
	cargo build --release --locked -p brightrun-worker
	./target/release/brightrun demo

test: setup-test
	cargo fmt --check
	cargo clippy --release --locked --workspace --all-targets -- -D warnings
	cargo test --release --locked --workspace --no-fail-fast

setup-demo:
	@scripts/setup demo

setup-test:
	@scripts/setup test
	@scripts/fetch-test-assets
