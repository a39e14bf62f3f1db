-- brightrun schema, optional: the database itself pushes jobs to RunPod
--
-- For a Supabase project without a machine for `brightrun orchestrate`: the trigger on `training_jobs` hands a job to a RunPod
-- endpoint through pg_net, and a schedule (pg_cron, or anything that can call a function) looks after it. It plans, reserves,
-- reconciles and retries as the orchestrator does, by the same functions of section `dispatch`, so that orchestrators and pull
-- workers may work beside it. What it cannot do: check data sets before a GPU is asked for, and send webhooks.
--
--     psql -1 -v ON_ERROR_STOP=1 -f schema_push.sql "$DATABASE_URL"       after schema.sql; as often as you like
--     select vault.create_secret('…', 'RUNPOD_API_KEY');                  the key, in Vault and nowhere else
--     insert into brightrun.push_endpoint (id, gpu_types, max_jobs) values ('ENDPOINT', '{A100-80GB,H100}', 4);
--     select cron.schedule('brightrun-push', '10 seconds', 'select brightrun.push_tick()');
--
-- SECRETS. Rows here hold the *name* of the key in Vault. pg_net keeps a request with its headers in its own unlogged queue
-- from the commit until its worker sends it, moments later; that is pg_net's way and the only place where the key is written.
--
-- THE WAY OF A CALL. A request leaves when its transaction commits (pg_net) and its answer comes as a row, so every step is a
-- transaction: reserve and ask, later read the answer and note it. A request or an answer that is lost (pg_net's tables do not
-- survive a crash) costs the hold of the dispatch, 90 seconds, after which it is asked again; the claim lets one run count.

-- What the orchestrator has in its settings. One row.
create table if not exists brightrun.push_setting (
    only_row         boolean primary key default true check (only_row),
    api_base         text not null default 'https://api.runpod.ai/v2' check (api_base ~ '^https?://[^?#@]+[^/?#@]$'),
    key_name         text not null default 'RUNPOD_API_KEY' check (key_name <> ''),
    max_job_dollars  numeric not null default 0 check (max_job_dollars >= 0),    -- 0: no ceiling
    max_user_dollars numeric not null default 0 check (max_user_dollars >= 0),
    default_hours    numeric not null default 4 check (default_hours > 0),
    max_hours        numeric not null default 12 check (max_hours between 0.01 and 168),
    queue_hours      numeric not null default 24 check (queue_hours > 0),
    look_every       interval not null default '10 seconds' check (look_every > interval '0'),
    prices           jsonb not null default '{"A100-80GB": 3.5, "A100-40GB": 2.8, "H100": 4.2, "V100-32GB": 2.1}'
);
insert into brightrun.push_setting default values on conflict do nothing;

-- Endpoints, in the order in which they are looked at for a job's GPU type; no types: all.
create table if not exists brightrun.push_endpoint (
    id          text primary key check (id ~ '^[A-Za-z0-9_-]{1,200}$'),
    ordinal     integer not null default 0,
    gpu_types   text[] not null default '{}',
    max_jobs    integer not null default 4 check (max_jobs > 0),
    rests_until timestamptz,
    rest        interval not null default '0'
);

-- Requests that are under way, by pg_net's number.
create table if not exists brightrun.push_call (
    request_id bigint primary key,
    job_id     uuid not null,
    token      bigint not null,
    endpoint   text not null,
    what       text not null check (what in ('run', 'status', 'cancel', 'stop')),
    asked_at   timestamptz not null
);
alter table brightrun.push_setting  enable row level security;
alter table brightrun.push_endpoint enable row level security;
alter table brightrun.push_call     enable row level security;

-- --- What is decided before a job is pushed (as the orchestrator decides) ----------------------------------------------

-- endpoint null: nobody takes this GPU type. refuse: why the job must not run at all.
create or replace function brightrun._push_plan(p_payload jsonb)
returns table (endpoint text, max_jobs integer, dollars numeric, execution_ms bigint, ttl_ms bigint, refuse jsonb)
language plpgsql stable set search_path = '' as $$
declare
    v_setting  brightrun.push_setting;
    v_type     text := coalesce(p_payload #>> '{gpu_config,type}', p_payload #>> '{gpu_config,gpu_type}', 'A100-80GB');
    v_per_hour numeric;
    v_hours    numeric;
    v_limit    numeric;
begin
    select * into strict v_setting from brightrun.push_setting;
    select push_endpoint.id, push_endpoint.max_jobs into endpoint, max_jobs
    from brightrun.push_endpoint
    where push_endpoint.gpu_types = '{}' or v_type = any(push_endpoint.gpu_types)
    order by push_endpoint.ordinal, push_endpoint.id limit 1;
    v_per_hour := coalesce(brightrun._push_positive(p_payload #> '{gpu_config,cost_per_gpu_hour}'),
                           brightrun._push_positive(v_setting.prices -> v_type), 0)
                * coalesce(brightrun._push_positive(p_payload #> '{gpu_config,count}'),
                           brightrun._push_positive(p_payload #> '{gpu_config,num_gpus}'), 1);
    v_hours := case when v_per_hour > 0
                    then brightrun._push_positive(p_payload -> 'estimated_total_cost') / v_per_hour end;
    v_hours := coalesce(v_hours, v_setting.default_hours);
    dollars := v_hours * v_per_hour;
    if v_setting.max_job_dollars > 0 and dollars > v_setting.max_job_dollars then
        refuse := pg_catalog.jsonb_build_object('code', 'JOB_TOO_EXPENSIVE', 'blame', 'user', 'message',
            pg_catalog.format('The job would cost about $%s; one job may cost $%s', round(dollars, 2),
                              round(v_setting.max_job_dollars, 2)));
    end if;
    -- An estimate is wrong by three at most, and loading a large model takes its time.
    v_limit := least(greatest(v_hours * 3, 1), v_setting.max_hours);
    if v_setting.max_job_dollars > 0 and v_per_hour > 0 then
        v_limit := least(v_limit, v_setting.max_job_dollars / v_per_hour);
    end if;
    execution_ms := greatest(v_limit * 3600000, 5000)::bigint;
    ttl_ms := least((v_limit + v_setting.queue_hours) * 3600000, 604800000)::bigint;
    return next;
end
$$;

create or replace function brightrun._push_positive(p_value jsonb) returns numeric
language sql immutable set search_path = '' as $$
    select case when pg_catalog.jsonb_typeof(p_value) = 'number' and p_value::numeric > 0 then p_value::numeric end
$$;

-- --- Calls -------------------------------------------------------------------------------------------------------------

create or replace function brightrun._push_key() returns text
language plpgsql stable set search_path = '' as $$
declare
    v_name text := (select key_name from brightrun.push_setting);
    v_key  text;
begin
    select decrypted_secret into v_key from vault.decrypted_secrets where name = v_name;
    if coalesce(v_key, '') = '' then
        raise exception 'Vault has no secret named %', v_name using hint =
            'Create it with vault.create_secret, or name another one in brightrun.push_setting.key_name.';
    end if;
    return v_key;
end
$$;

create or replace function brightrun._push_call(p_job_id uuid, p_token bigint, p_endpoint text, p_what text, p_path text,
                                                p_body jsonb) returns void
language plpgsql volatile set search_path = '' as $$
declare
    v_url     text := (select api_base from brightrun.push_setting) || '/' || p_endpoint || p_path;
    v_headers jsonb := pg_catalog.jsonb_build_object('Authorization', 'Bearer ' || brightrun._push_key(),
                                                     'Content-Type', 'application/json');
    v_id      bigint;
begin
    if p_what = 'status' then
        v_id := net.http_get(url := v_url, headers := v_headers, timeout_milliseconds := 10000);
    else
        v_id := net.http_post(url := v_url, body := p_body, headers := v_headers, timeout_milliseconds := 10000);
    end if;
    insert into brightrun.push_call (request_id, job_id, token, endpoint, what, asked_at)
    values (v_id, p_job_id, p_token, p_endpoint, p_what, brightrun.now());
end
$$;

create or replace function brightrun._push_run(p_job_id uuid, p_token bigint, p_endpoint text, p_execution_ms bigint,
                                               p_ttl_ms bigint) returns void
language sql volatile set search_path = '' as $$
    select brightrun._push_call(p_job_id, p_token, p_endpoint, 'run', '/run', pg_catalog.jsonb_build_object(
        'input', pg_catalog.jsonb_build_object('job_id', p_job_id),
        'policy', pg_catalog.jsonb_build_object('executionTimeout', p_execution_ms, 'ttl', p_ttl_ms, 'lowPriority', false)))
$$;

-- The name of a run is RunPod's; nothing but these characters goes into a path.
create or replace function brightrun._push_path(p_external_id text) returns text
language sql immutable set search_path = '' as $$
    select '/' || pg_catalog.regexp_replace(p_external_id, '[^A-Za-z0-9_.~-]', '', 'g')
$$;

-- An endpoint in trouble rests: a second, doubled each time, a minute at most. One that answered well does not.
create or replace function brightrun._push_rest(p_endpoint text, p_is_in_trouble boolean) returns void
language sql volatile set search_path = '' as $$
    update brightrun.push_endpoint
    set rest = case when p_is_in_trouble then least(greatest(rest * 2, interval '1 second'), interval '1 minute')
                    else interval '0' end,
        rests_until = case when p_is_in_trouble
                           then brightrun.now() + least(greatest(rest * 2, interval '1 second'), interval '1 minute') end
    where id = p_endpoint and (p_is_in_trouble is not true or coalesce(rests_until, '-infinity') <= brightrun.now())
      and (p_is_in_trouble or rests_until is not null)
$$;

create or replace function brightrun._push_rests(p_endpoint text) returns boolean
language sql stable set search_path = '' as $$
    select exists (select from brightrun.push_endpoint where id = p_endpoint and rests_until > pg_catalog.clock_timestamp())
$$;

-- --- Waiting jobs are pushed -------------------------------------------------------------------------------------------

-- How many were.
create or replace function brightrun.push_waiting(p_limit integer default 1000) returns integer
language plpgsql volatile security definer set search_path = '' as $$
declare
    v_job     record;
    v_plan    record;
    v_ceiling numeric := (select nullif(max_user_dollars, 0) from brightrun.push_setting);
    v_spent   numeric;
    v_token   bigint;
    v_full    text[] := '{}';
    v_pushed  integer := 0;
begin
    for v_job in select * from brightrun.dispatch_waiting('default', 'train', p_limit) loop
        select * into v_plan from brightrun._push_plan(v_job.payload);
        if v_plan.refuse is null and v_ceiling is not null and v_job.owner is not null then
            select spend.spent::numeric into v_spent from brightrun.dispatch_spend(v_job.owner) as spend;
            if v_spent + v_plan.dollars > v_ceiling then
                v_plan.refuse := pg_catalog.jsonb_build_object('code', 'USER_SPEND_LIMIT', 'blame', 'user', 'message',
                    pg_catalog.format('The job would cost about $%s; $%s of this month''s $%s are spent',
                                      round(v_plan.dollars, 2), round(v_spent, 2), round(v_ceiling, 2)));
            end if;
        end if;
        if v_plan.refuse is not null then
            perform brightrun.dispatch_refuse(v_job.job_id, v_plan.refuse);
            continue;
        end if;
        continue when v_plan.endpoint is null or v_plan.endpoint = any(v_full) or brightrun._push_rests(v_plan.endpoint);
        v_token := brightrun.dispatch_begin(v_job.job_id, v_plan.endpoint, v_plan.max_jobs, v_plan.dollars, v_ceiling,
                                            interval '90 seconds');
        if v_token is null then
            -- Refused for the endpoint's limit, unless it was the owner's money, which says nothing of other jobs.
            if v_ceiling is null or v_job.owner is null then
                v_full := v_full || v_plan.endpoint;
            end if;
            continue;
        end if;
        perform brightrun._push_run(v_job.job_id, v_token, v_plan.endpoint, v_plan.execution_ms, v_plan.ttl_ms);
        v_pushed := v_pushed + 1;
    end loop;
    return v_pushed;
end
$$;

-- --- Answers are noted -------------------------------------------------------------------------------------------------

-- What a run outside that ended unclaimed means; p_status null: RunPod does not know it.
create or replace function brightrun._push_lost(p_status text, p_told text) returns jsonb
language sql immutable set search_path = '' as $$
    select pg_catalog.jsonb_build_object('code', code, 'blame', 'platform',
                                         'message', message || coalesce(': ' || pg_catalog.left(p_told, 1000), ''))
    from (select case when p_status is null then 'RUNPOD_JOB_FORGOTTEN'
                      when p_status = 'TIMED_OUT' then 'RUNPOD_TIMED_OUT'
                      when p_status = 'CANCELLED' then 'RUNPOD_CANCELLED'
                      when p_status = 'COMPLETED' then 'RUNPOD_COMPLETED_WITHOUT_RESULT'
                      else 'RUNPOD_FAILED' end,
                 case when p_status is null then 'RunPod does not know the job any more: its time to live may be over'
                      when p_status = 'TIMED_OUT' then 'RunPod ended the job: no worker came in time, or none began it'
                      when p_status = 'CANCELLED' then 'Somebody cancelled the job at RunPod before a worker had begun it'
                      when p_status = 'COMPLETED' then 'RunPod says completed, but no worker has begun the job'
                      else 'The job failed at RunPod before a worker had begun it' end) as lost (code, message)
$$;

-- Text as JSON; null where it is none.
create or replace function brightrun._push_json(p_text text) returns jsonb
language plpgsql immutable set search_path = '' as $$
begin
    return p_text::jsonb;
exception when others then
    return null;
end
$$;

create or replace function brightrun._push_answered_run(p_call brightrun.push_call, p_status integer, p_body jsonb) returns void
language plpgsql volatile set search_path = '' as $$
declare
    v_name text := p_body ->> 'id';
    v_look interval := (select look_every from brightrun.push_setting);
begin
    if p_status between 200 and 299 and coalesce(v_name, '') <> '' then
        perform brightrun._push_rest(p_call.endpoint, false);
        if not brightrun.dispatch_sent(p_call.job_id, p_call.token, v_name, v_look) then
            -- Somebody else has taken the dispatch meanwhile and pushed the job.
            perform brightrun._push_call(p_call.job_id, p_call.token, p_call.endpoint, 'stop',
                                         '/cancel' || brightrun._push_path(v_name), '{}');
        end if;
    elsif p_status is null or p_status between 200 and 299 or p_status in (502, 504) then
        -- It may have arrived. It is repeated; the claim lets one of both run.
        perform brightrun.dispatch_again(p_call.job_id, p_call.token, interval '15 seconds');
    else
        perform brightrun._push_rest(p_call.endpoint, true);
        perform brightrun.dispatch_over(p_call.job_id, p_call.token);
    end if;
end
$$;

create or replace function brightrun._push_answered_status(p_call brightrun.push_call, p_status integer, p_body jsonb) returns void
language plpgsql volatile set search_path = '' as $$
declare
    v_look   interval := (select look_every from brightrun.push_setting);
    v_remote text := p_body ->> 'status';
    v_job    record;
begin
    if p_status is distinct from 404 and (p_status is null or p_status not between 200 and 299 or v_remote is null) then
        perform brightrun._push_rest(p_call.endpoint, true);
        perform brightrun.dispatch_again(p_call.job_id, p_call.token, v_look);
        return;
    end if;
    perform brightrun._push_rest(p_call.endpoint, false);
    select job_status.state, job_status.claims <> dispatch.claims as was_claimed, dispatch.external_id,
           brightrun.now() - dispatch.sent_at as age
    into v_job
    from brightrun.dispatch join brightrun.job_status on job_status.id = dispatch.job_id
    where dispatch.job_id = p_call.job_id and dispatch.token = p_call.token;
    if not found then
        return;
    end if;
    if v_job.state = 'completed' and v_remote = 'IN_QUEUE' then
        perform brightrun._push_call(p_call.job_id, p_call.token, p_call.endpoint, 'cancel',
                                     '/cancel' || brightrun._push_path(v_job.external_id), '{}');
    elsif v_job.state in ('completed', 'failed', 'cancelled') then
        perform brightrun.dispatch_over(p_call.job_id, p_call.token);
    elsif p_status <> 404 and v_remote not in ('COMPLETED', 'FAILED', 'CANCELLED', 'TIMED_OUT')
          or p_status = 404 and v_job.age < interval '1 minute' and not v_job.was_claimed then
        perform brightrun.dispatch_again(p_call.job_id, p_call.token, v_look);
    elsif v_job.was_claimed then
        perform brightrun.dispatch_over(p_call.job_id, p_call.token);
    elsif brightrun.dispatch_failed(p_call.job_id, p_call.token, brightrun._push_lost(
              case when p_status = 404 then null else v_remote end, p_body ->> 'error')) is null then
        perform brightrun.dispatch_again(p_call.job_id, p_call.token, v_look);
    end if;
end
$$;

create or replace function brightrun._push_answered_cancel(p_call brightrun.push_call, p_status integer) returns void
language plpgsql volatile set search_path = '' as $$
begin
    -- Some answer 400 to a cancel of what is over, and 404 to one they have forgotten.
    if p_status between 200 and 299 or p_status in (400, 404) then
        perform brightrun.dispatch_over(p_call.job_id, p_call.token);
    else
        perform brightrun._push_rest(p_call.endpoint, true);
        perform brightrun.dispatch_again(p_call.job_id, p_call.token,
                                         (select look_every from brightrun.push_setting));
    end if;
end
$$;

-- How many answers were there. A call without an answer is forgotten: the dispatch's hold ends by itself.
create or replace function brightrun.push_answers() returns integer
language plpgsql volatile security definer set search_path = '' as $$
declare
    v_answer record;
    v_call   brightrun.push_call;
    v_read   integer := 0;
begin
    for v_answer in
        select push_call.request_id, response.status_code, brightrun._push_json(response.content) as body
        from brightrun.push_call join net._http_response as response on response.id = push_call.request_id
        order by push_call.request_id
    loop
        delete from brightrun.push_call where request_id = v_answer.request_id returning * into v_call;
        continue when not found;
        case v_call.what
            when 'run'    then perform brightrun._push_answered_run(v_call, v_answer.status_code, v_answer.body);
            when 'status' then perform brightrun._push_answered_status(v_call, v_answer.status_code, v_answer.body);
            when 'cancel' then perform brightrun._push_answered_cancel(v_call, v_answer.status_code);
            else null;
        end case;
        v_read := v_read + 1;
    end loop;
    delete from brightrun.push_call where asked_at < brightrun.now() - interval '2 minutes';
    return v_read;
end
$$;

-- --- Pushed jobs are looked after --------------------------------------------------------------------------------------

-- The row decides; RunPod is asked only about jobs that wait. How many were due.
create or replace function brightrun.push_look() returns integer
language plpgsql volatile security definer set search_path = '' as $$
declare
    v_due   record;
    v_plan  record;
    v_look  interval := (select look_every from brightrun.push_setting);
    v_ours  boolean;
    v_count integer := 0;
begin
    for v_due in select * from brightrun.dispatch_take(200, interval '90 seconds') loop
        v_count := v_count + 1;
        v_ours := v_due.worker like 'runpod:%';
        if not exists (select from brightrun.push_endpoint where id = v_due.endpoint) then
            -- Somebody else's endpoint.
            perform brightrun.dispatch_again(v_due.job_id, v_due.token, v_look * 6);
        elsif brightrun._push_rests(v_due.endpoint) then
            perform brightrun.dispatch_again(v_due.job_id, v_due.token, v_look);
        elsif v_due.external_id is null then
            -- Not known to have been sent. Where it still waits untouched, it is sent again.
            select * into v_plan from brightrun._push_plan(v_due.payload);
            if v_due.state in ('ready', 'scheduled') and not v_due.was_claimed and v_plan.endpoint = v_due.endpoint
               and v_plan.refuse is null then
                perform brightrun._push_run(v_due.job_id, v_due.token, v_due.endpoint, v_plan.execution_ms, v_plan.ttl_ms);
            else
                perform brightrun.dispatch_over(v_due.job_id, v_due.token);
            end if;
        elsif v_due.state in ('failed', 'cancelled') or (v_due.state = 'running' and not coalesce(v_ours, false)) then
            perform brightrun._push_call(v_due.job_id, v_due.token, v_due.endpoint, 'cancel',
                                         '/cancel' || brightrun._push_path(v_due.external_id), '{}');
        elsif v_due.state = 'running' then
            if v_due.cancel_requested then
                perform brightrun._push_call(v_due.job_id, v_due.token, v_due.endpoint, 'stop',
                                             '/cancel' || brightrun._push_path(v_due.external_id), '{}');
            end if;
            perform brightrun.dispatch_again(v_due.job_id, v_due.token, v_look * 3);
        else
            perform brightrun._push_call(v_due.job_id, v_due.token, v_due.endpoint, 'status',
                                         '/status' || brightrun._push_path(v_due.external_id), null);
        end if;
    end loop;
    return v_count;
end
$$;

-- Everything, once; one at a time. What pg_cron calls.
create or replace function brightrun.push_tick() returns jsonb
language plpgsql volatile security definer set search_path = '' as $$
declare
    v_answers integer;
    v_looked  integer;
begin
    if not pg_catalog.pg_try_advisory_xact_lock(4702111234474983748) then
        return '{"busy": true}';
    end if;
    v_answers := brightrun.push_answers();
    v_looked := brightrun.push_look();
    return pg_catalog.jsonb_build_object('answers', v_answers, 'looked', v_looked, 'pushed', brightrun.push_waiting());
end
$$;

-- --- The trigger -------------------------------------------------------------------------------------------------------
-- Deferred: it runs when the app's transaction commits, once for all the jobs in it, and the counting lock of dispatch_begin
-- is held for moments. What goes wrong here never fails the app's insert: the next tick tries again.
create or replace function brightrun.on_training_job_submitted() returns trigger
language plpgsql security definer set search_path = '' as $$
declare
    v_transaction text := pg_catalog.pg_current_xact_id()::text;
begin
    if pg_catalog.current_setting('brightrun.push_done', true) is distinct from v_transaction then
        perform pg_catalog.set_config('brightrun.push_done', v_transaction, true);
        perform brightrun.push_waiting(100);
    end if;
    return null;
exception when others then
    raise warning 'brightrun: the job is not pushed now (%); the next tick tries again', sqlerrm;
    return null;
end
$$;
drop trigger if exists brightrun_submitted on public.training_jobs;
create constraint trigger brightrun_submitted after insert on public.training_jobs
  deferrable initially deferred
  for each row when (new.status = 'queued') execute function brightrun.on_training_job_submitted();

revoke execute on all functions in schema brightrun from public;
revoke all on brightrun.push_setting, brightrun.push_endpoint, brightrun.push_call from public, anon, authenticated;
do $$
begin
    if to_regrole('service_role') is not null then
        grant select, insert, update, delete on brightrun.push_setting, brightrun.push_endpoint to service_role;
        grant select on brightrun.push_call to service_role;
        grant execute on function brightrun.push_tick() to service_role;
    end if;
end $$;
