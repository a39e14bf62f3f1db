"""PgQueuer and Procrastinate, each as its documentation sets it up.

python_peers.py ENGINE PHASE URL [NUMBER] [WORKERS] prints one line of JSON.
"""

import asyncio
import json
import logging
import os
import sys
import time

logging.disable(logging.CRITICAL)
ENGINE, PHASE, URL = sys.argv[1:4]
NUMBER = int(sys.argv[4]) if len(sys.argv) > 4 else 1
WORKERS = int(sys.argv[5]) if len(sys.argv) > 5 else 1


class PgQueuerPeer:
    OPEN = "select exists (select from pgqueuer)"

    async def open(self):
        import asyncpg
        from pgqueuer.db import AsyncpgDriver
        from pgqueuer.queries import Queries

        self.connection = await asyncpg.connect(URL)
        self.queries = Queries(AsyncpgDriver(self.connection))

    async def setup(self):
        await self.queries.install()

    async def enqueue(self, count):
        if count == 1:
            await self.queries.enqueue("bench", b"{}")
        else:
            await self.queries.enqueue(["bench"] * count, [b"{}"] * count, [0] * count)

    async def work(self, entered):
        import asyncpg
        from pgqueuer.db import AsyncpgDriver
        from pgqueuer.qm import QueueManager
        from pgqueuer.queries import Queries

        async def manage():
            manager = QueueManager(Queries(AsyncpgDriver(await asyncpg.connect(URL))))

            @manager.entrypoint("bench")
            async def bench(job):
                entered()

            await manager.run(batch_size=10)

        await asyncio.gather(*(manage() for _ in range(min(WORKERS, 5))))


class ProcrastinatePeer:
    OPEN = "select exists (select from procrastinate_jobs where status in ('todo', 'doing'))"

    async def open(self):
        import procrastinate

        self.app = procrastinate.App(connector=procrastinate.PsycopgConnector(conninfo=URL, max_size=WORKERS + 4))
        self.entered = lambda: None

        @self.app.task(name="bench")
        async def bench():
            self.entered()

        self.task = bench
        await self.app.open_async()

    async def setup(self):
        await self.app.schema_manager.apply_schema_async()

    async def enqueue(self, count):
        if count == 1:
            await self.task.defer_async()
        else:
            await self.task.batch_defer_async(*({} for _ in range(count)))

    async def work(self, entered):
        self.entered = entered
        await self.app.run_worker_async(concurrency=WORKERS, install_signal_handlers=False, wait=True)


async def enqueue(peer):
    started = time.perf_counter()
    left = NUMBER
    while left > 0:
        await peer.enqueue(min(left, 1000))
        left -= 1000
    return {"jobs": NUMBER, "seconds": time.perf_counter() - started}


async def drain(peer):
    import psycopg

    count = 0

    def entered():
        nonlocal count
        count += 1

    client = await psycopg.AsyncConnection.connect(URL, autocommit=True)
    started = time.perf_counter()
    worker = asyncio.create_task(peer.work(entered))
    while count < NUMBER:
        if worker.done():
            raise SystemExit(f"the worker ended: {worker.exception()}")
        await asyncio.sleep(0.005)
    while not os.environ.get("QUEUE_BENCH_PART"):
        row = await (await client.execute(peer.OPEN)).fetchone()
        if not row[0]:
            break
        await asyncio.sleep(0.002)
    return {"jobs": count, "seconds": time.perf_counter() - started}


async def latency(peer):
    entries = asyncio.Queue()
    worker = asyncio.create_task(peer.work(lambda: entries.put_nowait(time.perf_counter())))
    await asyncio.sleep(1.5)
    taken = []
    for round_number in range(NUMBER + 5):
        asked = time.perf_counter()
        await peer.enqueue(1)
        entry = await entries.get()
        if round_number >= 5:
            taken.append((entry - asked) * 1e3)
        await asyncio.sleep(0.03)
    taken.sort()
    worker.cancel()

    def at(share):
        return taken[round((len(taken) - 1) * share)]

    return {"p50_ms": at(0.5), "p90_ms": at(0.9), "p99_ms": at(0.99), "max_ms": at(1)}


async def main():
    peer = {"pgqueuer": PgQueuerPeer, "procrastinate": ProcrastinatePeer}[ENGINE]()
    await peer.open()
    if PHASE == "setup":
        await peer.setup()
        told = {}
    else:
        told = await {"enqueue": enqueue, "drain": drain, "latency": latency}[PHASE](peer)
    print(json.dumps(told), flush=True)
    os._exit(0)


asyncio.run(main())
