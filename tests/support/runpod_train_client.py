"""Trains the miniature model through the local API, driven by RunPod's own Python client. Run by hand; needs no database.

    python -m venv venv && venv/bin/pip install runpod==1.12.0
    cargo build --release -p brightrun-worker
    target/release/brightrun demo --dir demo-folder                   # makes the model in demo-folder/model
    venv/bin/python tests/support/runpod_train_client.py target/release/brightrun demo-folder/model demo/sample.jsonl

Every call is the unchanged client's: run, status, run_sync, cancel, health.
"""

import functools
import http.server
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import threading
import time

BASE_MODEL = "local/miniature"


def serve(folder):
    """The data set's folder on this machine's loopback."""
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=folder)
    handler.log_message = lambda *_: None
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return f"http://127.0.0.1:{server.server_port}"


def start(program, model, folder):
    """The local API on a free port; returns the process and its base address."""
    environment = {
        **os.environ,
        "BRIGHTRUN_MODEL_PATH": str(pathlib.Path(model).resolve()),
        "BRIGHTRUN_MODEL_BASE_MODEL": BASE_MODEL,
        "BRIGHTRUN_STORAGE_LOCATION": f"local:{folder}/storage",
        "BRIGHTRUN_WORKER_WORK_DIR": f"{folder}/work",
        "BRIGHTRUN_WORKER_LOOPBACK_DATASETS": "true",
    }
    for name in ("DATABASE_URL", "SUPABASE_DB_URL", "POSTGRES_URL"):
        environment.pop(name, None)
    command = [str(pathlib.Path(program).resolve()), "worker", "--serve", "--port", "0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=folder, env=environment)
    return process, process.stdout.readline().strip().removeprefix("Serving ").removesuffix("/local")


def job(name, url, epochs):
    return {"input": {
        "job_id": name, "dataset_url": url,
        "hyperparameters": {"base_model": BASE_MODEL, "learning_rate": 1e-3, "batch_size": 4, "epochs": epochs, "rank": 8},
        "gpu_config": {"type": "A100-80GB", "count": 1},
    }}


def expect(name, got, wanted):
    if got != wanted:
        raise SystemExit(f"{name}: got {got!r}, wanted {wanted!r}")
    print(f"ok  {name}")


def until(run, is_so, what):
    deadline = time.monotonic() + 120
    while not is_so():
        if time.monotonic() > deadline:
            raise SystemExit(f"{run.job_id}: never {what}")
        time.sleep(0.05)


def main():
    program, model, dataset = sys.argv[1:4]
    folder = tempfile.mkdtemp(prefix="runpod-client-")
    pathlib.Path(folder, "work").mkdir()
    process, base = start(program, model, folder)
    import runpod
    runpod.api_key = "anything"
    runpod.endpoint_url_base = base
    endpoint = runpod.Endpoint("local")
    url = f"{serve(str(pathlib.Path(dataset).resolve().parent))}/{pathlib.Path(dataset).name}"
    try:
        output = endpoint.run_sync(job("sync", url, 1), timeout=300)
        expect("run_sync", (output["status"], output["progress"]), ("success", 100))
        adapter = pathlib.Path(output["model_files"]["adapter_model.safetensors"].removeprefix("file://"))
        expect("the adapter is there", adapter.stat().st_size > 1000, True)
        print(f"    {output['current_step']} steps, loss {output['model_metadata']['final_loss']:.3f}")

        run = endpoint.run(job("asynchronous", url, 2))
        until(run, lambda: run.status() != "IN_QUEUE", "IN_PROGRESS")
        expect("run and output", run.output(timeout=300)["status"], "success")
        expect("status", run.status(), "COMPLETED")

        run = endpoint.run(job("cancelled", url, 20))
        until(run, lambda: run.status() == "IN_PROGRESS", "IN_PROGRESS")
        time.sleep(1)
        expect("cancel", run.cancel(timeout=5)["status"], "CANCELLED")
        until(run, lambda: endpoint.health()["jobs"]["inProgress"] == 0, "stopped")

        refused = endpoint.run({"input": {"job_id": "refused"}})
        until(refused, lambda: refused.status() == "FAILED", "FAILED")
        told = json.loads(refused._fetch_job()["error"])["error_message"]
        expect("a refusal", told.startswith("Validation error: Missing required field: dataset_url"), True)
    finally:
        process.terminate()
        process.wait(timeout=30)


main()
