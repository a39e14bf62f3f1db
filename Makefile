# Two commands: `make demo` runs the main job, `make test` runs every test.
.PHONY: demo test
test:
	scripts/fetch-test-assets
	cargo test --release --workspace
