//! Every statement this crate sends, each a file of its own under `sql/`.
//!
//! All of them are single statements, sent unnamed and with explicit types, so that they work
//! through a transaction pooler and cost one round trip. The exceptions are [`LISTEN`] and
//! [`MIGRATE_BEGIN`], which need a session and run on connections of their own.

macro_rules! statements {
    ($($name:ident = $file:literal;)*) => {
        $(pub(crate) const $name: &str = include_str!(concat!("sql/", $file, ".sql"));)*
    };
}

statements! {
    ENQUEUE = "enqueue";
    ENQUEUE_MANY = "enqueue_many";
    COMPLETE_MANY = "complete_many";
    LOG = "log";
    CHECKPOINT = "checkpoint";
    PAUSE = "pause";
    RESUME = "resume";
    REDRIVE_MANY = "redrive_many";
    SET_LIMIT = "set_limit";
    SET_RATE = "set_rate";
    TAKE_RATE = "take_rate";
    SET_BUDGET = "set_budget";
    BUDGET = "budget";
    CANCEL_MANY = "cancel_many";
    SET_SCHEDULE = "set_schedule";
    DROP_SCHEDULE = "drop_schedule";
    TOP = "top";
    EXPLAIN = "explain";
    METRICS = "metrics";
    ALARMS = "alarms";
    DOCTOR = "doctor";
    PRUNE = "prune";
    BRIEF_PUSH = "brief_push";
    BRIEF_CLAIM = "brief_claim";
    BRIEF_FINISH = "brief_finish";
    BRIEF_BEAT = "brief_beat";
    BRIEF_RELEASE = "brief_release";
    BRIEF_REDRIVE = "brief_redrive";
    BRIEF_STATS = "brief_stats";
    WAKE = "wake";
    CANCEL = "cancel";
    REDRIVE = "redrive";
    SET_EXTERNAL_ID = "set_external_id";
    CLAIM = "claim";
    CLAIM_JOB = "claim_job";
    HEARTBEAT = "heartbeat";
    REPORT = "report";
    COMPLETE = "complete";
    FAIL = "fail";
    SNOOZE = "snooze";
    RELEASE = "release";
    RELEASE_UNKNOWN = "release_unknown";
    RESCUE = "rescue";
    MAINTAIN = "maintain";
    STATUS = "status";
    JOBS = "jobs";
    JOB_EVENTS = "job_events";
    STATS = "stats";
    VIOLATIONS = "violations";
    ENGINE_VERSION = "engine_version";
    OUTBOX_PUT = "outbox_put";
    OUTBOX_TAKE = "outbox_take";
    OUTBOX_ACK = "outbox_ack";
    OUTBOX_NACK = "outbox_nack";
    MIGRATE_BEGIN = "migrate_begin";
    LISTEN = "listen";
    CLOCK = "clock";
    OUTBOX_SUBSCRIBE = "outbox_subscribe";
    DISPATCH_WAITING = "dispatch_waiting";
    DISPATCH_BEGIN = "dispatch_begin";
    DISPATCH_SENT = "dispatch_sent";
    DISPATCH_TAKE = "dispatch_take";
    DISPATCH_AGAIN = "dispatch_again";
    DISPATCH_OVER = "dispatch_over";
    DISPATCH_FAILED = "dispatch_failed";
    DISPATCH_REFUSE = "dispatch_refuse";
    DISPATCH_SPEND = "dispatch_spend";
}
