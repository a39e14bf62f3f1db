//! What every test needs: a fresh database with the schema, a clock to move, a condition to await.

use std::future::Future;
use std::time::Duration;

use brightrun_queue::private_server::testing::fresh_database;
use brightrun_queue::{ClaimRequest, Claimed, Lease, NewJob, Queue, QueueConfig};
use serde_json::{Value, json};
use tokio::time::Instant;
use tokio_postgres::{Client, NoTls};
use uuid::Uuid;

/// A lease no test outlives.
pub const LONG: Duration = Duration::from_secs(600);

/// The engine's section of the schema file, which must work alone.
pub fn engine_section() -> String {
    let file = std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/../schema.sql")).unwrap();
    let start = file.find("-- >>> engine").unwrap();
    let end = file.find("-- <<< engine").unwrap();
    file[start..end].to_owned()
}

/// A database with the engine in it.
pub struct Database {
    pub url: String,
    pub queue: Queue,
}

pub async fn database() -> Database {
    let url = fresh_database("engine").await.unwrap();
    let config = QueueConfig::new(&url).unwrap().pool_size(8);
    let queue = Queue::connect(&config).await.unwrap();
    queue.migrate(&engine_section()).await.unwrap();
    Database { url, queue }
}

impl Database {
    /// A plain connection as the owner.
    pub async fn client(&self) -> Client {
        connect(&self.url).await
    }

    /// A connection whose clock runs `ahead`, a Postgres interval.
    pub async fn later(&self, ahead: &str) -> Client {
        let client = self.client().await;
        client
            .batch_execute(&format!("set brightrun.test_now_offset = '{ahead}'"))
            .await
            .unwrap();
        client
    }

    /// Sweeps with the clock `ahead`. The gap rule is out of the way: see `lease_expiry` for that.
    pub async fn sweep_at(&self, ahead: &str) -> Vec<(Uuid, String)> {
        let rows = self
            .later(ahead)
            .await
            .query(
                "select job_id, state from brightrun.rescue_expired(100, interval '1 year')",
                &[],
            )
            .await
            .unwrap();
        rows.iter().map(|row| (row.get(0), row.get(1))).collect()
    }

    pub async fn enqueue(&self, kind: &str) -> Uuid {
        self.queue.enqueue(&NewJob::new(kind, json!({}))).await.unwrap()
    }

    pub async fn claim(&self, worker: &str, kind: &str, limit: usize) -> Vec<Claimed> {
        self.queue.claim(&request(worker, &[kind], limit)).await.unwrap()
    }

    /// Enqueues one job and claims it.
    pub async fn running(&self, kind: &str) -> Lease {
        let id = self.enqueue(kind).await;
        let claimed = self.queue.claim_job("holder", id, LONG).await.unwrap().unwrap();
        claimed.lease
    }

    pub async fn state(&self, id: Uuid) -> &'static str {
        self.queue.status(id).await.unwrap().unwrap().state.name()
    }

    pub async fn event_names(&self, id: Uuid) -> Vec<String> {
        let events = self.queue.events(id, 0).await.unwrap();
        events.into_iter().map(|event| event.event).collect()
    }

    /// Lets a scheduled job's time come.
    pub async fn make_due(&self, id: Uuid) {
        let changed = self
            .client()
            .await
            .execute("update brightrun.ready set run_at = now() where job_id = $1", &[&id])
            .await
            .unwrap();
        assert_eq!(changed, 1, "the job was not waiting");
    }

    /// A projector for `kind` that writes what it is told into `public.told`, raises on an event
    /// named in `public.told_raises`, and locks the app's row of the job.
    pub async fn with_projector(&self, kind: &str) {
        self.client()
            .await
            .batch_execute(&format!(
                "create table if not exists public.app (id uuid primary key, status text);
                 create table if not exists public.told (seq serial, job_id uuid, event text, detail jsonb);
                 create table if not exists public.told_raises (event text);
                 create or replace function public.project(p_job uuid, p_event text, p_detail jsonb) returns void
                 language plpgsql as $$
                 begin
                     if exists (select from public.told_raises where event = p_event) then
                         raise exception 'the projector does not like %', p_event using errcode = 'P0042';
                     end if;
                     update public.app set status = p_event where id = p_job and status is distinct from 'cancelled';
                     insert into public.told (job_id, event, detail) values (p_job, p_event, p_detail);
                 end $$;
                 insert into brightrun.job_kind (kind, projector) values ('{kind}', 'public.project')
                 on conflict (kind) do update set projector = excluded.projector;"
            ))
            .await
            .unwrap();
    }

    pub async fn raise_on(&self, event: &str) {
        self.client()
            .await
            .execute("insert into public.told_raises values ($1)", &[&event])
            .await
            .unwrap();
    }

    /// What the projector was told about a job, in order.
    pub async fn told(&self, id: Uuid) -> Vec<(String, Value)> {
        let rows = self
            .client()
            .await
            .query(
                "select event, detail from public.told where job_id = $1 order by seq",
                &[&id],
            )
            .await
            .unwrap();
        rows.iter().map(|row| (row.get(0), row.get(1))).collect()
    }

    pub async fn told_names(&self, id: Uuid) -> Vec<String> {
        self.told(id).await.into_iter().map(|(event, _)| event).collect()
    }

    /// The invariant over rows holds.
    pub async fn assert_whole(&self) {
        assert_eq!(self.queue.violations().await.unwrap(), vec![]);
    }
}

pub async fn connect(url: &str) -> Client {
    let (client, connection) = tokio_postgres::connect(url, NoTls).await.unwrap();
    tokio::spawn(connection);
    client
}

pub fn request(worker: &str, kinds: &[&str], limit: usize) -> ClaimRequest {
    ClaimRequest {
        worker: worker.into(),
        queue: "default".into(),
        kinds: kinds.iter().map(|kind| (*kind).to_owned()).collect(),
        limit,
        lease: LONG,
        machine: None,
    }
}

/// Polls until `holds` gives something, for at most a minute.
pub async fn eventually<T, F: Future<Output = Option<T>>>(what: &str, holds: impl FnMut() -> F) -> T {
    within(Duration::from_secs(60), what, holds).await
}

/// Polls until `holds` gives something, for at most `limit`.
pub async fn within<T, F: Future<Output = Option<T>>>(limit: Duration, what: &str, mut holds: impl FnMut() -> F) -> T {
    let deadline = Instant::now() + limit;
    loop {
        if let Some(value) = holds().await {
            return value;
        }
        assert!(Instant::now() < deadline, "not within {limit:?}: {what}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

/// A text that a megabyte's limit cannot be fooled with by compression.
pub fn long_text() -> String {
    let mut state = 1_u64;
    let mut letter = |_| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        char::from(b'!' + (state >> 33) as u8 % 90)
    };
    (0..1_500_000).map(&mut letter).collect()
}
