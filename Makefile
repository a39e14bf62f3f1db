# Two commands: `make demo` runs the main job, `make test` runs every test.
.PHONY: demo test
test:
	cargo test --release --workspace
