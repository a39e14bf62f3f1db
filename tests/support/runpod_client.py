"""Drives the local API with RunPod's own Python client. Run by hand; the Rust tests need no Python.

    python -m venv venv && venv/bin/pip install runpod==1.12.0
    cargo test --release -p brightrun-worker --test runpod_process --no-run     # prints the program's path
    venv/bin/python tests/support/runpod_client.py PROGRAM

The client is used unchanged: only its base address is set. Every call that it offers is made.
"""

import asyncio
import os
import subprocess
import sys
import time


def start(program, *arguments):
    """A local API on a free port; returns the process and its base address."""
    command = [program, "--rp_serve_api", "--rp_api_host=127.0.0.1", "--rp_api_port", "0", "--rp_api_concurrency=1"]
    process = subprocess.Popen([*command, *arguments], stdout=subprocess.PIPE, text=True)
    return process, f"http://{process.stdout.readline().strip()}/v2"


def expect(name, got, wanted):
    if got != wanted:
        raise SystemExit(f"{name}: got {got!r}, wanted {wanted!r}")
    print(f"ok  {name}")


def until(job, status):
    deadline = time.monotonic() + 30
    while job.status() != status:
        if time.monotonic() > deadline:
            raise SystemExit(f"{job.job_id}: {job.status()} instead of {status}")
        time.sleep(0.02)


def plain(endpoint):
    job = endpoint.run({"input": {"return": {"loss": 0.5}}})
    expect("run and output", job.output(timeout=30), {"loss": 0.5})
    expect("status", job.status(), "COMPLETED")
    expect("run_sync", endpoint.run_sync({"input": {"return": [1, "é"]}}, timeout=30), [1, "é"])
    expect("an input without the wrapper", endpoint.run_sync({"a": 1}, timeout=30), {"echo": {"a": 1}})
    # The client wraps an empty input once more.
    expect("an empty input", endpoint.run_sync({"input": {}}, timeout=30), {"echo": {"input": {}}})
    failed = endpoint.run({"input": {"fail": "The rank is 0"}})
    until(failed, "FAILED")
    expect("the output of a failed job", failed.output(timeout=5), None)
    blocking, waiting = endpoint.run({"input": {"wait": 1}}), endpoint.run({"input": {"return": 1}})
    until(blocking, "IN_PROGRESS")
    health = endpoint.health()
    expect("health", (health["jobs"]["inProgress"], health["jobs"]["inQueue"], health["workers"]["running"]), (1, 1, 1))
    expect("purge_queue", endpoint.purge_queue(), {"removed": 1, "status": "completed"})
    expect("the purged job", waiting.status(), "CANCELLED")
    expect("cancel", blocking.cancel(timeout=5)["status"], "CANCELLED")
    expect("the cancelled job", blocking.status(), "CANCELLED")
    expect("the slot is free again", endpoint.run_sync({"input": {"return": 2}}, timeout=30), 2)


def streaming(endpoint):
    job = endpoint.run({"input": {"chunks": ["a", "b", {"c": 3}], "return": None}})
    expect("stream", list(job.stream()), ["a", "b", {"c": 3}])
    expect("aggregated output", job.output(timeout=5), ["a", "b", {"c": 3}])


async def asynchronous(base):
    import aiohttp
    import runpod

    runpod.endpoint_url_base = base
    from runpod import AsyncioEndpoint

    async with aiohttp.ClientSession() as session:
        endpoint = AsyncioEndpoint("any", session)
        job = await endpoint.run({"return": "async"})
        expect("asyncio run and output", await job.output(timeout=30), "async")
        expect("asyncio health", (await endpoint.health())["jobs"]["failed"], 1)


def main():
    if len(sys.argv) != 2:
        raise SystemExit(__doc__)
    processes = []
    try:
        value, value_base = start(sys.argv[1])
        processes.append(value)
        stream, stream_base = start(sys.argv[1], "--stream")
        processes.append(stream)
        os.environ["RUNPOD_ENDPOINT_BASE_URL"] = value_base
        import runpod

        runpod.api_key = "canary-not-a-real-key-0000"
        expect("version", runpod.__version__, "1.12.0")
        plain(runpod.Endpoint("any"))
        asyncio.run(asynchronous(value_base))
        runpod.endpoint_url_base = stream_base
        streaming(runpod.Endpoint("any"))
    finally:
        for process in processes:
            process.kill()
            process.wait()
    print("RunPod's client drives the local API")


if __name__ == "__main__":
    main()
