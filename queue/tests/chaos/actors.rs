//! Who does what at random: workers that hold leases and write with old ones, producers, cancellers, sweepers with a wrong clock.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use rand::rngs::StdRng;
use rand::seq::IndexedRandom;
use rand::{RngExt, SeedableRng};
use serde_json::json;
use tokio_postgres::types::ToSql;
use tokio_postgres::{Client, NoTls, Row};
use uuid::Uuid;

use crate::history::{Answer, Call, History};

/// What the actors share.
pub struct World {
    pub url: String,
    pub history: History,
    pub over: AtomicBool,
    pub jobs: Mutex<Vec<Uuid>>,
}

pub struct Actor {
    world: Arc<World>,
    random: StdRng,
    name: String,
    client: Option<Client>,
    /// Leases held, and those that were; both are written with.
    leases: Vec<(Uuid, i64)>,
    old_leases: Vec<(Uuid, i64)>,
    batches: Vec<(i64, Vec<i64>)>,
}

type Parameters<'a> = &'a [&'a (dyn ToSql + Sync)];

impl Actor {
    pub fn new(world: Arc<World>, seed: u64) -> Self {
        Self {
            world,
            random: StdRng::seed_from_u64(seed),
            name: format!("actor-{seed}"),
            client: None,
            leases: Vec::new(),
            old_leases: Vec::new(),
            batches: Vec::new(),
        }
    }

    /// Acts until it is over.
    pub async fn play(mut self) {
        while !self.world.over.load(Ordering::Relaxed) {
            match self.random.random_range(0..100) {
                0..12 => self.enqueue().await,
                12..34 => self.claim().await,
                34..58 => self.end().await,
                58..66 => self.end_many().await,
                66..72 => self.report().await,
                72..78 => self.beat().await,
                78..82 => self.cancel().await,
                82..84 => self.redrive().await,
                84..87 => self.sweep().await,
                87..90 => self.push().await,
                90..94 => self.take().await,
                94..98 => self.finish().await,
                98 => self.vanish(),
                _ => self.client = None,
            }
        }
    }

    /// Forgets what it holds, as a killed process does.
    fn vanish(&mut self) {
        self.old_leases.append(&mut self.leases);
        self.batches.clear();
        self.client = None;
        self.name = format!("actor-{}", self.random.random::<u64>());
    }

    async fn connection(&mut self) -> Option<&Client> {
        if self.client.as_ref().is_none_or(Client::is_closed) {
            self.client = None;
            let (client, connection) = tokio_postgres::connect(&self.world.url, NoTls).await.ok()?;
            tokio::spawn(connection);
            // Every session has a clock of its own making, up to two minutes slow and ten fast.
            let offset = if self.random.random_bool(0.5) {
                0
            } else {
                self.random.random_range(-120..600)
            };
            let settings =
                format!("set brightrun.test_now_offset = '{offset} seconds'; set application_name = 'chaos'");
            client.batch_execute(&settings).await.ok()?;
            self.client = Some(client);
        }
        self.client.as_ref()
    }

    /// One call: its rows or why there are none. `None` if there was no connection, so that nothing was asked.
    async fn ask(&mut self, sql: &str, parameters: Parameters<'_>) -> Option<(u64, Result<Vec<Row>, Answer>)> {
        let world = self.world.clone();
        let Some(client) = self.connection().await else {
            tokio::time::sleep(std::time::Duration::from_millis(20)).await;
            return None;
        };
        let asked = world.history.now();
        let told = client
            .query(sql, parameters)
            .await
            .map_err(|error| match error.code().map(|code| code.code()) {
                Some("BR001" | "BR002" | "BR003") => Answer::Refused,
                Some("40001" | "40P01" | "55P03") => Answer::Aborted,
                Some(code) if code.starts_with("57") || code.starts_with("08") || code.starts_with("53") => {
                    Answer::Unknown
                }
                Some(code) => panic!("{code}: {error:?}: {sql}"),
                None => Answer::Unknown,
            });
        Some((asked, told))
    }

    fn record(&self, asked: u64, call: Call, answer: Answer) {
        self.world.history.record(asked, call, answer);
    }

    async fn enqueue(&mut self) {
        let priority: i32 = self.random.random_range(0..3);
        let delayed = self.random.random_bool(0.2);
        let delay = if delayed { 0.5 } else { 0.0 };
        let count = if self.random.random_bool(0.3) {
            self.random.random_range(2..6_i32)
        } else {
            1
        };
        let key = ["a", "b", "c"]
            .choose(&mut self.random)
            .filter(|_| count == 1 && self.random.random_bool(0.4));
        let jobs: Vec<Uuid> = (0..count).map(|_| Uuid::from_u128(self.random.random())).collect();
        let told = if count == 1 {
            let sql = "select array[brightrun.enqueue('chaos', '{}', p_id => $1, p_priority => $2, p_max_attempts => 4,
                                                      p_delay => make_interval(secs => $3), p_concurrency_key => $4)]";
            self.ask(sql, &[&jobs[0], &priority, &delay, &key]).await
        } else {
            let sql = "select brightrun.enqueue_many('chaos', array_fill('{}'::jsonb, array[$1::integer]), p_priority => $2, p_max_attempts => 4,
                                                     p_delay => make_interval(secs => $3))";
            self.ask(sql, &[&count, &priority, &delay]).await
        };
        let Some((asked, told)) = told else { return };
        // What has a limit may be passed over.
        let delayed = delayed || key.is_some();
        match told {
            Ok(rows) => {
                let jobs: Vec<Uuid> = rows[0].get(0);
                self.world.jobs.lock().unwrap().extend(&jobs);
                self.record(
                    asked,
                    Call::Enqueue {
                        jobs,
                        priority: priority as i16,
                        delayed,
                    },
                    Answer::Accepted(String::new()),
                );
            }
            Err(answer) => self.record(
                asked,
                Call::Enqueue {
                    jobs,
                    priority: priority as i16,
                    delayed,
                },
                answer,
            ),
        }
    }

    async fn claim(&mut self) {
        if self.leases.len() > 12 {
            return;
        }
        let (name, limit) = (self.name.clone(), self.random.random_range(1..4_i32));
        let sql = "select job_id, token from brightrun.claim($1, array['chaos'], $2, interval '30 seconds')";
        let Some((asked, told)) = self.ask(sql, &[&name, &limit]).await else {
            return;
        };
        match told {
            Ok(rows) => {
                let granted: Vec<(Uuid, i64)> = rows.iter().map(|row| (row.get(0), row.get(1))).collect();
                self.leases.extend(&granted);
                self.record(asked, Call::Claim { granted }, Answer::Accepted(String::new()));
            }
            Err(answer) => self.record(asked, Call::Claim { granted: Vec::new() }, answer),
        }
    }

    /// A lease to write with, held or not any more; an ending takes it from the held ones.
    fn some_lease(&mut self, ending: bool) -> Option<(Uuid, i64)> {
        if self.random.random_bool(0.25) {
            return self.old_leases.choose(&mut self.random).copied();
        }
        let place = (!self.leases.is_empty()).then(|| self.random.random_range(0..self.leases.len()))?;
        if !ending {
            return self.leases.get(place).copied();
        }
        let lease = self.leases.swap_remove(place);
        self.old_leases.push(lease);
        if self.old_leases.len() > 40 {
            self.old_leases.remove(0);
        }
        Some(lease)
    }

    async fn end(&mut self) {
        let Some((job, token)) = self.some_lease(true) else {
            return;
        };
        let (what, sql) = match self.random.random_range(0..10) {
            0..5 => ("complete", "select brightrun.complete($1, $2)"),
            5..7 => (
                "fail",
                "select brightrun.fail($1, $2, '{\"code\": \"CHAOS\", \"blame\": \"system\"}', interval '0.2 seconds')",
            ),
            7 => (
                "fail for good",
                "select brightrun.fail($1, $2, '{\"code\": \"CHAOS\", \"blame\": \"user\"}')",
            ),
            8 => ("snooze", "select brightrun.snooze($1, $2, interval '0.2 seconds')"),
            _ => ("release", "select brightrun.release($1, $2)"),
        };
        let Some((asked, told)) = self.ask(sql, &[&job, &token]).await else {
            return;
        };
        let answer = told.map_or_else(|answer| answer, |rows| Answer::Accepted(rows[0].get(0)));
        self.record(
            asked,
            Call::Write {
                job,
                token,
                what,
                ending: true,
            },
            answer,
        );
    }

    async fn end_many(&mut self) {
        let leases: Vec<(Uuid, i64)> = (0..4).filter_map(|_| self.some_lease(true)).collect();
        let jobs: Vec<Uuid> = leases.iter().map(|lease| lease.0).collect();
        let tokens: Vec<i64> = leases.iter().map(|lease| lease.1).collect();
        let sql = "select state, refused from brightrun.complete_many($1, $2)";
        let Some((asked, told)) = self.ask(sql, &[&jobs, &tokens]).await else {
            return;
        };
        for (place, (job, token)) in leases.into_iter().enumerate() {
            let answer = match &told {
                Err(answer) => answer.clone(),
                Ok(rows) => match (
                    rows[place].get::<_, Option<String>>(0),
                    rows[place].get::<_, Option<String>>(1),
                ) {
                    (Some(state), _) => Answer::Accepted(state),
                    (None, Some(code)) if code.starts_with("BR") => Answer::Refused,
                    _ => Answer::Aborted,
                },
            };
            self.record(
                asked,
                Call::Write {
                    job,
                    token,
                    what: "complete_many",
                    ending: true,
                },
                answer,
            );
        }
    }

    async fn report(&mut self) {
        let Some((job, token)) = self.some_lease(false) else {
            return;
        };
        let Some((asked, told)) = self
            .ask("select brightrun.report($1, $2, 'note')", &[&job, &token])
            .await
        else {
            return;
        };
        let answer = told.map_or_else(|answer| answer, |_| Answer::Accepted(String::new()));
        self.record(
            asked,
            Call::Write {
                job,
                token,
                what: "report",
                ending: false,
            },
            answer,
        );
    }

    async fn beat(&mut self) {
        let mut leases = self.leases.clone();
        leases.extend(self.old_leases.choose(&mut self.random));
        let jobs: Vec<Uuid> = leases.iter().map(|lease| lease.0).collect();
        let tokens: Vec<i64> = leases.iter().map(|lease| lease.1).collect();
        let sql = "select job_id, token, reply from brightrun.heartbeat($1, $2)";
        let Some((asked, Ok(rows))) = self.ask(sql, &[&jobs, &tokens]).await else {
            return;
        };
        for row in rows {
            let (job, token, reply): (Uuid, i64, String) = (row.get(0), row.get(1), row.get(2));
            let lost = reply == "lost";
            let answer = if lost { Answer::Refused } else { Answer::Accepted(reply) };
            self.record(
                asked,
                Call::Write {
                    job,
                    token,
                    what: "heartbeat",
                    ending: false,
                },
                answer,
            );
            // Not every worker believes it at once.
            if lost && self.random.random_bool(0.7) {
                self.leases.retain(|lease| lease.1 != token);
                self.old_leases.push((job, token));
            }
        }
    }

    fn some_job(&mut self) -> Option<Uuid> {
        let jobs = self.world.jobs.lock().unwrap();
        let recent = &jobs[jobs.len().saturating_sub(200)..];
        recent.choose(&mut self.random).copied()
    }

    async fn cancel(&mut self) {
        let Some(job) = self.some_job() else { return };
        let Some((asked, told)) = self.ask("select brightrun.cancel($1, 'chaos')", &[&job]).await else {
            return;
        };
        let word = |rows: Vec<Row>| Answer::Accepted(rows[0].get::<_, Option<String>>(0).unwrap_or_default());
        self.record(asked, Call::Cancel { job }, told.map_or_else(|answer| answer, word));
    }

    async fn redrive(&mut self) {
        let Some(job) = self.some_job() else { return };
        let Some((asked, told)) = self.ask("select brightrun.redrive($1)", &[&job]).await else {
            return;
        };
        let answer = told.map_or_else(|answer| answer, |_| Answer::Accepted(String::new()));
        self.record(asked, Call::Redrive { job }, answer);
    }

    async fn sweep(&mut self) {
        let sql = "select job_id from brightrun.rescue_expired(5, interval '1 hour')";
        let Some((asked, told)) = self.ask(sql, &[]).await else {
            return;
        };
        let answer = told.map_or_else(|answer| answer, |_| Answer::Accepted(String::new()));
        self.record(asked, Call::Sweep, answer);
    }

    async fn push(&mut self) {
        let count = self.random.random_range(1..20_i32);
        let sql = "select brightrun.brief_push('chaos', array_fill($1::jsonb, array[$2::integer]))";
        let Some((asked, told)) = self.ask(sql, &[&json!({}), &count]).await else {
            return;
        };
        match told {
            Ok(rows) => self.record(
                asked,
                Call::Push { ids: rows[0].get(0) },
                Answer::Accepted(String::new()),
            ),
            Err(answer) => self.record(asked, Call::Push { ids: Vec::new() }, answer),
        }
    }

    async fn take(&mut self) {
        let (name, limit) = (self.name.clone(), self.random.random_range(1..15_i32));
        let sql = "select token, ids from brightrun.brief_claim($1, 'chaos', $2, interval '30 seconds')";
        let Some((asked, told)) = self.ask(sql, &[&name, &limit]).await else {
            return;
        };
        let Ok(rows) = told else { return };
        for row in rows {
            let (token, ids): (i64, Vec<i64>) = (row.get(0), row.get(1));
            self.batches.push((token, ids.clone()));
            self.record(asked, Call::Take { token, ids }, Answer::Accepted(String::new()));
        }
    }

    /// Ends some places of a batch, some of them badly, and may do it again.
    async fn finish(&mut self) {
        let Some((token, ids)) = self.batches.choose(&mut self.random).cloned() else {
            return;
        };
        let failed = self.random.random_bool(0.1);
        let places: Vec<i32> = (1..=ids.len() as i32)
            .filter(|_| self.random.random_bool(0.6))
            .collect();
        let tokens = vec![token; places.len()];
        let error = failed.then(|| json!({"code": "CHAOS", "blame": "system"}));
        let errors = vec![error; places.len()];
        let sql = "select brightrun.brief_finish($1, $2, $3, interval '0.1 seconds')";
        let Some((asked, told)) = self.ask(sql, &[&tokens, &places, &errors]).await else {
            return;
        };
        let accepted: Result<Vec<bool>, Answer> = told.map(|rows| rows[0].get(0));
        for (number, place) in places.into_iter().enumerate() {
            let answer = match &accepted {
                Ok(accepted) if accepted[number] => Answer::Accepted(String::new()),
                Ok(_) => Answer::Refused,
                Err(answer) => answer.clone(),
            };
            self.record(
                asked,
                Call::Finish {
                    token,
                    id: ids[place as usize - 1],
                    failed,
                },
                answer,
            );
        }
        if self.batches.len() > 6 {
            self.batches.remove(0);
        }
    }
}
