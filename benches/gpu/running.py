"""A run of `scripts/gpu-check`: its files, its programs, its time."""
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time

RESULTS, LOG, GOALS, GOALS_JSON = "results.jsonl", "log.txt", "goals.md", "goals.json"


class Missing(Exception):
    """What a part needs and this machine does not have: the part is absent, neither passed nor failed."""


class Run:
    """What all parts share. DIR gets four files, however many programs run; all else is in a scratch folder that goes with the run."""

    def __init__(self, folder, out, minutes, within=None, device="cuda", only_cases=""):
        self.folder, self.out, self.device, self.only_cases = folder, os.path.abspath(out), device, only_cases
        os.makedirs(self.out, exist_ok=True)
        for name in (RESULTS, LOG):
            open(os.path.join(self.out, name), "w", encoding="utf-8").close()
        self.scratch = tempfile.mkdtemp(prefix="gpu-check-")
        self.minutes, self.lines, self.no_device = minutes, [], None
        self.end = time.monotonic() + 60 * within if within else float("inf")
        self.deadline = self.end
        self.environment = dict(
            os.environ,
            BRIGHTRUN_KERNELS=self.path("kernels"),
            BRIGHTRUN_GOLDEN_DIR=os.environ.get("BRIGHTRUN_GOLDEN_DIR", self.path("fixtures")),
            PYTHONPATH=os.pathsep.join(filter(None, [self.path("site"), os.environ.get("PYTHONPATH")])),
            PYTHONDONTWRITEBYTECODE="1",
            RUST_BACKTRACE="0",
        )
        if not self.is_trial:
            # What is compiled for the device goes with the run; what a trial compiles for the host is kept where it always is.
            self.environment["BRIGHTRUN_KERNEL_CACHE"] = os.path.join(self.scratch, "cache")
        compiler = find_nvrtc()
        if compiler and "BRIGHTRUN_NVRTC" not in self.environment:
            self.environment["BRIGHTRUN_NVRTC"] = compiler

    @property
    def is_trial(self):
        """Whether this only tries the parts out, at small sizes, where there is no GPU."""
        return self.device != "cuda"

    def path(self, name):
        return os.path.join(self.folder, name)

    def program(self, name):
        if not os.path.exists(self.path(name)):
            raise Missing(f"{name} is not in the pack")
        return self.path(name)

    def brightrun(self, *words):
        return [self.program("brightrun"), "--device", self.device, *words]

    def say(self, line):
        self.lines.append(line)
        with open(os.path.join(self.out, RESULTS), "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def seconds_left(self):
        return max(self.deadline - time.monotonic(), 1)

    def command(self, words, more=None, on_line=None):
        """Runs a program for as long as its part has left: (exit status, output). `on_line` sees each line when it is written."""
        with open(os.path.join(self.out, LOG), "a", encoding="utf-8") as log:
            log.write("$ " + " ".join(words) + "\n")
            log.flush()
            try:
                process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, cwd=self.scratch, text=True,
                                           errors="replace", env=dict(self.environment, **(more or {})))
            except OSError as error:
                log.write(f"{error}\n")
                return str(error), ""
            late = threading.Event()
            timer = threading.Timer(self.seconds_left(), lambda: (late.set(), process.kill()))
            timer.start()
            output = []
            try:
                for line in process.stdout:
                    output.append(line)
                    log.write(line)
                    log.flush()
                    if on_line:
                        on_line(line)
                status = process.wait()
            finally:
                timer.cancel()
            return ("out of time" if late.is_set() else status), "".join(output)

    def part(self, name, work):
        """Runs one part: True if it passed, False if it failed, None if it is absent."""
        begin = time.monotonic()
        self.deadline = min(begin + 60 * self.minutes[name], self.end)
        problem, passed = None, True
        try:
            if begin >= self.end:
                raise Missing("no time was left")
            if self.no_device and name != "devices":
                raise Missing(self.no_device)
            problem = work(self)
            passed = problem is None
        except Missing as reason:
            problem, passed = str(reason), None
        except Exception as error:  # a part that breaks must not take the others with it
            problem, passed = f"{type(error).__name__}: {error}", False
        self.say({"part": name, "passed": passed, "problem": problem, "seconds": round(time.monotonic() - begin, 1)})
        word = {True: "ok    ", False: "FAIL  ", None: "absent"}[passed]
        print(f"{word}  {name}{'' if problem is None else ': ' + problem}", flush=True)
        return passed

    def finish(self):
        shutil.rmtree(self.scratch, ignore_errors=True)


def find_nvrtc():
    """A folder with NVRTC, which only kernels that were not packed for this GPU need."""
    roots = [os.path.join(place, "nvidia") for place in sys.path]
    for root in [*roots, "/usr/local/cuda/lib64", "/usr/local/cuda/targets/x86_64-linux/lib"]:
        for place, _, names in os.walk(root):
            if any(name.startswith("libnvrtc.so") for name in names):
                return place
    return None


def last_lines(text, count=3):
    return " | ".join(line.strip() for line in text.strip().splitlines()[-count:])[:600]


def as_json(line):
    try:
        value = json.loads(line)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


def smi(fields):
    try:
        done = subprocess.run(["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"], capture_output=True, text=True, timeout=20)
        return done.stdout.strip()
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)


class Utilisation:
    """The share of time in which the GPU ran any kernel, and its memory, as nvidia-smi sees them every tenth of a second."""

    # The counter looks back over up to a second, which for the first samples lies before what is measured.
    LOOKS_BACK = 0.5

    def __enter__(self):
        words = ["nvidia-smi", "--query-gpu=utilization.gpu,memory.used", "--format=csv,noheader,nounits", "-lms", "100"]
        self.samples, self.process = [], None
        try:
            self.process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        except OSError:
            return self
        self.reader = threading.Thread(target=self.read)
        self.reader.start()
        return self

    def read(self):
        for line in self.process.stdout:
            cells = [cell.strip() for cell in line.split(",")]
            if len(cells) == 2 and all(cell.isdigit() for cell in cells):
                self.samples.append((time.monotonic(), int(cells[0]), int(cells[1])))

    def __exit__(self, *_):
        if self.process is not None:
            self.process.terminate()
            self.reader.join()

    def idle_share(self, begin, end):
        busy = [busy for at, busy, _ in self.samples if begin + self.LOOKS_BACK <= at <= end]
        return 1 - sum(busy) / len(busy) / 100 if busy else None

    def most_mib(self):
        return max((memory for *_, memory in self.samples), default=None)
