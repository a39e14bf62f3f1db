//! What must be true of every history, whatever happened in it. The checker trusts nobody's code: it reads what the actors were told,
//! the engine's own event log, and the tables at the end.

use std::collections::{HashMap, HashSet};

use uuid::Uuid;

use crate::history::{Answer, Call, Entry};

/// One line of the engine's event log.
#[derive(Clone, Debug)]
pub struct Logged {
    pub seq: i64,
    pub job: Uuid,
    pub event: String,
    pub token: Option<i64>,
}

/// The tables at the end, when nothing is open any more.
#[derive(Clone, Debug, Default)]
pub struct Remains {
    /// Final state of every job.
    pub states: HashMap<Uuid, String>,
    /// Concurrency key and its limit, of the jobs that have one.
    pub limited: HashMap<Uuid, (String, i64)>,
    pub log: Vec<Logged>,
    /// Jobs of the lane that died.
    pub lane_dead: HashSet<i64>,
    /// Jobs of the lane that are still there.
    pub lane_open: usize,
}

/// Every breach of every promise, in words.
pub fn breaches(entries: &[Entry], remains: &Remains) -> Vec<String> {
    let mut found = Vec::new();
    found.extend(stale_writes(entries));
    found.extend(log_is_a_life(remains));
    found.extend(one_end_each(entries, remains));
    found.extend(order_within_a_priority(entries, remains));
    found.extend(limits(remains));
    found.extend(lane(entries, remains));
    found
}

/// No write by a token is accepted once a newer one of the same job has been handed out.
fn stale_writes(entries: &[Entry]) -> Vec<String> {
    let mut granted: HashMap<Uuid, Vec<(i64, u64)>> = HashMap::new();
    for entry in entries {
        if let (Call::Claim { granted: leases }, true) = (&entry.call, entry.is_accepted()) {
            for (job, token) in leases {
                granted.entry(*job).or_default().push((*token, entry.answered));
            }
        }
    }
    let is_stale = |job: &Uuid, token: i64, asked: u64| {
        granted
            .get(job)
            .is_some_and(|all| all.iter().any(|(newer, from)| *newer > token && *from < asked))
    };
    entries
        .iter()
        .filter(|entry| entry.is_accepted())
        .filter_map(|entry| match &entry.call {
            Call::Write { job, token, what, .. } if is_stale(job, *token, entry.asked) => {
                Some(format!("{what} by stale token {token} of job {job} was accepted"))
            }
            _ => None,
        })
        .collect()
}

/// The engine's log of each job is a life: claims and ends alternate, every line carries the token of the claim it belongs to, tokens
/// grow, and after an end in a terminal state nothing follows but a redrive of a failed one. So no job was under two leases at once.
fn log_is_a_life(remains: &Remains) -> Vec<String> {
    let mut lives: HashMap<Uuid, (Option<i64>, i64, Option<String>)> = HashMap::new();
    let mut found = Vec::new();
    for line in &remains.log {
        let (held, newest, ended) = lives.entry(line.job).or_insert((None, 0, None));
        let event = line.event.as_str();
        let mut breach = |why: &str| found.push(format!("job {}: {event} (event {}): {why}", line.job, line.seq));
        if ended.is_some() && !(event == "redriven" && ended.as_deref() == Some("failed")) {
            breach("after a terminal state");
        }
        match event {
            "claimed" | "resumed" => {
                if held.is_some() {
                    breach("while another lease was live");
                }
                if line.token.is_none_or(|token| token <= *newest) {
                    breach("with a token that is not newer");
                }
                *held = line.token;
                *newest = line.token.unwrap_or(*newest);
            }
            "retry" | "snoozed" | "released" | "completed" | "failed" | "cancelled" => {
                if held.is_some() && *held != line.token {
                    breach("by a token that does not hold the lease");
                } else if held.is_none() && event != "cancelled" {
                    breach("without a lease");
                }
                *held = None;
                if matches!(event, "completed" | "failed" | "cancelled") {
                    *ended = Some(event.to_owned());
                }
            }
            "redriven" => *ended = None,
            "enqueued" | "cancel_requested" | "projector_error" => {}
            _ if held.is_none() || *held != line.token => breach("a report by a token that does not hold the lease"),
            _ => {}
        }
    }
    found
}

/// Every accepted job is there and has ended; whoever was told of its end was told the truth.
fn one_end_each(entries: &[Entry], remains: &Remains) -> Vec<String> {
    let mut found = Vec::new();
    let mut ends: HashMap<Uuid, usize> = HashMap::new();
    for line in &remains.log {
        match line.event.as_str() {
            "completed" | "failed" | "cancelled" => *ends.entry(line.job).or_default() += 1,
            "redriven" => *ends.entry(line.job).or_default() -= 1,
            _ => {}
        }
    }
    for (job, state) in &remains.states {
        if !matches!(state.as_str(), "completed" | "failed" | "cancelled") {
            found.push(format!("job {job} is {state} at the end"));
        }
        if ends.get(job) != Some(&1) {
            found.push(format!("job {job} has {:?} ends in the log", ends.get(job)));
        }
    }
    for entry in entries {
        let Answer::Accepted(told) = &entry.answer else {
            continue;
        };
        match &entry.call {
            Call::Enqueue { jobs, .. } => {
                found.extend(
                    jobs.iter()
                        .filter(|job| !remains.states.contains_key(job))
                        .map(|job| format!("accepted job {job} was lost")),
                );
            }
            Call::Write { job, .. } | Call::Cancel { job } if matches!(told.as_str(), "completed" | "cancelled") => {
                let is = remains.states.get(job).map(String::as_str);
                if is != Some(told) {
                    found.push(format!("job {job} was {told} to its caller and is {is:?} now"));
                }
            }
            _ => {}
        }
    }
    found
}

/// A job as it was enqueued, and who claimed it first.
struct Waiting<'a> {
    job: Uuid,
    enqueued: &'a Entry,
    place: usize,
    priority: i16,
    first_claim: &'a Entry,
    cancelled: u64,
}

impl Waiting<'_> {
    fn is_better_than(&self, other: &Self) -> bool {
        let one_call = std::ptr::eq(self.enqueued, other.enqueued);
        let before = self.enqueued.answered < other.enqueued.asked || (one_call && self.place < other.place);
        self.priority < other.priority || (self.priority == other.priority && before)
    }
}

/// The claims during which no other call was under way that can lock or move a waiting job.
pub fn lonely_claims(entries: &[Entry]) -> Vec<&Entry> {
    let disturbs = |entry: &&Entry| {
        matches!(
            entry.call,
            Call::Claim { .. } | Call::Cancel { .. } | Call::Sweep | Call::Redrive { .. }
        )
    };
    let disturbing: Vec<&Entry> = entries.iter().filter(disturbs).collect();
    let mut latest = 0;
    let mut lonely = Vec::new();
    for (place, entry) in disturbing.iter().enumerate() {
        let next = disturbing.get(place + 1).map_or(u64::MAX, |next| next.asked);
        if latest < entry.asked && entry.answered < next && entry.is_accepted() {
            lonely.push(*entry);
        }
        latest = latest.max(entry.answered);
    }
    lonely
}

/// Every job that was ready at once, by the end of its enqueue. One that was first granted to somebody who never heard of it, because the
/// connection broke, only seems to wait: it is left out.
fn waiting<'a>(entries: &'a [Entry], remains: &Remains) -> Vec<Waiting<'a>> {
    let mut granted_first: HashMap<Uuid, Option<i64>> = HashMap::new();
    for line in remains.log.iter().filter(|line| line.event == "claimed") {
        granted_first.entry(line.job).or_insert(line.token);
    }
    let is_first = |job: &Uuid, token: i64| granted_first.get(job) == Some(&Some(token));
    let mut first_claim: HashMap<Uuid, &Entry> = HashMap::new();
    let mut cancelled: HashMap<Uuid, u64> = HashMap::new();
    for entry in entries {
        match &entry.call {
            Call::Claim { granted } => {
                for (job, _) in granted.iter().filter(|(job, token)| is_first(job, *token)) {
                    first_claim.insert(*job, entry);
                }
            }
            Call::Cancel { job } => {
                cancelled.entry(*job).or_insert(entry.asked);
            }
            _ => {}
        }
    }
    let mut all = Vec::new();
    for entry in entries.iter().filter(|entry| entry.is_accepted()) {
        let Call::Enqueue {
            jobs,
            priority,
            delayed: false,
        } = &entry.call
        else {
            continue;
        };
        for (place, job) in jobs.iter().enumerate() {
            if let Some(first_claim) = first_claim.get(job) {
                let cancelled = cancelled.get(job).copied().unwrap_or(u64::MAX);
                all.push(Waiting {
                    job: *job,
                    enqueued: entry,
                    place,
                    priority: *priority,
                    first_claim,
                    cancelled,
                });
            }
        }
    }
    all.sort_by_key(|job| job.enqueued.answered);
    all
}

/// A claim that had the queue to itself took nothing while something better had been waiting.
fn order_within_a_priority(entries: &[Entry], remains: &Remains) -> Vec<String> {
    let all = waiting(entries, remains);
    let mut arriving = all.iter().peekable();
    let mut here: Vec<&Waiting> = Vec::new();
    let mut found = Vec::new();
    for claim in lonely_claims(entries) {
        while let Some(job) = arriving.next_if(|job| job.enqueued.answered < claim.asked) {
            here.push(job);
        }
        here.retain(|job| job.first_claim.asked >= claim.asked && job.cancelled > claim.answered);
        for taken in here.iter().filter(|job| std::ptr::eq(job.first_claim, claim)) {
            let passed = here
                .iter()
                .filter(|job| !std::ptr::eq(job.first_claim, claim) && job.is_better_than(taken));
            found.extend(passed.map(|job| {
                format!(
                    "job {} was claimed although job {} had been waiting with a better place",
                    taken.job, job.job
                )
            }));
        }
    }
    found
}

/// By the order of the log, never more leases of a key than its limit. (A lease is in the log before it is visible to the count that
/// admits the next, and its end is in the log before the count stops seeing it.)
fn limits(remains: &Remains) -> Vec<String> {
    let mut running: HashMap<&str, HashSet<Uuid>> = HashMap::new();
    let mut found = Vec::new();
    for line in &remains.log {
        let Some((key, limit)) = remains.limited.get(&line.job) else {
            continue;
        };
        let now = running.entry(key).or_default();
        match line.event.as_str() {
            "claimed" | "resumed" => {
                now.insert(line.job);
                if now.len() as i64 > *limit {
                    found.push(format!(
                        "key {key} ran {} jobs at event {}, its limit is {limit}",
                        now.len(),
                        line.seq
                    ));
                }
            }
            "retry" | "snoozed" | "released" | "completed" | "failed" | "cancelled" => {
                now.remove(&line.job);
            }
            _ => {}
        }
    }
    found
}

/// Each job of the lane that was accepted is done once or dead, and what was done never comes again.
fn lane(entries: &[Entry], remains: &Remains) -> Vec<String> {
    let mut found = Vec::new();
    let mut done: HashMap<i64, u64> = HashMap::new();
    let mut doubt: HashSet<i64> = HashSet::new();
    for entry in entries {
        if let Call::Finish {
            id,
            failed: false,
            token,
        } = &entry.call
        {
            match entry.answer {
                Answer::Accepted(_) if done.insert(*id, entry.answered).is_some() => {
                    found.push(format!(
                        "lane job {id} was done twice, the second time under token {token}"
                    ));
                }
                Answer::Unknown => {
                    doubt.insert(*id);
                }
                _ => {}
            }
        }
    }
    for entry in entries.iter().filter(|entry| entry.is_accepted()) {
        match &entry.call {
            Call::Take { ids, .. } => {
                let again = ids.iter().filter(|id| done.get(id).is_some_and(|at| *at < entry.asked));
                found.extend(again.map(|id| format!("lane job {id} was done and came again")));
            }
            Call::Push { ids } => {
                let lost = ids
                    .iter()
                    .filter(|id| !done.contains_key(id) && !doubt.contains(id) && !remains.lane_dead.contains(id));
                found.extend(lost.map(|id| format!("lane job {id} was lost")));
            }
            _ => {}
        }
    }
    if remains.lane_open > 0 {
        found.push(format!("{} lane jobs are open at the end", remains.lane_open));
    }
    found
}
