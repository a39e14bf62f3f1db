// pg-boss and graphile-worker (Node), each as its documentation sets it up for rate.
// node node_peers.mjs ENGINE PHASE URL [NUMBER] [WORKERS] prints one line of JSON.
import pg from "pg";

const [engine, phase, url, numberText = "1", workersText = "1"] = process.argv.slice(2);
const number = Number(numberText);
const workers = Number(workersText);
const sleep = (milliseconds) => new Promise((resolve) => setTimeout(resolve, milliseconds));

async function pgBoss() {
  const { PgBoss } = await import("pg-boss");
  const boss = new PgBoss({ connectionString: url, max: 10, useListenNotify: true });
  boss.on("error", (error) => console.error(error));
  await boss.start();
  return {
    open: "select exists (select from pgboss.job where state < 'completed' and name = 'bench') as open",
    setup: () => boss.createQueue("bench", { notify: true }),
    enqueue: async (count) => {
      if (count === 1) await boss.send("bench", {});
      else await boss.insert("bench", Array.from({ length: count }, () => ({ data: {} })));
    },
    work: (entered) =>
      boss.work(
        "bench",
        { batchSize: 50, localConcurrency: workers, burstWhenBatchFull: true, pollingIntervalSeconds: 0.5 },
        async (jobs) => jobs.forEach(() => entered()),
      ),
  };
}

async function graphileWorker() {
  const { run, makeWorkerUtils, Logger } = await import("graphile-worker");
  const logger = new Logger(() => () => {});
  const utils = await makeWorkerUtils({ connectionString: url, logger });
  return {
    open: "select exists (select from graphile_worker._private_jobs) as open",
    setup: () => utils.migrate(),
    enqueue: async (count) => {
      if (count === 1) await utils.addJob("bench", {});
      else await utils.addJobs(Array.from({ length: count }, () => ({ identifier: "bench", payload: {} })));
    },
    work: (entered) =>
      run({
        logger,
        noHandleSignals: true,
        taskList: { bench: async () => entered() },
        preset: {
          worker: {
            connectionString: url,
            concurrentJobs: workers,
            maxPoolSize: 10,
            pollInterval: 1000,
            localQueue: { size: 500 },
            completeJobBatchDelay: 1,
          },
        },
      }),
  };
}

const peer = engine === "pg-boss" ? await pgBoss() : await graphileWorker();
const seconds = (since) => Number(process.hrtime.bigint() - since) / 1e9;

const phases = {
  async setup() {
    await peer.setup();
    return {};
  },
  async enqueue() {
    const started = process.hrtime.bigint();
    for (let left = number; left > 0; left -= 1000) await peer.enqueue(Math.min(left, 1000));
    return { jobs: number, seconds: seconds(started) };
  },
  async drain() {
    const client = new pg.Client({ connectionString: url });
    await client.connect();
    let count = 0;
    const started = process.hrtime.bigint();
    await peer.work(() => (count += 1));
    while (count < number) await sleep(5);
    if (!process.env.QUEUE_BENCH_PART) {
      while ((await client.query(peer.open)).rows[0].open) await sleep(2);
    }
    return { jobs: count, seconds: seconds(started) };
  },
  async latency() {
    let told = () => {};
    await peer.work(() => told(process.hrtime.bigint()));
    await sleep(1500);
    const taken = [];
    for (let round = 0; round < number + 5; round += 1) {
      const entry = new Promise((resolve) => (told = resolve));
      const asked = process.hrtime.bigint();
      await peer.enqueue(1);
      const milliseconds = Number((await entry) - asked) / 1e6;
      if (round >= 5) taken.push(milliseconds);
      await sleep(30);
    }
    taken.sort((a, b) => a - b);
    const at = (share) => taken[Math.round((taken.length - 1) * share)];
    return { p50_ms: at(0.5), p90_ms: at(0.9), p99_ms: at(0.99), max_ms: at(1) };
  },
};

console.log(JSON.stringify(await phases[phase]()));
process.exit(0);
