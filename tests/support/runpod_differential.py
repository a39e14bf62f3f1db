"""The same jobs and the same misbehaviour of the network, once for RunPod's own worker and once for ours. Run by hand.

    python -m venv venv && venv/bin/pip install runpod==1.12.0
    cargo test --release -p brightrun-worker --test runpod_process --no-run     # prints the program's path
    venv/bin/python tests/support/runpod_differential.py PROGRAM

Both workers run the same mock handler against a scripted control plane on this machine. Compared are what reaches the plane for each
case: final posts with their headers, progress, heartbeats. A difference that is not in DIFFERENCES, or one of them that is not found,
is an error. docs/reference/runpod.md explains each.
"""

import http.server
import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
import urllib.parse

HANDLER = textwrap.dedent("""
    import runpod
    def handler(job):
        given = job["input"]
        for value in given.get("progress", []):
            runpod.serverless.progress_update(job, value)
        if "fail" in given:
            raise ValueError(given["fail"])
        return given.get("return", {"echo": given})
    runpod.serverless.start({"handler": handler})
""")

# name, input (None: no such key), answers of the plane to its first result posts
CASES = [
    ("number", {"return": 5}, []),
    ("text", {"return": "é✓"}, []),
    ("list", {"return": [1, {"a": None}]}, []),
    ("null", {"return": None}, []),
    ("object", {"return": {"a": 1}}, []),
    ("empty object", {"return": {}}, []),
    ("error text", {"return": {"error": "m", "more": 1}}, []),
    ("empty error", {"return": {"error": "", "more": 1}}, []),
    ("error object", {"return": {"error": {"code": 1}}}, []),
    ("exception", {"fail": "The rank is 0"}, []),
    ("progress", {"progress": [{"step": 1}], "return": 1}, []),
    ("status 500", {"return": 1}, [500, 500]),
    ("status 429", {"return": 1}, [429]),
    ("reset", {"return": 1}, ["reset"]),
    ("no input", None, []),
]

# What is different on purpose, and why.
DIFFERENCES = {
    "error object": "an object in `error` was reported to end as COMPLETED without output: ours is always text",
    "exception": "the same keys, and `error_code` and `retryable` besides",
    "progress": "an update just before the end is dropped: sent beside the result it may arrive after it, and the job never ends",
    "status 429": "the SDK loses the result; ours repeats it",
    "reset": "the SDK loses the result; ours repeats it",
    "no input": "the SDK drops the job, which RunPod then hands out again and fails; ours runs it with {}",
}


class Plane(http.server.ThreadingHTTPServer):
    """Hands out one job after the other and writes down what it gets."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Requests)
        self.lock = threading.Lock()
        self.next_job = None
        self.answers = []
        self.posts = []
        self.pings = []
        self.takes = 0


class Requests(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def answer(self, status, body=b"", kind="application/json"):
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self):
        plane = self.server
        if "/job-take" in self.path:
            plane.takes += 1
            deadline = time.monotonic() + 5
            while time.monotonic() < deadline:
                with plane.lock:
                    job, plane.next_job = plane.next_job, None
                if job is not None:
                    return self.answer(200, json.dumps(job).encode())
                time.sleep(0.01)
            return self.answer(204)
        if "/ping" in self.path:
            plane.pings.append(self.path)
            return self.answer(200)
        time.sleep(2)
        return self.answer(204)

    def do_POST(self):
        plane = self.server
        body = self.rfile.read(int(self.headers["Content-Length"]))
        parsed = json.loads(body)
        is_progress = isinstance(parsed, dict) and parsed.get("status") == "IN_PROGRESS"
        with plane.lock:
            status = plane.answers.pop(0) if plane.answers and not is_progress else 200
            if status == 200:
                query = urllib.parse.parse_qs(urllib.parse.urlsplit(self.path).query)
                headers = {name: self.headers.get(name) for name in ("Authorization", "Content-Type", "charset")}
                plane.posts.append((is_progress, parsed, query.get("isStream"), headers))
        if status == "reset":
            self.close_connection = True
            return self.connection.close()
        return self.answer(status)


def normalized(body):
    """Without what names a machine or a version; the text of an exception becomes its keys."""
    if isinstance(body, dict) and isinstance(body.get("error"), str) and body["error"].startswith("{"):
        inner = json.loads(body["error"])
        if isinstance(inner, dict) and "error_type" in inner:
            return {**body, "error": sorted(inner)}
    return body


def run(command, environment):
    plane = Plane()
    threading.Thread(target=plane.serve_forever, daemon=True).start()
    base = f"http://127.0.0.1:{plane.server_port}/v2/ep1"
    variables = {
        **os.environ, **environment,
        "RUNPOD_WEBHOOK_GET_JOB": f"{base}/job-take/$ID?gpu=SIM",
        "RUNPOD_WEBHOOK_POST_OUTPUT": f"{base}/job-done/$RUNPOD_POD_ID/$ID?gpu=SIM",
        "RUNPOD_WEBHOOK_PING": f"{base}/ping/$RUNPOD_POD_ID?gpu=SIM",
        "RUNPOD_PING_INTERVAL": "1000", "RUNPOD_AI_API_KEY": "canary-not-a-real-key", "RUNPOD_POD_ID": "pod1",
        "RUNPOD_SKIP_AUTO_SYSTEM_CHECKS": "true", "RUNPOD_SKIP_GPU_CHECK": "true",
    }
    worker = subprocess.Popen(command, env=variables, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    seen = {}
    for place, (name, given, answers) in enumerate(CASES):
        job = {"id": f"job-{place}"} if given is None else {"id": f"job-{place}", "input": given}
        with plane.lock:
            plane.posts, plane.answers, plane.next_job = [], list(answers), job
        deadline = time.monotonic() + 15
        while time.monotonic() < deadline and not any(not progress for progress, *_ in plane.posts):
            time.sleep(0.02)
        # An update may come late: the SDK sends it from a thread of its own.
        time.sleep(0.3)
        with plane.lock:
            finals = [(normalized(body), stream, headers) for progress, body, stream, headers in plane.posts if not progress]
            updates = [body for progress, body, *_ in plane.posts if progress]
        seen[name] = {"finals": finals, "progress": updates}
    seen["heartbeat"] = sorted({urllib.parse.urlsplit(path).path for path in plane.pings})
    worker.send_signal(signal.SIGTERM)
    try:
        worker.wait(timeout=10)
    except subprocess.TimeoutExpired:
        worker.kill()  # The SDK waits for its open long polls.
    plane.shutdown()
    return seen


def main():
    theirs = run([sys.executable, "-c", HANDLER], {})
    ours = run([os.path.abspath(sys.argv[1]), "--as-worker"], {})
    found, wrong = [], []
    for name in theirs:
        if theirs[name] == ours[name]:
            print(f"same       {name}")
            continue
        found.append(name)
        print(f"different  {name}: {DIFFERENCES.get(name, 'NOT EXPECTED')}")
        print(f"             SDK  {json.dumps(theirs[name], ensure_ascii=False)}")
        print(f"             ours {json.dumps(ours[name], ensure_ascii=False)}")
        if name not in DIFFERENCES:
            wrong.append(name)
    wrong += [name for name in DIFFERENCES if name not in found]
    if wrong:
        raise SystemExit(f"unexpected, or expected and not found: {', '.join(wrong)}")


main()
