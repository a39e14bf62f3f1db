-- >>> engine
-- =====================================================================================================================
-- The job engine: schema `brightrun`, no extension, no superuser, PostgreSQL 15 or newer.
--
-- It knows queues, kinds, leases and attempts. What a job means is opaque JSON to it. Everything outside calls functions;
-- nobody but the owner touches a table, and the role `brightrun_worker` can do nothing but execute these functions.
--
-- ## Prefixes and places
--   brightrun.job         what was asked, written once, and how it ended, written once; a cancel request in between
--   brightrun.ready       one narrow row per job that waits for a worker, now (ready_seq set) or later (ready_seq null)
--   brightrun.lease       one row per running job: who holds it, the fencing token, when it expires, its latest progress
--   brightrun.event       append-only history, one partition per UTC day, a default partition so that nothing is lost
--   brightrun.outbox      messages to the world outside, written in the transaction that makes them true
--   brightrun.job_kind    optional settings of a kind: its projector and its retry curve
--   brightrun.housekeeping  one row: retention, and since when the database has been watched without a gap
--   brightrun.version     one row per section of this file
--   p_*                   a function's parameter;  v_* a variable;  _name() an internal function, granted to nobody
--
-- ## Life of a job
--
--             enqueue                claim                        complete
--      ()  ────────────▶ ready ────────────────▶ running ─────────────────────▶ completed
--             │            ▲ │                    │ │ │
--       later │     due at │ │ cancel             │ │ └── fail(user), or the last attempt ──▶ failed ──redrive──▶ ready
--             ▼     run_at │ │                    │ │
--          scheduled ──────┘ └──▶ cancelled ◀─────┘ └── fail(system|platform), lease expired ──▶ scheduled (counted)
--                    cancel ──────▶   ▲  any ending after a cancel request    snooze ──▶ scheduled, release ──▶ ready
--                                                                                  (interrupted: not counted)
--
-- ## Invariants (each is enforced below and guarded by a test named in queue/README.md)
--   1. one baton:        [ready row] + [lease row] + [outcome set] = 1 for every job, at every commit
--   2. state is derived: running ⇔ lease row;  ready ⇔ ready row ∧ ready_seq set;  scheduled ⇔ ready row ∧ ready_seq null
--   3. outcome set ⇔ finished_at set;  completed ⇔ result set;  failed ⇔ error set;  cancelled ⇒ cancel_requested_at set
--   4. terminal is final: outcome never changes once set, but for redrive(): failed → ready, an operator's act
--   5. fencing:          a write about a running job is accepted ⇔ its token is the one on the lease row; tokens only grow
--   6. cancel wins:      cancel_requested_at set ⇒ the outcome can only be cancelled
--   7. attempts:         attempt ≤ max_attempts; released, snoozed and interrupted runs are not counted
--   8. no early death:   a lease is declared dead only after it expired ∧ the database was watched for one full lease
--   9. one clock:        every timestamp comes from brightrun.now(); a worker's clock is never asked
--
-- ## Lock order, the same everywhere: baton row (ready or lease) → the app's rows (projector) → job row
-- An app's transaction that already holds its own row and calls cancel() therefore must never wait for a baton: cancel()
-- only tries it (SKIP LOCKED) and otherwise leaves its request on the job row, where every ending looks before it commits.
-- Calls that handle several jobs at once (claim, heartbeat, rescue) may meet an app's bulk update in any order of rows: they wait
-- for an app's row half a second at most, less than deadlock_timeout, then step aside. The app's transaction is never the victim.
--
-- ## Projectors: how an app's own tables follow, in the same transaction, without the engine knowing them
-- brightrun.job_kind(kind, projector) may name a function  NAME(job_id uuid, event text, detail jsonb) returns void.
-- It runs as the owner of this schema, inside the transaction of each transition and each report of that kind:
--   event       detail (always an object; "attempt" and "worker" are added to every one, worker is null while waiting)
--   enqueued    {}
--   claimed     {}                                  first claim
--   resumed     {}                                  every later claim (after retry, snooze, release, redrive)
--   progress    the worker's progress object        carried by a heartbeat
--   <other>     the object given to report()        any name that is not in this table
--   completed   the result object
--   failed      {code, blame, message, detail}      terminal
--   retry       {code, blame, message, detail, "retry_at"}
--   snoozed     {"reason", "run_at"}
--   released    {"reason"}                          interrupted; not an attempt
--   cancelled   {"reason", "instead_of"}            instead_of: the ending the worker had asked for, or null
--   redriven    {"reason"}
-- A JSON value that is not an object arrives as {"value": …}. If a projector raises, the transition is rolled back with it.
-- Only where one job's projector could hold up others it is confined: a raising claim postpones that job by a minute, a
-- raising rescue by one lease, a raising or blocked progress is dropped; each leaves a `projector_error` event.
-- A projector must ignore events it does not know, and may be called while the app's row is already locked by the caller.
--
-- ## What an app calls in its own transaction (both are safe inside an AFTER trigger; nothing stays if it rolls back)
--   brightrun.enqueue(p_kind text, p_payload jsonb default '{}', p_id uuid default null, p_queue text default 'default',
--                     p_priority integer default 0, p_owner uuid default null, p_idempotency_key text default null,
--                     p_max_attempts integer default 3, p_run_at timestamptz default null, p_delay interval default null,
--                     p_hard_deadline interval default null, p_external_id text default null,
--                     p_notify boolean default false) returns uuid
--       lower priority numbers run first; a known p_id, or a known (p_kind, p_idempotency_key), returns the existing job's id
--       and changes nothing (keys are remembered until the job is pruned)
--   brightrun.cancel(p_job_id uuid, p_reason text default null) returns text
--       'cancelled' | 'cancel_requested' (it runs; it will end as cancelled) | 'completed' | 'failed' | null: no such job
-- =====================================================================================================================

create schema if not exists brightrun;

-- Two sessions that apply this file at once take turns, when it is applied in one transaction (as `brightrun migrate` does).
select pg_catalog.pg_advisory_xact_lock(4702111234474983745);

create table if not exists brightrun.version (
    section    text primary key,
    version    integer not null,
    applied_at timestamptz not null default pg_catalog.clock_timestamp()
);

do $$
declare
    v_found integer;
begin
    perform pg_catalog.pg_advisory_xact_lock(4702111234474983745);
    select version into v_found from brightrun.version where section = 'engine';
    if v_found > 1 then
        raise exception 'the database has engine schema version %, this file is version 1', v_found
            using hint = 'apply the schema.sql of the newer release, or none';
    end if;
    -- Roles belong to the whole cluster, so another database's migration may create the same one at the same moment.
    if pg_catalog.to_regrole('brightrun_worker') is null then
        begin
            create role brightrun_worker nologin noinherit;
        exception when duplicate_object or unique_violation then
            null;
        end;
    end if;
end
$$;

-- --- Time ------------------------------------------------------------------------------------------------------------

-- A moved clock is for tests. Only the owner's sessions may move it: a worker that could would expire its neighbours' leases.
create or replace function brightrun._test_offset() returns interval
language plpgsql stable security definer set search_path = '' as $$
begin
    if not pg_catalog.pg_has_role(session_user,
            (select nspowner from pg_catalog.pg_namespace where nspname = 'brightrun'), 'member') then
        raise exception 'only the owner of schema brightrun may set brightrun.test_now_offset' using errcode = '42501';
    end if;
    return pg_catalog.current_setting('brightrun.test_now_offset')::interval;
end
$$;

-- The only clock of the engine: the database's, never a worker's, and never a transaction's start, which may be long ago.
create or replace function brightrun.now() returns timestamptz
language plpgsql volatile set search_path = '' as $$
begin
    if coalesce(pg_catalog.current_setting('brightrun.test_now_offset', true), '') = '' then
        return pg_catalog.clock_timestamp();
    end if;
    return pg_catalog.clock_timestamp() + brightrun._test_offset();
end
$$;

-- --- Tables ----------------------------------------------------------------------------------------------------------

create sequence if not exists brightrun.ready_seq;
create sequence if not exists brightrun.lease_token;
create sequence if not exists brightrun.event_seq;

-- Written at enqueue, at a cancel request, and at the end. No index covers a column that changes, so the final update is HOT.
create table if not exists brightrun.job (
    id                  uuid primary key,
    kind                text not null,
    queue               text not null,
    priority            smallint not null,
    payload             jsonb not null,
    owner               uuid,
    idempotency_key     text,
    max_attempts        smallint not null,
    hard_deadline       interval,
    external_id         text,
    run_at              timestamptz not null,
    created_at          timestamptz not null,
    cancel_requested_at timestamptz,
    cancel_reason       text,
    outcome             text,
    attempt             smallint,
    started_at          timestamptz,
    finished_at         timestamptz,
    result              jsonb,
    error               jsonb,
    final_token         bigint,
    constraint job_kind_is_a_name      check (kind <> '' and length(kind) <= 100),
    constraint job_queue_is_a_name     check (queue <> '' and length(queue) <= 100),
    constraint job_key_is_short        check (length(idempotency_key) between 1 and 500),
    constraint job_external_id_short   check (length(external_id) between 1 and 500),
    constraint job_reason_is_short     check (length(cancel_reason) <= 2000),
    constraint job_attempts_allowed    check (max_attempts between 1 and 1000),
    constraint job_attempts_bounded    check (attempt between 0 and max_attempts),
    constraint job_deadline_positive   check (hard_deadline > interval '0'),
    constraint job_payload_is_bounded  check (pg_catalog.pg_column_size(payload) <= 1048576),
    constraint job_result_is_bounded   check (pg_catalog.pg_column_size(result) <= 1048576),
    constraint job_error_is_bounded    check (pg_catalog.pg_column_size(error) <= 262144),
    constraint job_outcome_known       check (outcome in ('completed', 'failed', 'cancelled')),
    constraint job_finished_iff        check ((outcome is null) = (finished_at is null)),
    constraint job_attempt_iff         check ((outcome is null) = (attempt is null)),
    constraint job_result_iff          check ((outcome is not distinct from 'completed') = (result is not null)),
    constraint job_error_iff           check ((outcome is not distinct from 'failed') = (error is not null)),
    constraint job_cancel_wins         check (cancel_requested_at is null or outcome is null or outcome = 'cancelled'),
    constraint job_cancel_was_asked    check (outcome is distinct from 'cancelled' or cancel_requested_at is not null),
    constraint job_times_in_order      check (finished_at >= created_at and (started_at is null or finished_at >= started_at))
) with (fillfactor = 80);

create unique index if not exists job_idempotency on brightrun.job (kind, idempotency_key) where idempotency_key is not null;
create index if not exists job_by_age on brightrun.job (created_at);

-- One narrow row per waiting job. ready_seq only ever grows, a job that becomes ready again gets a new one: a claim reads the
-- index from its head and never walks the past.
create table if not exists brightrun.ready (
    job_id     uuid primary key references brightrun.job (id),
    queue      text not null,
    kind       text not null,
    priority   smallint not null,
    ready_seq  bigint,
    run_at     timestamptz not null,
    attempt    smallint not null default 0,
    claims     integer not null default 0,
    started_at timestamptz,
    last_token bigint,
    last_error jsonb,
    progress   jsonb,
    constraint ready_attempt_counts check (attempt >= 0 and claims >= attempt),
    constraint ready_token_iff_claimed check ((last_token is null) = (claims = 0))
) with (fillfactor = 90, autovacuum_vacuum_scale_factor = 0.01, autovacuum_vacuum_threshold = 500, autovacuum_vacuum_cost_delay = 0);

create index if not exists ready_claim on brightrun.ready (queue, kind, priority, ready_seq) where ready_seq is not null;
create index if not exists ready_scheduled on brightrun.ready (run_at) where ready_seq is null;

-- One row per running job, rewritten by every heartbeat: nothing but the key is indexed, so that stays HOT. The few thousand
-- rows this table can hold are read whole by the rescue.
create table if not exists brightrun.lease (
    job_id      uuid primary key references brightrun.job (id),
    token       bigint not null default pg_catalog.nextval('brightrun.lease_token'),
    queue       text not null,
    kind        text not null,
    priority    smallint not null,
    worker      text not null,
    attempt     smallint not null,
    claims      integer not null,
    lease_for   interval not null,
    started_at  timestamptz not null,
    claimed_at  timestamptz not null,
    beat_at     timestamptz not null,
    expires_at  timestamptz not null,
    deadline_at timestamptz,
    progress    jsonb,
    constraint lease_worker_is_a_name  check (worker <> '' and length(worker) <= 200),
    constraint lease_attempt_counts    check (attempt >= 1 and claims >= attempt),
    constraint lease_for_positive      check (lease_for > interval '0' and lease_for <= interval '1 day'),
    constraint lease_within_deadline   check (deadline_at is null or expires_at <= deadline_at),
    constraint lease_progress_bounded  check (pg_catalog.pg_column_size(progress) <= 65536)
) with (fillfactor = 70, autovacuum_vacuum_scale_factor = 0.01, autovacuum_vacuum_threshold = 500, autovacuum_vacuum_cost_delay = 0);

create table if not exists brightrun.event (
    at      timestamptz not null,
    seq     bigint not null default pg_catalog.nextval('brightrun.event_seq'),
    job_id  uuid not null,
    event   text not null,
    attempt smallint not null,
    token   bigint,
    worker  text,
    detail  jsonb not null,
    constraint event_name_is_short     check (event <> '' and length(event) <= 100),
    constraint event_detail_is_bounded check (pg_catalog.pg_column_size(detail) <= 1179648)
) partition by range (at);

create table if not exists brightrun.event_default partition of brightrun.event default;
create index if not exists event_of_job on brightrun.event (job_id, seq);

create table if not exists brightrun.job_kind (
    kind       text primary key,
    projector  text,
    retry_base interval not null default interval '10 seconds',
    retry_cap  interval not null default interval '10 minutes',
    constraint job_kind_retry_sane check (retry_base > interval '0' and retry_cap >= retry_base)
);

-- due_at is when a message may be taken (again): a consumer that dies keeps it only until then.
create table if not exists brightrun.outbox (
    id         bigint generated always as identity primary key,
    topic      text not null,
    key        text,
    payload    jsonb not null,
    created_at timestamptz not null,
    due_at     timestamptz not null,
    attempts   smallint not null default 0,
    take_token bigint,
    last_error text,
    dead_at    timestamptz,
    constraint outbox_topic_is_a_name     check (topic <> '' and length(topic) <= 100),
    constraint outbox_payload_is_bounded  check (pg_catalog.pg_column_size(payload) <= 1048576),
    constraint outbox_dead_is_not_taken   check (dead_at is null or take_token is null)
);

create index if not exists outbox_due on brightrun.outbox (topic, due_at, id) where dead_at is null;

create table if not exists brightrun.housekeeping (
    only_row        boolean primary key default true check (only_row),
    last_sweep_at   timestamptz,
    steady_since    timestamptz,
    event_retention interval not null default interval '30 days' check (event_retention >= interval '1 day'),
    job_retention   interval not null default interval '90 days' check (job_retention >= interval '1 hour'),
    constraint housekeeping_sweep_iff check ((last_sweep_at is null) = (steady_since is null))
) with (fillfactor = 50);

insert into brightrun.housekeeping default values on conflict do nothing;

-- --- Views: what a job's state is ------------------------------------------------------------------------------------

create or replace view brightrun.job_status with (security_invoker = true) as
select job.id, job.kind, job.queue, job.priority, job.payload, job.owner, job.idempotency_key, job.external_id,
       case when job.outcome is not null then job.outcome
            when lease.job_id is not null then 'running'
            when ready.ready_seq is not null then 'ready'
            else 'scheduled' end as state,
       coalesce(job.attempt, lease.attempt, ready.attempt, 0)::integer as attempt,
       job.max_attempts::integer as max_attempts,
       coalesce(lease.claims, ready.claims, 0) as claims,
       job.created_at, coalesce(ready.run_at, job.run_at) as run_at,
       coalesce(job.started_at, lease.started_at, ready.started_at) as started_at,
       job.finished_at, job.cancel_requested_at, job.cancel_reason, job.hard_deadline,
       job.result, coalesce(job.error, ready.last_error) as error,
       coalesce(lease.progress, ready.progress) as progress,
       lease.worker, lease.token, lease.expires_at, lease.deadline_at
from brightrun.job
left join brightrun.lease on lease.job_id = job.id
left join brightrun.ready on ready.job_id = job.id;

-- What a worker is told about a job it has just claimed. Time is told as what is left, so that clocks need not agree.
create or replace view brightrun.claimed with (security_invoker = true) as
select lease.job_id, lease.token, lease.kind, lease.queue, lease.worker, job.payload, job.owner, job.external_id,
       lease.attempt::integer as attempt, job.max_attempts::integer as max_attempts, lease.claims,
       lease.progress, job.created_at,
       extract(epoch from lease.expires_at - brightrun.now())::float8 as lease_seconds,
       extract(epoch from lease.deadline_at - brightrun.now())::float8 as deadline_seconds
from brightrun.lease
join brightrun.job on job.id = lease.job_id;

-- --- Guards: invariants that span rows, held against the owner too ---------------------------------------------------

-- Invariant 4. The one way out of a terminal state is failed → live, which redrive() uses.
create or replace function brightrun._guard_terminal() returns trigger
language plpgsql set search_path = '' as $$
begin
    if new.outcome is null and old.outcome = 'failed' then
        return new;
    end if;
    if (new.outcome, new.finished_at, new.result, new.error, new.cancel_requested_at)
       is distinct from (old.outcome, old.finished_at, old.result, old.error, old.cancel_requested_at) then
        raise exception 'job % is % and stays so', old.id, old.outcome using errcode = 'BR003';
    end if;
    return new;
end
$$;

create or replace trigger job_terminal_is_final before update on brightrun.job
    for each row when (old.outcome is not null) execute function brightrun._guard_terminal();

-- Invariant 1, one half for each side of the hand-over; once per statement, so that a batch pays once.
create or replace function brightrun._guard_baton() returns trigger
language plpgsql set search_path = '' as $$
declare
    v_job uuid;
begin
    if tg_table_name = 'job' then
        select fresh.id into v_job from fresh
        where fresh.outcome is not null
          and (exists (select from brightrun.ready where ready.job_id = fresh.id)
            or exists (select from brightrun.lease where lease.job_id = fresh.id))
        limit 1;
    elsif tg_table_name = 'lease' then
        select fresh.job_id into v_job from fresh join brightrun.job on job.id = fresh.job_id
        where job.outcome is not null or exists (select from brightrun.ready where ready.job_id = fresh.job_id)
        limit 1;
    else
        select fresh.job_id into v_job from fresh join brightrun.job on job.id = fresh.job_id
        where job.outcome is not null or exists (select from brightrun.lease where lease.job_id = fresh.job_id)
        limit 1;
    end if;
    if v_job is not null then
        raise exception 'job % would be in two places at once', v_job using errcode = '23514';
    end if;
    return null;
end
$$;

create or replace trigger job_has_one_baton after update on brightrun.job
    referencing new table as fresh for each statement execute function brightrun._guard_baton();
create or replace trigger ready_is_the_only_baton after insert on brightrun.ready
    referencing new table as fresh for each statement execute function brightrun._guard_baton();
create or replace trigger lease_is_the_only_baton after insert on brightrun.lease
    referencing new table as fresh for each statement execute function brightrun._guard_baton();

-- --- Internal steps ---------------------------------------------------------------------------------------------------

-- The object a projector and a history row get: the worker's own words with the engine's facts over them.
create or replace function brightrun._detail(p_words jsonb, p_attempt integer, p_worker text) returns jsonb
language sql immutable set search_path = '' as $$
    select case when p_words is null then '{}'
                when pg_catalog.jsonb_typeof(p_words) = 'object' then p_words
                else pg_catalog.jsonb_build_object('value', p_words) end
        || pg_catalog.jsonb_build_object('attempt', p_attempt, 'worker', p_worker)
$$;

create or replace function brightrun._append(p_job_id uuid, p_event text, p_detail jsonb, p_attempt integer,
                                             p_token bigint, p_worker text) returns void
language sql volatile set search_path = '' as $$
    insert into brightrun.event (at, job_id, event, attempt, token, worker, detail)
    values (brightrun.now(), p_job_id, p_event, p_attempt, p_token, p_worker, p_detail)
$$;

create or replace function brightrun._is_projected(p_kind text) returns boolean
language sql stable set search_path = '' as $$
    select exists (select from brightrun.job_kind where kind = p_kind and projector is not null)
$$;

create or replace function brightrun._project(p_kind text, p_job_id uuid, p_event text, p_detail jsonb) returns void
language plpgsql volatile set search_path = '' as $$
declare
    v_projector text;
    v_function  regprocedure;
begin
    select projector into v_projector from brightrun.job_kind where kind = p_kind and projector is not null;
    if not found then
        return;
    end if;
    v_function := pg_catalog.to_regprocedure(v_projector || '(uuid,text,jsonb)');
    if v_function is null then
        raise exception 'the projector of kind % does not exist: %(uuid, text, jsonb)', p_kind, v_projector
            using errcode = '42883', hint = 'apply schema.sql again, or correct brightrun.job_kind';
    end if;
    execute pg_catalog.format('select %s($1, $2, $3)', v_function::oid::regproc) using p_job_id, p_event, p_detail;
end
$$;

-- Raises why a token is not accepted. BR001: somebody else holds the job now, or it waits again. BR002: no such job.
-- BR003: the job has ended.
create or replace function brightrun._refuse(p_job_id uuid, p_token bigint) returns void
language plpgsql stable set search_path = '' as $$
declare
    v_state text;
    v_token bigint;
begin
    select state, token into v_state, v_token from brightrun.job_status where id = p_job_id;
    if not found then
        raise exception 'there is no job %', p_job_id using errcode = 'BR002';
    elsif v_state in ('completed', 'failed', 'cancelled') then
        raise exception 'job % is %; token % can change nothing', p_job_id, v_state, p_token
            using errcode = 'BR003', hint = 'stop working on it and discard what was not committed';
    end if;
    raise exception 'token % of job % is stale: the job is %', p_token, p_job_id, v_state
        using errcode = 'BR001', hint = 'the lease was lost; stop working on it and discard what was not committed';
end
$$;

-- The lease row of (job, token), locked; raises if the token is not the current one.
create or replace function brightrun._hold(p_job_id uuid, p_token bigint) returns brightrun.lease
language plpgsql volatile set search_path = '' as $$
declare
    v_lease brightrun.lease;
begin
    select * into v_lease from brightrun.lease where job_id = p_job_id and token = p_token for update;
    if not found then
        perform brightrun._refuse(p_job_id, p_token);
    end if;
    return v_lease;
end
$$;

-- The state a job got from this very token, or null. A worker whose commit's answer was lost asks again and is told.
create or replace function brightrun._done_by(p_job_id uuid, p_token bigint) returns text
language sql stable set search_path = '' as $$
    select outcome from brightrun.job where id = p_job_id and final_token = p_token
    union all
    select case when ready_seq is null then 'scheduled' else 'ready' end
    from brightrun.ready where job_id = p_job_id and last_token = p_token
    limit 1
$$;

-- Half to all of base · 2^(attempt-1), capped: late enough to help, spread enough not to arrive together.
create or replace function brightrun.backoff(p_attempt integer, p_base interval, p_cap interval) returns interval
language sql volatile set search_path = '' as $$
    select least(p_cap, p_base * pg_catalog.power(2, least(greatest(p_attempt, 1) - 1, 30))) * (0.5 + 0.5 * pg_catalog.random())
$$;

-- How every lease ends. The caller holds the lease row. With p_outcome the job is over; without, it waits again until p_run_at
-- (null: ready now) having used up p_attempt attempts. Whatever was asked for, a cancel request turns it into cancelled: the
-- request is read last, under the job row's lock, after the projector has the app's row (see "Lock order" above).
create or replace function brightrun._leave(p_lease brightrun.lease, p_event text, p_words jsonb, p_outcome text,
                                            p_result jsonb, p_error jsonb, p_run_at timestamptz, p_attempt integer) returns text
language plpgsql volatile set search_path = '' as $$
declare
    v_detail    jsonb := brightrun._detail(p_words, p_lease.attempt, p_lease.worker);
    v_event     text := p_event;
    v_outcome   text := p_outcome;
    v_reason    text;
    v_cancelled boolean;
begin
    select cancel_requested_at is not null into v_cancelled from brightrun.job where id = p_lease.job_id;
    if not v_cancelled then
        if brightrun._is_projected(p_lease.kind) then
            begin
                perform brightrun._project(p_lease.kind, p_lease.job_id, p_event, v_detail);
                perform from brightrun.job where id = p_lease.job_id and cancel_requested_at is null for no key update;
                if not found then
                    raise exception 'a cancel came first' using errcode = 'BR900';
                end if;
            exception when sqlstate 'BR900' then
                v_cancelled := true;
            end;
        else
            perform from brightrun.job where id = p_lease.job_id and cancel_requested_at is null for no key update;
            v_cancelled := not found;
        end if;
    end if;
    if v_cancelled then
        select cancel_reason into v_reason from brightrun.job where id = p_lease.job_id;
        v_event := 'cancelled';
        v_outcome := 'cancelled';
        v_detail := brightrun._detail(pg_catalog.jsonb_build_object('reason', v_reason, 'instead_of', p_event),
                                      p_lease.attempt, p_lease.worker);
        perform brightrun._project(p_lease.kind, p_lease.job_id, v_event, v_detail);
    end if;

    delete from brightrun.lease where job_id = p_lease.job_id;
    if v_outcome is not null then
        update brightrun.job
        set outcome = v_outcome, attempt = p_lease.attempt, started_at = p_lease.started_at,
            finished_at = greatest(brightrun.now(), p_lease.started_at), final_token = p_lease.token,
            result = case when v_outcome = 'completed' then p_result end,
            error = case when v_outcome = 'failed' then p_error end
        where id = p_lease.job_id;
    else
        insert into brightrun.ready (job_id, queue, kind, priority, ready_seq, run_at, attempt, claims, started_at,
                                     last_token, last_error, progress)
        values (p_lease.job_id, p_lease.queue, p_lease.kind, p_lease.priority,
                case when p_run_at is null then pg_catalog.nextval('brightrun.ready_seq') end,
                coalesce(p_run_at, brightrun.now()), p_attempt, p_lease.claims, p_lease.started_at,
                p_lease.token, p_error, p_lease.progress);
    end if;
    perform brightrun._append(p_lease.job_id, v_event, v_detail, p_lease.attempt, p_lease.token, p_lease.worker);
    return coalesce(v_outcome, case when p_run_at is null then 'ready' else 'scheduled' end);
end
$$;

-- Retry or dead letter, by blame: a user's mistake will not mend itself, the rest may.
create or replace function brightrun._fail(p_lease brightrun.lease, p_error jsonb, p_retry_after interval) returns text
language plpgsql volatile set search_path = '' as $$
declare
    v_max    integer;
    v_base   interval := interval '10 seconds';
    v_cap    interval := interval '10 minutes';
    v_run_at timestamptz;
begin
    select max_attempts into v_max from brightrun.job where id = p_lease.job_id;
    if p_error ->> 'blame' = 'user' or p_lease.attempt >= v_max then
        return brightrun._leave(p_lease, 'failed', p_error, 'failed', null, p_error, null, null);
    end if;
    select retry_base, retry_cap into v_base, v_cap from brightrun.job_kind where kind = p_lease.kind;
    if not found then
        v_base := interval '10 seconds';
        v_cap := interval '10 minutes';
    end if;
    v_run_at := brightrun.now() + coalesce(p_retry_after, brightrun.backoff(p_lease.attempt, v_base, v_cap));
    return brightrun._leave(p_lease, 'retry', p_error || pg_catalog.jsonb_build_object('retry_at', v_run_at),
                            null, null, p_error, v_run_at, p_lease.attempt);
end
$$;

-- Ends a waiting job as cancelled. The caller holds its ready row.
create or replace function brightrun._cancel_waiting(p_job_id uuid, p_reason text) returns void
language plpgsql volatile set search_path = '' as $$
declare
    v_ready  brightrun.ready;
    v_reason text;
    v_detail jsonb;
begin
    select * into v_ready from brightrun.ready where job_id = p_job_id;
    select coalesce(cancel_reason, p_reason) into v_reason from brightrun.job where id = p_job_id;
    v_detail := brightrun._detail(pg_catalog.jsonb_build_object('reason', v_reason, 'instead_of', null), v_ready.attempt, null);
    perform brightrun._project(v_ready.kind, p_job_id, 'cancelled', v_detail);
    delete from brightrun.ready where job_id = p_job_id;
    update brightrun.job
    set outcome = 'cancelled', attempt = v_ready.attempt, started_at = v_ready.started_at,
        finished_at = greatest(brightrun.now(), created_at), final_token = v_ready.last_token,
        cancel_requested_at = coalesce(cancel_requested_at, brightrun.now()),
        cancel_reason = coalesce(cancel_reason, p_reason)
    where id = p_job_id;
    perform brightrun._append(p_job_id, 'cancelled', v_detail, v_ready.attempt, v_ready.last_token, null);
end
$$;

-- Turns scheduled rows whose time has come into ready ones, oldest first. Part of every claim, so no process need live for it.
create or replace function brightrun._promote(p_now timestamptz) returns void
language sql volatile set search_path = '' as $$
    with due as materialized (
        select job_id, run_at from brightrun.ready
        where ready_seq is null and run_at <= p_now
        order by run_at limit 500
        for update skip locked
    ), numbered as (
        select job_id, pg_catalog.nextval('brightrun.ready_seq') as seq from (select job_id from due order by run_at) oldest_first
    )
    update brightrun.ready set ready_seq = numbered.seq from numbered where ready.job_id = numbered.job_id
$$;

-- Moves ready rows that the caller has locked to leases, all of one kind, and tells the history. A batch is one statement.
create or replace function brightrun._lease(p_jobs uuid[], p_worker text, p_lease interval) returns uuid[]
language plpgsql volatile set search_path = '' as $$
declare
    v_now    timestamptz := brightrun.now();
    v_leased uuid[];
begin
    with taken as (
        delete from brightrun.ready where job_id = any (p_jobs) returning *
    ), leased as (
        insert into brightrun.lease (job_id, queue, kind, priority, worker, attempt, claims, lease_for, started_at, claimed_at,
                                     beat_at, expires_at, deadline_at, progress)
        select taken.job_id, taken.queue, taken.kind, taken.priority, p_worker, taken.attempt + 1, taken.claims + 1, p_lease,
               coalesce(taken.started_at, v_now), v_now, v_now,
               least(v_now + p_lease, v_now + job.hard_deadline), v_now + job.hard_deadline, taken.progress
        from taken join brightrun.job on job.id = taken.job_id
        order by taken.priority, taken.ready_seq
        returning job_id, token, worker, attempt, claims
    ), told as (
        insert into brightrun.event (at, job_id, event, attempt, token, worker, detail)
        select v_now, job_id, case when claims = 1 then 'claimed' else 'resumed' end, attempt, token, worker,
               brightrun._detail(null, attempt, worker)
        from leased
    )
    select pg_catalog.array_agg(job_id) into v_leased from leased;
    return coalesce(v_leased, '{}');
end
$$;

-- Grants leases on ready rows of one kind that the caller has locked; returns the jobs granted. A job whose cancel was asked
-- for meanwhile ends here. With a projector each job is a transaction of its own inside the claim, so that one job whose
-- projector raises steps aside for a minute instead of blocking the head of its queue for everybody.
create or replace function brightrun._grant(p_kind text, p_jobs uuid[], p_worker text, p_lease interval) returns uuid[]
language plpgsql volatile set search_path = '' as $$
declare
    v_job     uuid;
    v_doomed  uuid[];
    v_granted uuid[] := '{}';
    v_lease   brightrun.lease;
    v_words   jsonb;
begin
    v_doomed := array(select id from brightrun.job where id = any (p_jobs) and cancel_requested_at is not null);
    foreach v_job in array v_doomed loop
        perform brightrun._cancel_waiting(v_job, null);
    end loop;
    if not brightrun._is_projected(p_kind) then
        return brightrun._lease(p_jobs, p_worker, p_lease);
    end if;
    foreach v_job in array p_jobs loop
        continue when v_job = any (v_doomed);
        begin
            perform brightrun._lease(array[v_job], p_worker, p_lease);
            select * into v_lease from brightrun.lease where job_id = v_job;
            perform brightrun._project(p_kind, v_job, case when v_lease.claims = 1 then 'claimed' else 'resumed' end,
                                       brightrun._detail(null, v_lease.attempt, p_worker));
            -- The projector may have waited for an app's transaction, and that may have been the cancel.
            perform from brightrun.job where id = v_job and cancel_requested_at is not null;
            if found then
                raise exception 'a cancel came first' using errcode = 'BR900';
            end if;
            v_granted := v_granted || v_job;
        exception
            when sqlstate 'BR900' then
                perform brightrun._cancel_waiting(v_job, null);
            when lock_not_available then
                update brightrun.ready set ready_seq = null, run_at = brightrun.now() + interval '1 second' where job_id = v_job;
            when others then
                v_words := pg_catalog.jsonb_build_object('code', 'QUEUE_PROJECTOR_FAILED', 'blame', 'system',
                    'message', pg_catalog.left(sqlerrm, 2000), 'detail', pg_catalog.jsonb_build_object('sqlstate', sqlstate));
                update brightrun.ready
                set ready_seq = null, run_at = brightrun.now() + interval '1 minute', last_error = v_words
                where job_id = v_job;
                perform brightrun._append(v_job, 'projector_error', brightrun._detail(v_words, 0, p_worker), 0, null, p_worker);
        end;
    end loop;
    return v_granted;
end
$$;

-- --- The interface: an app's side ------------------------------------------------------------------------------------

create or replace function brightrun.enqueue(
    p_kind text, p_payload jsonb default '{}', p_id uuid default null, p_queue text default 'default',
    p_priority integer default 0, p_owner uuid default null, p_idempotency_key text default null,
    p_max_attempts integer default 3, p_run_at timestamptz default null, p_delay interval default null,
    p_hard_deadline interval default null, p_external_id text default null, p_notify boolean default false) returns uuid
language plpgsql volatile security definer set search_path = '' as $$
declare
    v_now    timestamptz := brightrun.now();
    v_run_at timestamptz := coalesce(p_run_at, v_now + p_delay, v_now);
    v_id     uuid;
begin
    insert into brightrun.job (id, kind, queue, priority, payload, owner, idempotency_key, max_attempts, hard_deadline,
                               external_id, run_at, created_at)
    values (coalesce(p_id, pg_catalog.gen_random_uuid()), p_kind, p_queue, p_priority, p_payload, p_owner, p_idempotency_key,
            p_max_attempts, p_hard_deadline, p_external_id, v_run_at, v_now)
    on conflict do nothing
    returning id into v_id;
    if v_id is null then
        -- Known already, by key or by id. A new statement, so it sees a competitor that committed while the insert waited.
        select id into v_id from brightrun.job where kind = p_kind and idempotency_key = p_idempotency_key;
        if v_id is null then
            select id into v_id from brightrun.job where id = p_id;
        end if;
        if v_id is null then
            raise exception 'another transaction is enqueueing the same job' using errcode = '40001',
                hint = 'a REPEATABLE READ transaction cannot see it; try again in a new one';
        end if;
        return v_id;
    end if;
    insert into brightrun.ready (job_id, queue, kind, priority, ready_seq, run_at)
    values (v_id, p_queue, p_kind, p_priority,
            case when v_run_at <= v_now then pg_catalog.nextval('brightrun.ready_seq') end, v_run_at);
    perform brightrun._append(v_id, 'enqueued', brightrun._detail(null, 0, null), 0, null, null);
    perform brightrun._project(p_kind, v_id, 'enqueued', brightrun._detail(null, 0, null));
    if p_notify then
        perform pg_catalog.pg_notify('brightrun_ready', '');
    end if;
    return v_id;
end
$$;

-- Never waits for a worker, only for another cancel or the last step of an ending. See "Lock order" above for why.
create or replace function brightrun.cancel(p_job_id uuid, p_reason text default null) returns text
language plpgsql volatile security definer set search_path = '' as $$
declare
    v_reason  text := pg_catalog.left(p_reason, 2000);
    v_first   boolean;
    v_outcome text;
    v_lease   brightrun.lease;
begin
    for v_round in 1 .. 16 loop
        perform from brightrun.ready where job_id = p_job_id for update skip locked;
        if found then
            perform brightrun._cancel_waiting(p_job_id, v_reason);
            return 'cancelled';
        end if;
        begin
            select outcome, cancel_requested_at is null into v_outcome, v_first
            from brightrun.job where id = p_job_id for no key update;
            if not found or v_outcome is not null then
                return v_outcome;
            end if;
            update brightrun.job
            set cancel_requested_at = brightrun.now(), cancel_reason = v_reason
            where id = p_job_id and cancel_requested_at is null;
            perform from brightrun.ready where job_id = p_job_id for update skip locked;
            if found then
                -- It fell back from running to waiting while this waited for its row: begin again and end it at once.
                raise exception 'waiting again' using errcode = 'BR900';
            end if;
            if v_first then
                select * into v_lease from brightrun.lease where job_id = p_job_id;
                perform brightrun._append(p_job_id, 'cancel_requested',
                    brightrun._detail(pg_catalog.jsonb_build_object('reason', v_reason), coalesce(v_lease.attempt, 0), v_lease.worker),
                    coalesce(v_lease.attempt, 0), v_lease.token, v_lease.worker);
            end if;
            perform pg_catalog.pg_notify('brightrun_cancel', '');
            return 'cancel_requested';
        exception when sqlstate 'BR900' then
            null;
        end;
    end loop;
    raise exception 'job % keeps moving', p_job_id using errcode = '40001', hint = 'try the cancel again';
end
$$;

-- An operator's act: a failed job gets a fresh set of attempts. Returns its new state, or null if it is not a failed job.
create or replace function brightrun.redrive(p_job_id uuid, p_reason text default null) returns text
language plpgsql volatile security definer set search_path = '' as $$
declare
    v_job    brightrun.job;
    v_detail jsonb := brightrun._detail(pg_catalog.jsonb_build_object('reason', p_reason), 0, null);
begin
    select * into v_job from brightrun.job where id = p_job_id and outcome = 'failed';
    if not found then
        return null;
    end if;
    perform brightrun._project(v_job.kind, p_job_id, 'redriven', v_detail);
    update brightrun.job
    set outcome = null, attempt = null, finished_at = null, started_at = null, error = null, final_token = null
    where id = p_job_id and outcome = 'failed';
    if not found then
        raise exception 'job % was redriven by somebody else', p_job_id using errcode = '40001';
    end if;
    insert into brightrun.ready (job_id, queue, kind, priority, ready_seq, run_at, claims, started_at, last_token, last_error)
    values (p_job_id, v_job.queue, v_job.kind, v_job.priority, pg_catalog.nextval('brightrun.ready_seq'), brightrun.now(),
            v_job.attempt, v_job.started_at, v_job.final_token, v_job.error);
    perform brightrun._append(p_job_id, 'redriven', v_detail, 0, null, null);
    return 'ready';
end
$$;

-- Which run of an outside system (a RunPod job, say) works on this job. False if there is no such live job.
create or replace function brightrun.set_external_id(p_job_id uuid, p_external_id text) returns boolean
language plpgsql volatile security definer set search_path = '' as $$
begin
    update brightrun.job set external_id = p_external_id where id = p_job_id and outcome is null;
    return found;
end
$$;

-- --- The interface: a worker's side ----------------------------------------------------------------------------------

-- Up to p_limit jobs of the given kinds from one queue. Within a kind: by priority, then in the order they became ready.
-- Between kinds: the kind with the best head first, so with one free slot the best job of all.
create or replace function brightrun.claim(p_worker text, p_kinds text[], p_limit integer default 1,
                                           p_lease interval default interval '2 minutes', p_queue text default 'default')
returns setof brightrun.claimed
language plpgsql volatile security definer set search_path = '' set lock_timeout = '500ms' as $$
declare
    v_kind    text;
    v_jobs    uuid[];
    v_granted uuid[] := '{}';
    v_left    integer := least(p_limit, 10000);
begin
    perform brightrun._promote(brightrun.now());
    for v_kind in
        select wanted.kind
        from (select distinct kind from pg_catalog.unnest(p_kinds) as given (kind)) wanted
        cross join lateral (
            select priority, ready_seq from brightrun.ready
            where queue = p_queue and ready.kind = wanted.kind and ready_seq is not null
            order by priority, ready_seq limit 1
        ) head
        order by head.priority, head.ready_seq
    loop
        exit when v_left <= 0;
        v_jobs := array(
            select job_id from brightrun.ready
            where queue = p_queue and kind = v_kind and ready_seq is not null
            order by priority, ready_seq limit v_left
            for update skip locked
        );
        continue when v_jobs = '{}';
        v_jobs := brightrun._grant(v_kind, v_jobs, p_worker, p_lease);
        v_granted := v_granted || v_jobs;
        v_left := v_left - pg_catalog.cardinality(v_jobs);
    end loop;
    return query select * from brightrun.claimed where job_id = any (v_granted) order by token;
end
$$;

-- One job by its id, for a worker that was sent for it. No row: it is not waiting, its time has not come, or another claim has it.
create or replace function brightrun.claim_job(p_worker text, p_job_id uuid, p_lease interval default interval '2 minutes')
returns setof brightrun.claimed
language plpgsql volatile security definer set search_path = '' set lock_timeout = '500ms' as $$
declare
    v_kind text;
begin
    select kind into v_kind from brightrun.ready
    where job_id = p_job_id and (ready_seq is not null or run_at <= brightrun.now())
    for update skip locked;
    if found and brightrun._grant(v_kind, array[p_job_id], p_worker, p_lease) <> '{}' then
        return query select * from brightrun.claimed where job_id = p_job_id;
    end if;
end
$$;

-- Extends leases, stores progress, and tells what the worker must know. One call serves all jobs of a process. A lease that some
-- other call is just changing is skipped, not waited for: its neighbours must not die of it.
--   alive    go on;   cancel   stop, then report any ending;   deadline   the hard deadline has passed, the lease will not be extended;
--   lost     the token is not the current one: stop, nothing you write will be accepted
create or replace function brightrun.heartbeat(p_job_ids uuid[], p_tokens bigint[], p_progress jsonb[] default null)
returns table (job_id uuid, token bigint, reply text, lease_seconds float8, reason text)
language plpgsql volatile security definer set search_path = '' set lock_timeout = '500ms' as $$
#variable_conflict use_column
declare
    v_now     timestamptz := brightrun.now();
    v_beat    record;
    v_blocked boolean := false;
begin
    with beats as (
        select beat.job_id, beat.token, beat.progress
        from rows from (pg_catalog.unnest(p_job_ids), pg_catalog.unnest(p_tokens), pg_catalog.unnest(p_progress))
             as beat (job_id, token, progress)
    ), held as materialized (
        select lease.job_id, beats.progress
        from brightrun.lease join beats on beats.job_id = lease.job_id and beats.token = lease.token
        order by lease.job_id
        for update of lease skip locked
    )
    update brightrun.lease
    set expires_at = case when lease.deadline_at <= v_now then lease.expires_at
                          else least(v_now + lease.lease_for, lease.deadline_at) end,
        beat_at = v_now,
        progress = coalesce(held.progress, lease.progress)
    from held where lease.job_id = held.job_id;

    for v_beat in
        select lease.kind, lease.job_id, lease.attempt, lease.worker, lease.token, beat.progress
        from rows from (pg_catalog.unnest(p_job_ids), pg_catalog.unnest(p_tokens), pg_catalog.unnest(p_progress))
             as beat (job_id, token, progress)
        join brightrun.lease on lease.job_id = beat.job_id and lease.token = beat.token
        join brightrun.job_kind on job_kind.kind = lease.kind and job_kind.projector is not null
        where beat.progress is not null and lease.beat_at = v_now
        order by lease.job_id
    loop
        exit when v_blocked;
        begin
            perform brightrun._project(v_beat.kind, v_beat.job_id, 'progress',
                                       brightrun._detail(v_beat.progress, v_beat.attempt, v_beat.worker));
        exception
            when lock_not_available then
                v_blocked := true;
            when others then
                perform brightrun._append(v_beat.job_id, 'projector_error',
                    brightrun._detail(pg_catalog.jsonb_build_object('during', 'progress', 'sqlstate', sqlstate,
                                      'message', pg_catalog.left(sqlerrm, 2000)), v_beat.attempt, v_beat.worker),
                    v_beat.attempt, v_beat.token, v_beat.worker);
        end;
    end loop;

    return query
    select beat.job_id, beat.token,
           case when lease.job_id is null then 'lost'
                when job.cancel_requested_at is not null then 'cancel'
                when lease.deadline_at <= v_now then 'deadline'
                else 'alive' end,
           coalesce(extract(epoch from lease.expires_at - v_now), 0)::float8,
           job.cancel_reason
    from rows from (pg_catalog.unnest(p_job_ids), pg_catalog.unnest(p_tokens)) as beat (job_id, token)
    left join brightrun.lease on lease.job_id = beat.job_id and lease.token = beat.token
    left join brightrun.job on job.id = beat.job_id;
end
$$;

-- Anything a worker has to say about its run, kept in the history and handed to the projector.
create or replace function brightrun.report(p_job_id uuid, p_token bigint, p_event text, p_detail jsonb default '{}') returns void
language plpgsql volatile security definer set search_path = '' as $$
declare
    v_lease  brightrun.lease := brightrun._hold(p_job_id, p_token);
    v_detail jsonb := brightrun._detail(p_detail, v_lease.attempt, v_lease.worker);
begin
    if p_event in ('enqueued', 'claimed', 'resumed', 'completed', 'failed', 'retry', 'snoozed', 'released', 'cancelled',
                   'cancel_requested', 'redriven', 'projector_error') then
        raise exception 'the event name % belongs to the engine', p_event using errcode = '22023';
    end if;
    perform brightrun._append(p_job_id, p_event, v_detail, v_lease.attempt, p_token, v_lease.worker);
    perform brightrun._project(v_lease.kind, p_job_id, p_event, v_detail);
end
$$;

-- The endings. Each returns the state the job got, which after a cancel request is 'cancelled' whatever was asked for, and each
-- can be repeated: the same token is told again what it did.
create or replace function brightrun.complete(p_job_id uuid, p_token bigint, p_result jsonb default '{}') returns text
language plpgsql volatile security definer set search_path = '' as $$
declare
    v_lease brightrun.lease;
    v_state text;
begin
    select * into v_lease from brightrun.lease where job_id = p_job_id and token = p_token for update;
    if not found then
        v_state := brightrun._done_by(p_job_id, p_token);
        if v_state is null then
            perform brightrun._refuse(p_job_id, p_token);
        end if;
        return v_state;
    end if;
    return brightrun._leave(v_lease, 'completed', p_result, 'completed', coalesce(p_result, '{}'), null, null, null);
end
$$;

-- p_error: {code, blame: user|system|platform, message, detail}. p_retry_after replaces the kind's backoff.
create or replace function brightrun.fail(p_job_id uuid, p_token bigint, p_error jsonb, p_retry_after interval default null)
returns text
language plpgsql volatile security definer set search_path = '' as $$
declare
    v_lease brightrun.lease;
    v_state text;
begin
    if pg_catalog.jsonb_typeof(p_error) is distinct from 'object'
       or coalesce(p_error ->> 'blame', '') not in ('user', 'system', 'platform')
       or coalesce(p_error ->> 'code', '') = '' then
        raise exception 'an error needs a code and a blame of user, system or platform' using errcode = '22023';
    end if;
    select * into v_lease from brightrun.lease where job_id = p_job_id and token = p_token for update;
    if not found then
        v_state := brightrun._done_by(p_job_id, p_token);
        if v_state is null then
            perform brightrun._refuse(p_job_id, p_token);
        end if;
        return v_state;
    end if;
    return brightrun._fail(v_lease, p_error, p_retry_after);
end
$$;

-- Not now: run again after p_delay. Not an attempt.
create or replace function brightrun.snooze(p_job_id uuid, p_token bigint, p_delay interval, p_reason text default null) returns text
language plpgsql volatile security definer set search_path = '' as $$
declare
    v_lease  brightrun.lease;
    v_state  text;
    v_run_at timestamptz := brightrun.now() + p_delay;
begin
    select * into v_lease from brightrun.lease where job_id = p_job_id and token = p_token for update;
    if not found then
        v_state := brightrun._done_by(p_job_id, p_token);
        if v_state is null then
            perform brightrun._refuse(p_job_id, p_token);
        end if;
        return v_state;
    end if;
    return brightrun._leave(v_lease, 'snoozed', pg_catalog.jsonb_build_object('reason', p_reason, 'run_at', v_run_at),
                            null, null, null, v_run_at, v_lease.attempt - 1);
end
$$;

-- Interrupted (shutdown, preemption): ready again at once. Not an attempt.
create or replace function brightrun.release(p_job_id uuid, p_token bigint, p_reason text default null) returns text
language plpgsql volatile security definer set search_path = '' as $$
declare
    v_lease brightrun.lease;
    v_state text;
begin
    select * into v_lease from brightrun.lease where job_id = p_job_id and token = p_token for update;
    if not found then
        v_state := brightrun._done_by(p_job_id, p_token);
        if v_state is null then
            perform brightrun._refuse(p_job_id, p_token);
        end if;
        return v_state;
    end if;
    perform pg_catalog.pg_notify('brightrun_ready', '');
    return brightrun._leave(v_lease, 'released', pg_catalog.jsonb_build_object('reason', p_reason),
                            null, null, null, null, v_lease.attempt - 1);
end
$$;

-- Gives back what a claim granted but its caller never heard of, because the connection broke in between. Returns how many.
create or replace function brightrun.release_unknown(p_worker text, p_known bigint[]) returns integer
language plpgsql volatile security definer set search_path = '' as $$
declare
    v_lease brightrun.lease;
    v_count integer := 0;
begin
    for v_lease in
        select * from brightrun.lease where worker = p_worker and token <> all (p_known) order by job_id for update skip locked
    loop
        perform brightrun._leave(v_lease, 'released', '{"reason": "the answer to the claim was lost"}'::jsonb,
                                 null, null, null, null, v_lease.attempt - 1);
        v_count := v_count + 1;
    end loop;
    return v_count;
end
$$;

-- --- The interface: housekeeping -------------------------------------------------------------------------------------

-- Takes expired leases away. After a gap in these calls longer than p_gap (the database, or everybody who calls this, was
-- away) no lease is judged until it has had a full length of its own to be renewed. One caller at a time; others get no row.
create or replace function brightrun.rescue_expired(p_limit integer default 100, p_gap interval default interval '30 seconds')
returns table (job_id uuid, state text)
language plpgsql volatile security definer set search_path = '' set lock_timeout = '500ms' as $$
#variable_conflict use_column
declare
    v_now    timestamptz := brightrun.now();
    v_house  brightrun.housekeeping;
    v_steady timestamptz;
    v_lease  brightrun.lease;
    v_error  jsonb;
begin
    select * into v_house from brightrun.housekeeping for update skip locked;
    if not found then
        return;
    end if;
    v_steady := case when v_house.last_sweep_at is null or v_now - v_house.last_sweep_at > p_gap then v_now
                     else greatest(v_house.steady_since, pg_catalog.pg_postmaster_start_time()) end;
    update brightrun.housekeeping set last_sweep_at = v_now, steady_since = v_steady;
    for v_lease in
        select * from brightrun.lease
        where expires_at <= v_now and (v_steady <= v_now - lease_for or deadline_at <= v_now)
        order by expires_at limit p_limit
        for update skip locked
    loop
        v_error := case when v_lease.deadline_at <= v_now
            then pg_catalog.jsonb_build_object('code', 'QUEUE_DEADLINE_EXCEEDED', 'blame', 'system',
                'message', pg_catalog.format('the run took longer than its hard deadline of %s', v_lease.deadline_at - v_lease.claimed_at))
            else pg_catalog.jsonb_build_object('code', 'QUEUE_LEASE_EXPIRED', 'blame', 'platform',
                'message', pg_catalog.format('worker %s has not been heard of since %s', v_lease.worker, v_lease.beat_at)) end;
        begin
            job_id := v_lease.job_id;
            state := brightrun._fail(v_lease, v_error, null);
            return next;
        exception
        when lock_not_available then
            null;
        when others then
            update brightrun.lease set expires_at = least(v_now + lease_for, deadline_at) where lease.job_id = v_lease.job_id;
            perform brightrun._append(v_lease.job_id, 'projector_error',
                brightrun._detail(pg_catalog.jsonb_build_object('during', 'rescue', 'sqlstate', sqlstate,
                                  'message', pg_catalog.left(sqlerrm, 2000)), v_lease.attempt, v_lease.worker),
                v_lease.attempt, v_lease.token, v_lease.worker);
        end;
    end loop;
end
$$;

-- Makes the partition of one UTC day, moving into it what the default partition already caught of that day.
create or replace function brightrun._event_day(p_day date) returns void
language plpgsql volatile set search_path = '' as $$
declare
    v_name text := 'event_' || pg_catalog.to_char(p_day, 'YYYY_MM_DD');
    v_from timestamptz := p_day::timestamp at time zone 'UTC';
    v_to   timestamptz := (p_day + 1)::timestamp at time zone 'UTC';
begin
    if pg_catalog.to_regclass('brightrun.' || v_name) is not null then
        return;
    end if;
    -- Whoever writes history now waits here for milliseconds, so that no row lands in the default between move and attach.
    lock table brightrun.event in share row exclusive mode;
    execute pg_catalog.format('create table brightrun.%I (like brightrun.event including defaults including constraints)', v_name);
    execute pg_catalog.format('alter table brightrun.%I enable row level security', v_name);
    execute pg_catalog.format(
        'with moved as (delete from brightrun.event_default where at >= %L and at < %L returning *) '
        'insert into brightrun.%I select * from moved', v_from, v_to, v_name);
    execute pg_catalog.format('alter table brightrun.event attach partition brightrun.%I for values from (%L) to (%L)',
                              v_name, v_from, v_to);
end
$$;

-- Partitions ahead, old history and old jobs away, in bounded bites. Harmless to call often and from many places.
create or replace function brightrun.maintain() returns jsonb
language plpgsql volatile security definer set search_path = '' set lock_timeout = '2s' as $$
declare
    v_now     timestamptz := brightrun.now();
    v_today   date := (v_now at time zone 'UTC')::date;
    v_house   brightrun.housekeeping;
    v_day     date;
    v_name    text;
    v_dropped integer := 0;
    v_events  integer;
    v_jobs    integer;
begin
    if not pg_catalog.pg_try_advisory_xact_lock(4702111234474983746) then
        return '{"skipped": true}'::jsonb;
    end if;
    select * into v_house from brightrun.housekeeping;
    for v_day in select v_today + ahead from pg_catalog.generate_series(0, 3) as ahead
                 union select distinct (at at time zone 'UTC')::date
                 from (select at from brightrun.event_default order by at limit 10000) stray
    loop
        perform brightrun._event_day(v_day);
    end loop;
    for v_name in
        select relname from pg_catalog.pg_inherits join pg_catalog.pg_class on pg_class.oid = inhrelid
        where inhparent = 'brightrun.event'::regclass and relname ~ '^event_\d{4}_\d{2}_\d{2}$'
          and pg_catalog.to_date(pg_catalog.substr(relname, 7), 'YYYY_MM_DD') < ((v_now - v_house.event_retention) at time zone 'UTC')::date
    loop
        execute pg_catalog.format('drop table brightrun.%I', v_name);
        v_dropped := v_dropped + 1;
    end loop;
    v_jobs := brightrun.prune(v_house.job_retention);
    return pg_catalog.jsonb_build_object('skipped', false, 'partitions_dropped', v_dropped, 'jobs_pruned', v_jobs);
end
$$;

-- Forgets jobs that ended more than p_retention ago, and with them their idempotency keys; also messages long dead.
create or replace function brightrun.prune(p_retention interval, p_limit integer default 1000) returns integer
language plpgsql volatile security definer set search_path = '' as $$
declare
    v_before timestamptz := brightrun.now() - p_retention;
    v_count  integer;
begin
    with old as materialized (
        select id from brightrun.job where created_at < v_before and finished_at < v_before
        order by created_at limit p_limit for update skip locked
    )
    delete from brightrun.job using old where job.id = old.id;
    get diagnostics v_count = row_count;
    delete from brightrun.outbox where dead_at < v_before;
    return v_count;
end
$$;

-- --- The interface: outbox -------------------------------------------------------------------------------------------

create or replace function brightrun.outbox_put(p_topic text, p_payload jsonb, p_key text default null, p_delay interval default null)
returns bigint
language sql volatile security definer set search_path = '' as $$
    insert into brightrun.outbox (topic, key, payload, created_at, due_at)
    values (p_topic, p_key, p_payload, brightrun.now(), brightrun.now() + coalesce(p_delay, interval '0'))
    returning id
$$;

-- Up to p_limit due messages, oldest first, hidden from others for p_hold. Taken at least once; acknowledged exactly once,
-- by the token of the last taker.
create or replace function brightrun.outbox_take(p_topics text[], p_limit integer default 10, p_hold interval default interval '1 minute')
returns table (id bigint, token bigint, topic text, key text, payload jsonb, attempts integer, created_at timestamptz)
language plpgsql volatile security definer set search_path = '' as $$
#variable_conflict use_column
declare
    v_now timestamptz := brightrun.now();
begin
    return query
    with due as materialized (
        select outbox.id from brightrun.outbox
        where outbox.topic = any (p_topics) and due_at <= v_now and dead_at is null
        order by due_at, outbox.id limit p_limit
        for update skip locked
    )
    update brightrun.outbox
    set due_at = v_now + p_hold, attempts = outbox.attempts + 1, take_token = pg_catalog.nextval('brightrun.lease_token')
    from due where outbox.id = due.id
    returning outbox.id, outbox.take_token, outbox.topic, outbox.key, outbox.payload, outbox.attempts::integer, outbox.created_at;
end
$$;

-- Done: the message is gone. False if the token is not the last taker's.
create or replace function brightrun.outbox_ack(p_id bigint, p_token bigint) returns boolean
language plpgsql volatile security definer set search_path = '' as $$
begin
    delete from brightrun.outbox where id = p_id and take_token = p_token;
    return found;
end
$$;

-- Not delivered: again after p_delay, or kept as dead after p_max_attempts takes. False if the token is not the last taker's.
create or replace function brightrun.outbox_nack(p_id bigint, p_token bigint, p_error text, p_delay interval,
                                                 p_max_attempts integer default 20) returns boolean
language plpgsql volatile security definer set search_path = '' as $$
begin
    update brightrun.outbox
    set due_at = brightrun.now() + p_delay, take_token = null, last_error = pg_catalog.left(p_error, 2000),
        dead_at = case when attempts >= p_max_attempts then brightrun.now() end
    where id = p_id and take_token = p_token;
    return found;
end
$$;

-- --- The interface: looking ------------------------------------------------------------------------------------------

create or replace function brightrun.status(p_job_id uuid) returns setof brightrun.job_status
language sql stable security definer set search_path = '' as $$
    select * from brightrun.job_status where id = p_job_id
$$;

create or replace function brightrun.jobs(p_kind text default null, p_state text default null, p_limit integer default 50)
returns setof brightrun.job_status
language sql stable security definer set search_path = '' as $$
    select * from brightrun.job_status
    where (p_kind is null or kind = p_kind) and (p_state is null or state = p_state)
    order by created_at desc limit p_limit
$$;

create or replace function brightrun.job_events(p_job_id uuid, p_after bigint default 0, p_limit integer default 1000)
returns setof brightrun.event
language sql stable security definer set search_path = '' as $$
    select * from brightrun.event where job_id = p_job_id and seq > p_after order by seq limit p_limit
$$;

-- What waits and what runs, from the two small tables only: the size of the past does not matter.
create or replace function brightrun.stats()
returns table (queue text, kind text, ready bigint, scheduled bigint, running bigint, expired bigint, oldest_ready_seconds float8)
language sql stable security definer set search_path = '' as $$
    with clock as materialized (select brightrun.now() as now), counted as (
        select ready.queue, ready.kind, (ready.ready_seq is not null)::integer as ready, (ready.ready_seq is null)::integer as scheduled,
               0 as running, 0 as expired, case when ready.ready_seq is not null then ready.run_at end as ready_since
        from brightrun.ready
        union all
        select lease.queue, lease.kind, 0, 0, 1, (lease.expires_at <= clock.now)::integer, null
        from brightrun.lease cross join clock
    )
    select counted.queue, counted.kind, sum(counted.ready), sum(counted.scheduled), sum(counted.running), sum(counted.expired),
           extract(epoch from max(clock.now) - min(counted.ready_since))::float8
    from counted cross join clock
    group by counted.queue, counted.kind order by counted.queue, counted.kind
$$;

-- Every breach of invariant 1 there is: none, unless somebody wrote to the tables by hand.
create or replace function brightrun.violations() returns table (job_id uuid, batons integer)
language sql stable security definer set search_path = '' as $$
    select job.id, (ready.job_id is not null)::integer + (lease.job_id is not null)::integer + (job.outcome is not null)::integer
    from brightrun.job
    left join brightrun.ready on ready.job_id = job.id
    left join brightrun.lease on lease.job_id = job.id
    where (ready.job_id is not null)::integer + (lease.job_id is not null)::integer + (job.outcome is not null)::integer <> 1
$$;

create or replace function brightrun.engine_version() returns integer
language sql stable security definer set search_path = '' as $$
    select version from brightrun.version where section = 'engine'
$$;

-- --- Who may do what -------------------------------------------------------------------------------------------------

alter table brightrun.version      enable row level security;
alter table brightrun.job          enable row level security;
alter table brightrun.ready        enable row level security;
alter table brightrun.lease        enable row level security;
alter table brightrun.event        enable row level security;
alter table brightrun.event_default enable row level security;
alter table brightrun.job_kind     enable row level security;
alter table brightrun.outbox       enable row level security;
alter table brightrun.housekeeping enable row level security;

-- Functions are executable by everybody unless that is taken back. Sections after this one grant what they add.
revoke all on schema brightrun from public;
revoke all on all tables in schema brightrun from public;
revoke all on all sequences in schema brightrun from public;
revoke all on all functions in schema brightrun from public;

do $$
declare
    v_role     text;
    v_function text;
begin
    perform pg_catalog.pg_advisory_xact_lock(4702111234474983745);
    foreach v_role in array array['brightrun_worker', 'service_role'] loop
        continue when pg_catalog.to_regrole(v_role) is null;
        execute pg_catalog.format('grant usage on schema brightrun to %I', v_role);
        foreach v_function in array array[
            'now()',
            'enqueue(text,jsonb,uuid,text,integer,uuid,text,integer,timestamptz,interval,interval,text,boolean)',
            'cancel(uuid,text)', 'redrive(uuid,text)', 'set_external_id(uuid,text)',
            'claim(text,text[],integer,interval,text)', 'claim_job(text,uuid,interval)',
            'heartbeat(uuid[],bigint[],jsonb[])', 'report(uuid,bigint,text,jsonb)',
            'complete(uuid,bigint,jsonb)', 'fail(uuid,bigint,jsonb,interval)',
            'snooze(uuid,bigint,interval,text)', 'release(uuid,bigint,text)', 'release_unknown(text,bigint[])',
            'rescue_expired(integer,interval)', 'maintain()',
            'outbox_put(text,jsonb,text,interval)', 'outbox_take(text[],integer,interval)',
            'outbox_ack(bigint,bigint)', 'outbox_nack(bigint,bigint,text,interval,integer)',
            'status(uuid)', 'jobs(text,text,integer)', 'job_events(uuid,bigint,integer)', 'stats()', 'violations()',
            'engine_version()'
        ] loop
            execute pg_catalog.format('grant execute on function brightrun.%s to %I', v_function, v_role);
        end loop;
    end loop;
    -- Retention is the owner's and the server's to decide, not a worker's. The server side may also look at the tables.
    if pg_catalog.to_regrole('service_role') is not null then
        grant execute on function brightrun.prune(interval, integer) to service_role;
        grant select on all tables in schema brightrun to service_role;
    end if;
end
$$;

select brightrun.maintain();

insert into brightrun.version (section, version) values ('engine', 1)
on conflict (section) do update set version = excluded.version, applied_at = excluded.applied_at;
-- <<< engine
