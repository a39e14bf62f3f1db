-- brightrun schema, version 1
--
-- One file makes any PostgreSQL 15+ ready to train: a real Supabase project, the owner's project with its tables
-- already deployed and filled, or an empty plain database. Apply it as often as you like.
--
--     brightrun migrate                                       (one transaction)
--     psql -1 -v ON_ERROR_STOP=1 -f schema.sql "$DATABASE_URL" (the same by hand)
--
-- Statement by statement (a SQL editor, `supabase db push`) works too.
--
-- SECTIONS
--   1  Stand-ins      what Supabase brings along (roles, auth, storage), created only where absent
--   2  App tables     the application's six tables, its training files, RLS, grants, buckets
--   3  Engine         schema `brightrun`: jobs, leases, events, outbox; knows no training
--   4  Projection     triggers that turn app rows into engine jobs, and the only functions that write app rows
--   5  Privileges     who may call what
--
-- RULES OF THIS FILE
--   * Every statement can be run again. Nothing is dropped but our own triggers and policies, which are remade at once.
--   * Existing data never makes it fail: a missing column is added nullable, a missing foreign key NOT VALID.
--   * No superuser, no extension, no setting of the session. The owner of the app's tables is enough.
--   * In the schemas auth, storage and extensions nothing is touched that somebody else made. On storage.objects only
--     policies are added, by name, and where even that is forbidden the file says so and goes on.
--   * Grants are explicit: new tables in `public` are no longer granted to the API roles by themselves.
--   * Functions that cross a privilege are `security definer` with an empty search_path, revoked from public.
--   * Policies compare an indexed column with `(select auth.uid())`, which is then evaluated once per query.
--
-- TWO LAYERS. The app's tables keep their owner's names, types and permissiveness (no CHECK, no enum): other programs
-- write there. The engine's tables are strict. Only section 4 knows both.

-- One migration at a time per database. (A no-op when the statements arrive one by one, each in its own transaction.)
do $$ begin perform pg_advisory_xact_lock(hashtext('brightrun.schema')); end $$;

-- =====================================================================================================================
-- 1  STAND-INS FOR SUPABASE
-- =====================================================================================================================
-- Real projects have all of this, owned by others; every block below then does nothing. Roles belong to the whole
-- cluster, so two databases may be migrated at the same moment: losing that race is success.

do $$
declare
  wanted record;
begin
  for wanted in
    select * from (values
      ('anon',          'nologin noinherit'),
      ('authenticated', 'nologin noinherit'),
      ('service_role',  'nologin noinherit bypassrls'),
      ('authenticator', 'login noinherit')) as role (name, options)
  loop
    continue when to_regrole(wanted.name) is not null;
    begin
      execute format('create role %I %s', wanted.name, wanted.options);
    exception
      when duplicate_object or unique_violation then
        null;
      when insufficient_privilege then
        if wanted.name <> 'service_role' then
          raise;
        end if;
        execute format('create role %I nologin noinherit', wanted.name);
        raise warning 'service_role was created without BYPASSRLS, because only a superuser may give it.'
          using hint = 'As a superuser run: alter role service_role bypassrls;';
    end;
  end loop;
end $$;

do $$
declare
  api_role text;
begin
  foreach api_role in array array['anon', 'authenticated', 'service_role'] loop
    continue when exists (
      select from pg_auth_members where roleid = to_regrole(api_role) and member = to_regrole('authenticator'));
    begin
      execute format('grant %I to authenticator', api_role);
    exception
      when unique_violation or internal_error then
        null; -- Another database's migration granted it at the same moment.
      when insufficient_privilege then
        raise warning 'role % could not be granted to authenticator', api_role;
    end;
  end loop;
end $$;

do $$
declare
  stand_in text;
begin
  foreach stand_in in array array['auth', 'storage', 'extensions'] loop
    continue when to_regnamespace(stand_in) is not null;
    execute format('create schema %I', stand_in);
    execute format('grant usage on schema %I to anon, authenticated, service_role', stand_in);
  end loop;
end $$;

do $$ begin
  if to_regclass('auth.users') is null then
    create table auth.users (
      id                 uuid primary key default gen_random_uuid(),
      email              text unique,
      raw_user_meta_data jsonb,
      created_at         timestamptz not null default now(),
      updated_at         timestamptz not null default now()
    );
  end if;
end $$;

-- Claims of the request's JWT, as PostgREST sets them for the transaction: one JSON setting, or one setting per claim
-- in older versions.
do $$ begin
  if to_regprocedure('auth.jwt()') is null then
    create function auth.jwt() returns jsonb language sql stable as $function$
      select coalesce(
        nullif(current_setting('request.jwt.claim', true), ''),
        nullif(current_setting('request.jwt.claims', true), ''))::jsonb
    $function$;
  end if;
  if to_regprocedure('auth.uid()') is null then
    create function auth.uid() returns uuid language sql stable as $function$
      select coalesce(
        nullif(current_setting('request.jwt.claim.sub', true), ''),
        nullif(current_setting('request.jwt.claims', true), '')::jsonb ->> 'sub')::uuid
    $function$;
  end if;
  if to_regprocedure('auth.role()') is null then
    create function auth.role() returns text language sql stable as $function$
      select coalesce(
        nullif(current_setting('request.jwt.claim.role', true), ''),
        nullif(current_setting('request.jwt.claims', true), '')::jsonb ->> 'role')
    $function$;
  end if;
end $$;

do $$ begin
  if to_regclass('storage.buckets') is null then
    create table storage.buckets (
      id                 text primary key,
      name               text not null unique,
      owner              uuid,
      owner_id           text,
      public             boolean default false,
      avif_autodetection boolean default false,
      file_size_limit    bigint,
      allowed_mime_types text[],
      created_at         timestamptz default now(),
      updated_at         timestamptz default now()
    );
    alter table storage.buckets enable row level security;
    grant all on storage.buckets to anon, authenticated, service_role;
  end if;
  if to_regclass('storage.objects') is null then
    create table storage.objects (
      id               uuid primary key default gen_random_uuid(),
      bucket_id        text references storage.buckets (id),
      name             text,
      owner            uuid,
      owner_id         text,
      metadata         jsonb,
      user_metadata    jsonb,
      version          text,
      path_tokens      text[] generated always as (string_to_array(name, '/')) stored,
      last_accessed_at timestamptz default now(),
      created_at       timestamptz default now(),
      updated_at       timestamptz default now(),
      constraint objects_bucket_id_name_key unique (bucket_id, name)
    );
    alter table storage.objects enable row level security;
    grant all on storage.objects to anon, authenticated, service_role;

    -- Supabase refuses to delete object rows by SQL, since the bytes would stay behind. So does its stand-in.
    create or replace function storage.protect_delete() returns trigger language plpgsql as $function$
    begin
      if coalesce(current_setting('storage.allow_delete_query', true), 'false') <> 'true' then
        raise exception 'Direct deletion from storage tables is not allowed. Use the Storage API instead.'
          using errcode = 'insufficient_privilege';
      end if;
      return null;
    end $function$;
    create trigger protect_objects_delete before delete on storage.objects
      for each statement execute function storage.protect_delete();
  end if;
end $$;

do $$ begin
  if to_regprocedure('storage.foldername(text)') is null then
    create function storage.foldername(name text) returns text[] language sql immutable as $function$
      select trim_array(string_to_array(name, '/'), least(1, cardinality(string_to_array(name, '/'))))
    $function$;
  end if;
  if to_regprocedure('storage.filename(text)') is null then
    create function storage.filename(name text) returns text language sql immutable as $function$
      select split_part(name, '/', -1)
    $function$;
  end if;
  if to_regprocedure('storage.extension(text)') is null then
    create function storage.extension(name text) returns text language sql immutable as $function$
      select split_part(split_part(name, '/', -1), '.', -1)
    $function$;
  end if;
end $$;

-- The publication Realtime listens to. Tables are left to the project: hot ones do not belong in it.
do $$ begin
  if current_setting('wal_level') = 'logical'
     and has_database_privilege(current_database(), 'create')
     and not exists (select from pg_publication where pubname = 'supabase_realtime') then
    create publication supabase_realtime;
  end if;
end $$;

-- =====================================================================================================================
-- 2  THE APP'S TABLES
-- =====================================================================================================================

do $$ begin
  if to_regnamespace('brightrun') is null then
    create schema brightrun;
  end if;
end $$;
comment on schema brightrun is 'The training engine. Not exposed to the API; the app sees its effects in public.';

-- ---------------------------------------------------------------------------------------------------------------------
-- 2.1  Tables
-- ---------------------------------------------------------------------------------------------------------------------

-- A file of conversations somebody wants to train on. status: uploading → validating → ready | error.
create table if not exists public.datasets (
  id                         uuid primary key default gen_random_uuid(),
  user_id                    uuid not null references auth.users (id) on delete cascade,
  name                       varchar(200) not null,
  description                text,
  format                     varchar(50) default 'brightrun_lora_v4',
  status                     varchar(50) default 'uploading',
  storage_bucket             varchar(100) default 'lora-datasets',
  storage_path               text not null unique,      -- a path inside the bucket, never a URL
  file_name                  varchar(255) not null,
  file_size                  bigint not null,           -- bytes as the client claims them; imports may say 0
  total_training_pairs       integer,
  total_validation_pairs     integer,
  total_tokens               bigint,
  avg_turns_per_conversation decimal(10,2),
  avg_tokens_per_turn        decimal(10,2),
  training_ready             boolean default false,
  validated_at               timestamptz,
  validation_errors          jsonb,                     -- at most 10 of {line, error, suggestion, code, path}
  sample_data                jsonb,                     -- the first 3 records
  created_at                 timestamptz default now(),
  updated_at                 timestamptz default now(),
  deleted_at                 timestamptz,
  error_message              text
);

-- The app reads and shows this column, but the migration that made the table lacks it.
alter table public.datasets add column if not exists error_message text;

-- An order for an adapter. status: queued → initializing → running → completed | failed | cancelled.
create table if not exists public.training_jobs (
  id                      uuid primary key default gen_random_uuid(),
  user_id                 uuid not null references auth.users (id) on delete cascade,
  dataset_id              uuid not null references public.datasets (id) on delete restrict,
  preset_id               varchar(50) not null,
  hyperparameters         jsonb not null,               -- both key dialects once claimed, see 4.2
  gpu_config              jsonb not null,
  status                  varchar(50) default 'queued',
  current_stage           varchar(50) default 'queued', -- free text for people
  progress                decimal(5,2) default 0,       -- 0 to 100, never falls
  current_epoch           integer default 0,
  current_step            integer default 0,
  total_epochs            integer not null,
  total_steps             integer,
  current_metrics         jsonb,
  queued_at               timestamptz default now(),
  started_at              timestamptz,                  -- when a GPU first started
  completed_at            timestamptz,
  estimated_completion_at timestamptz,
  current_cost            decimal(10,2) default 0,      -- dollars
  estimated_total_cost    decimal(10,2) not null,
  final_cost              decimal(10,2),
  error_message           text,
  error_stack             text,
  retry_count             integer default 0,
  external_job_id         varchar(255) unique,          -- the provider's id
  artifact_id             uuid,
  created_at              timestamptz default now(),
  updated_at              timestamptz default now()
);

-- The loss curve: at most 100 points a job, because the app shows only the first 100.
create table if not exists public.metrics_points (
  id              uuid primary key default gen_random_uuid(),
  job_id          uuid not null references public.training_jobs (id) on delete cascade,
  timestamp       timestamptz default now(),
  epoch           integer not null,
  step            integer not null,
  training_loss   decimal(10,6) not null,
  validation_loss decimal(10,6),
  learning_rate   decimal(12,10) not null,
  gradient_norm   decimal(10,6),
  throughput      decimal(10,2),                        -- tokens a second
  gpu_utilization decimal(5,2)                          -- percent
);

-- A trained adapter. `artifacts` maps a file name to its object path in the bucket lora-models.
create table if not exists public.model_artifacts (
  id               uuid primary key default gen_random_uuid(),
  user_id          uuid not null references auth.users (id) on delete cascade,
  job_id           uuid not null unique references public.training_jobs (id) on delete restrict,
  dataset_id       uuid not null references public.datasets (id) on delete restrict,
  name             varchar(200) not null,
  version          varchar(50) default '1.0.0',
  description      text,
  status           varchar(50) default 'stored',
  deployed_at      timestamptz,
  quality_metrics  jsonb not null,
  training_summary jsonb not null,
  configuration    jsonb not null,
  artifacts        jsonb not null,
  parent_model_id  uuid references public.model_artifacts (id),
  created_at       timestamptz default now(),
  updated_at       timestamptz default now(),
  deleted_at       timestamptz
);

-- What a job cost, once per job, whatever its end.
create table if not exists public.cost_records (
  id             uuid primary key default gen_random_uuid(),
  user_id        uuid not null references auth.users (id) on delete cascade,
  job_id         uuid references public.training_jobs (id) on delete set null,
  cost_type      varchar(50) not null,
  amount         decimal(10,2) not null,
  details        jsonb,
  billing_period date not null,
  recorded_at    timestamptz default now()
);

create table if not exists public.notifications (
  id         uuid primary key default gen_random_uuid(),
  user_id    uuid not null references auth.users (id) on delete cascade,
  type       varchar(50) not null,
  title      varchar(200) not null,
  message    text not null,
  priority   varchar(20) default 'medium',
  read       boolean default false,
  action_url text,
  metadata   jsonb,
  created_at timestamptz default now()
);

-- Files the conversation half of the app exports; a dataset may point at one instead of an upload.
create table if not exists public.training_files (
  id                       uuid primary key default gen_random_uuid(),
  name                     text not null unique,
  description              text,
  json_file_path           text not null,
  jsonl_file_path          text not null,
  storage_bucket           text not null default 'training-files',
  conversation_count       integer not null default 0,
  total_training_pairs     integer not null default 0,
  json_file_size           bigint,
  jsonl_file_size          bigint,
  avg_quality_score        numeric(3,2),
  min_quality_score        numeric(3,2),
  max_quality_score        numeric(3,2),
  human_reviewed_count     integer default 0,
  scaffolding_distribution jsonb default '{}'::jsonb,
  status                   text not null default 'active'
                           check (status in ('active', 'archived', 'processing', 'failed')),
  last_updated_at          timestamptz default now(),
  created_by               uuid references auth.users (id) on delete set null,
  created_at               timestamptz not null default now(),
  updated_at               timestamptz not null default now()
);

create table if not exists public.training_file_conversations (
  id               uuid primary key default gen_random_uuid(),
  training_file_id uuid not null references public.training_files (id) on delete cascade,
  conversation_id  uuid not null,
  added_at         timestamptz default now(),
  added_by         uuid references auth.users (id) on delete set null,
  unique (training_file_id, conversation_id)
);

-- The circle training_jobs → model_artifacts → training_jobs closes here. Exactly one foreign key may lead from one
-- table to another, or PostgREST calls the app's embedded selects ambiguous; hence the look at the column, not the name.
do $$ begin
  if not exists (
    select from pg_constraint
     where conrelid = 'public.training_jobs'::regclass and contype = 'f'
       and conkey = array[(select attnum from pg_attribute
                            where attrelid = 'public.training_jobs'::regclass and attname = 'artifact_id')])
  then
    alter table public.training_jobs add constraint fk_training_jobs_artifact
      foreign key (artifact_id) references public.model_artifacts (id) not valid;
    begin
      alter table public.training_jobs validate constraint fk_training_jobs_artifact;
    exception when foreign_key_violation then
      raise warning 'Some training_jobs.artifact_id point nowhere; fk_training_jobs_artifact holds for new rows only.';
    end;
  end if;
end $$;

-- Indexes, unless one with the same definition exists under whatever name.
do $$
declare
  wanted record;
begin
  for wanted in
    select * from (values
      ('datasets',        'idx_datasets_user_id',          '(user_id)'),
      ('datasets',        'idx_datasets_status',           '(status) WHERE (deleted_at IS NULL)'),
      ('datasets',        'idx_datasets_created_at',       '(created_at DESC)'),
      ('training_jobs',   'idx_training_jobs_user_id',     '(user_id)'),
      ('training_jobs',   'idx_training_jobs_status',      '(status)'),
      ('training_jobs',   'idx_training_jobs_dataset_id',  '(dataset_id)'),
      ('metrics_points',  'idx_metrics_points_job_id',     '(job_id)'),
      ('metrics_points',  'idx_metrics_points_timestamp',  '(job_id, "timestamp" DESC)'),
      ('model_artifacts', 'idx_model_artifacts_user_id',   '(user_id)'),
      ('model_artifacts', 'idx_model_artifacts_job_id',    '(job_id)'),
      ('cost_records',    'idx_cost_records_user_id',      '(user_id)'),
      ('cost_records',    'idx_cost_records_period',       '(user_id, billing_period DESC)'),
      ('cost_records',    'idx_cost_records_job_id',       '(job_id)'),
      ('notifications',   'idx_notifications_user_id',     '(user_id)'),
      ('notifications',   'idx_notifications_user_unread', '(user_id, read, created_at DESC)'),
      ('training_files',  'idx_training_files_created_by', '(created_by)')) as index (table_name, name, definition)
  loop
    continue when exists (
      select from pg_indexes
       where schemaname = 'public' and tablename = wanted.table_name
         and right(indexdef, length(wanted.definition) + 12) = 'USING btree ' || wanted.definition);
    execute format('create index if not exists %I on public.%I %s', wanted.name, wanted.table_name, wanted.definition);
  end loop;
end $$;

-- updated_at, unless a trigger keeps it already.
do $$
declare
  kept_table text;
begin
  if to_regprocedure('public.update_updated_at_column()') is null then
    create function public.update_updated_at_column() returns trigger language plpgsql set search_path = '' as $function$
    begin
      new.updated_at = now();
      return new;
    end $function$;
  end if;
  foreach kept_table in array array['datasets', 'training_jobs', 'model_artifacts'] loop
    continue when exists (
      select from pg_trigger
       where tgrelid = format('public.%I', kept_table)::regclass
         and tgfoid = 'public.update_updated_at_column()'::regprocedure);
    execute format('create trigger %I before update on public.%I
                      for each row execute function public.update_updated_at_column()',
                   format('update_%s_updated_at', kept_table), kept_table);
  end loop;
end $$;

-- ---------------------------------------------------------------------------------------------------------------------
-- 2.2  Who sees and writes which row
-- ---------------------------------------------------------------------------------------------------------------------
--                      anon   authenticated                                             service_role
--   datasets           –      own: select, insert, update, delete                       all
--   training_jobs      –      own: select, insert (queued), update (cancel only)        all
--   metrics_points     –      of own jobs: select                                       all
--   model_artifacts    –      own: select                                               all
--   cost_records       –      own: select                                               all
--   notifications      –      own: select, insert, update                               all
--   training_files     all    all: select; own: insert, update                          all
--
-- anon holds SELECT without a policy on the app's tables: it reads nothing, and gets an empty list, not an error.

alter table public.datasets enable row level security;
alter table public.training_jobs enable row level security;
alter table public.metrics_points enable row level security;
alter table public.model_artifacts enable row level security;
alter table public.cost_records enable row level security;
alter table public.notifications enable row level security;
alter table public.training_files enable row level security;
alter table public.training_file_conversations enable row level security;

grant usage on schema public to anon, authenticated, service_role;

-- Older projects granted everything, TRUNCATE included, which no policy stops.
revoke all on public.datasets, public.training_jobs, public.metrics_points, public.model_artifacts,
  public.cost_records, public.notifications, public.training_files, public.training_file_conversations
  from anon, authenticated;
grant select on public.datasets, public.training_jobs, public.metrics_points, public.model_artifacts,
  public.cost_records, public.notifications to anon, authenticated;
grant insert, update, delete on public.datasets to authenticated;
grant insert, update on public.training_jobs, public.notifications to authenticated;
grant select on public.training_files, public.training_file_conversations to anon, authenticated;
grant insert, update on public.training_files, public.training_file_conversations to authenticated;
grant all on public.datasets, public.training_jobs, public.metrics_points, public.model_artifacts,
  public.cost_records, public.notifications, public.training_files, public.training_file_conversations
  to service_role;

drop policy if exists "Users can view own datasets" on public.datasets;
create policy "Users can view own datasets" on public.datasets
  for select to authenticated using (user_id = (select auth.uid()));
drop policy if exists "Users can create own datasets" on public.datasets;
create policy "Users can create own datasets" on public.datasets
  for insert to authenticated with check (user_id = (select auth.uid()));
drop policy if exists "Users can update own datasets" on public.datasets;
create policy "Users can update own datasets" on public.datasets
  for update to authenticated using (user_id = (select auth.uid())) with check (user_id = (select auth.uid()));
drop policy if exists "Users can delete own datasets" on public.datasets;
create policy "Users can delete own datasets" on public.datasets
  for delete to authenticated using (user_id = (select auth.uid()));

drop policy if exists "Users can view own jobs" on public.training_jobs;
create policy "Users can view own jobs" on public.training_jobs
  for select to authenticated using (user_id = (select auth.uid()));
drop policy if exists "Users can create own jobs" on public.training_jobs;
create policy "Users can create own jobs" on public.training_jobs
  for insert to authenticated with check (user_id = (select auth.uid()));
-- The policy says which rows may change and what they must become; the trigger in 2.3 says which columns.
drop policy if exists "Users can cancel own jobs" on public.training_jobs;
create policy "Users can cancel own jobs" on public.training_jobs
  for update to authenticated
  using (user_id = (select auth.uid()) and status in ('queued', 'initializing', 'running'))
  with check (user_id = (select auth.uid()) and status = 'cancelled');

drop policy if exists "Users can view own metrics" on public.metrics_points;
create policy "Users can view own metrics" on public.metrics_points
  for select to authenticated
  using (exists (select from public.training_jobs job where job.id = job_id and job.user_id = (select auth.uid())));

drop policy if exists "Users can view own models" on public.model_artifacts;
create policy "Users can view own models" on public.model_artifacts
  for select to authenticated using (user_id = (select auth.uid()));

drop policy if exists "Users can view own costs" on public.cost_records;
create policy "Users can view own costs" on public.cost_records
  for select to authenticated using (user_id = (select auth.uid()));

drop policy if exists "Users can view own notifications" on public.notifications;
create policy "Users can view own notifications" on public.notifications
  for select to authenticated using (user_id = (select auth.uid()));
drop policy if exists "Users can create own notifications" on public.notifications;
create policy "Users can create own notifications" on public.notifications
  for insert to authenticated with check (user_id = (select auth.uid()));
drop policy if exists "Users can update own notifications" on public.notifications;
create policy "Users can update own notifications" on public.notifications
  for update to authenticated using (user_id = (select auth.uid())) with check (user_id = (select auth.uid()));

drop policy if exists "Everyone can view training files" on public.training_files;
create policy "Everyone can view training files" on public.training_files
  for select to anon, authenticated using (true);
drop policy if exists "Creators can add training files" on public.training_files;
create policy "Creators can add training files" on public.training_files
  for insert to authenticated with check (created_by = (select auth.uid()));
drop policy if exists "Creators can update training files" on public.training_files;
create policy "Creators can update training files" on public.training_files
  for update to authenticated
  using (created_by = (select auth.uid())) with check (created_by = (select auth.uid()));

drop policy if exists "Everyone can view training file conversations" on public.training_file_conversations;
create policy "Everyone can view training file conversations" on public.training_file_conversations
  for select to anon, authenticated using (true);
drop policy if exists "Users can add training file conversations" on public.training_file_conversations;
create policy "Users can add training file conversations" on public.training_file_conversations
  for insert to authenticated with check (added_by = (select auth.uid()));
drop policy if exists "Users can update training file conversations" on public.training_file_conversations;
create policy "Users can update training file conversations" on public.training_file_conversations
  for update to authenticated using (added_by = (select auth.uid())) with check (added_by = (select auth.uid()));

-- ---------------------------------------------------------------------------------------------------------------------
-- 2.3  What a user may put into a row of his own
-- ---------------------------------------------------------------------------------------------------------------------
-- Policies see rows, not columns. These triggers bind exactly those callers whom row security binds: not the owner of
-- the tables (thus not the projection), not service_role. They run with the caller's rights, so that
-- row_security_active() answers for the caller.

-- A new job is queued and has no history: progress, cost and results belong to the server.
create or replace function brightrun.guard_training_job_insert() returns trigger
language plpgsql set search_path = '' as $$
begin
  if row_security_active('public.training_jobs') and (
       new.status is distinct from 'queued'
    or coalesce(new.progress, 0) <> 0 or coalesce(new.current_cost, 0) <> 0 or coalesce(new.retry_count, 0) <> 0
    or coalesce(new.current_epoch, 0) <> 0 or coalesce(new.current_step, 0) <> 0
    or num_nonnulls(new.started_at, new.completed_at, new.estimated_completion_at, new.final_cost, new.error_message,
                    new.error_stack, new.external_job_id, new.artifact_id) > 0)
  then
    raise exception 'A new training job must be queued and carry no progress, cost or result.'
      using errcode = 'insufficient_privilege';
  end if;
  return new;
end $$;

-- The one change a user may make to a job is to cancel it. The app sends status, completed_at and final_cost; the
-- values of the last two are ours to set.
create or replace function brightrun.guard_training_job_update() returns trigger
language plpgsql set search_path = '' as $$
declare
  of_the_user constant text[] := array['status', 'completed_at', 'final_cost', 'updated_at'];
begin
  if not row_security_active('public.training_jobs') then
    return new;
  end if;
  if new.status is distinct from 'cancelled'
     or old.status not in ('queued', 'initializing', 'running')
     or to_jsonb(new) - of_the_user is distinct from to_jsonb(old) - of_the_user
  then
    raise exception 'A training job can only be cancelled: set status to ''cancelled'' and nothing else.'
      using errcode = 'insufficient_privilege';
  end if;
  new.completed_at := now();
  new.final_cost := coalesce(old.current_cost, 0);
  return new;
end $$;

-- The worker reads datasets with rights of its own, so a row must not name somebody else's object.
create or replace function brightrun.guard_dataset_location() returns trigger
language plpgsql set search_path = '' as $$
begin
  if row_security_active('public.datasets') and (
       new.storage_path ~ '(^|/)\.\.(/|$)'
    or not coalesce(new.storage_bucket = 'training-files'
                    or (new.storage_bucket = 'lora-datasets' and split_part(new.storage_path, '/', 1) = new.user_id::text),
                    false))
  then
    raise exception 'Dataset file "%" in bucket "%" is not one that this user may train on.',
      new.storage_path, new.storage_bucket
      using errcode = 'insufficient_privilege',
            hint = 'Upload to lora-datasets under {user_id}/{dataset_id}/{file_name}, or import a training file.';
  end if;
  return new;
end $$;

-- The names sort before update_…_updated_at, and triggers fire in the order of their names.
create or replace trigger brightrun_guard_insert before insert on public.training_jobs
  for each row execute function brightrun.guard_training_job_insert();
create or replace trigger brightrun_guard_update before update on public.training_jobs
  for each row execute function brightrun.guard_training_job_update();
create or replace trigger brightrun_guard_location before insert or update of storage_bucket, storage_path, user_id
  on public.datasets for each row execute function brightrun.guard_dataset_location();

-- ---------------------------------------------------------------------------------------------------------------------
-- 2.4  Buckets
-- ---------------------------------------------------------------------------------------------------------------------
-- Existing buckets keep the limits their owner gave them.

do $$ begin
  insert into storage.buckets (id, name, public, file_size_limit, allowed_mime_types) values
    ('lora-datasets', 'lora-datasets', false, 500 * 1024 * 1024::bigint,
     array['application/json', 'application/x-jsonlines', 'text/plain']),
    ('lora-models', 'lora-models', false, 5 * 1024 * 1024 * 1024::bigint,
     array['application/octet-stream', 'application/x-tar', 'application/gzip', 'application/json']),
    ('training-files', 'training-files', false, 50 * 1024 * 1024::bigint,
     array['application/json', 'application/x-ndjson']),
    ('conversation-files', 'conversation-files', false, 10 * 1024 * 1024::bigint,
     array['application/json'])
  on conflict do nothing;
exception when insufficient_privilege then
  raise warning 'Buckets could not be created here.'
    using hint = 'Create the private buckets lora-datasets, lora-models, training-files and conversation-files in the '
                 'dashboard.';
end $$;

do $$
declare
  wanted record;
begin
  for wanted in
    select * from (values
      ('Users can upload own datasets', 'insert', 'authenticated', 'lora-datasets', true),
      ('Users can read own datasets',   'select', 'authenticated', 'lora-datasets', true),
      ('Users can delete own datasets', 'delete', 'authenticated', 'lora-datasets', true),
      ('Users can read own models',     'select', 'authenticated', 'lora-models',   true),
      ('Service can write model files', 'insert', 'service_role',  'lora-models',   false),
      ('Users can upload training files', 'insert', 'authenticated', 'training-files', false),
      ('Users can read training files',   'select', 'authenticated', 'training-files', false),
      ('Users can update training files', 'update', 'authenticated', 'training-files', false))
      as policy (name, command, grantee, bucket, own_folder_only)
  loop
    continue when exists (
      select from pg_policies where schemaname = 'storage' and tablename = 'objects' and policyname = wanted.name);
    execute format(
      'create policy %I on storage.objects for %s to %I %s (bucket_id = %L%s)',
      wanted.name, wanted.command, wanted.grantee,
      case wanted.command when 'insert' then 'with check' else 'using' end,
      wanted.bucket,
      case when wanted.own_folder_only
           then ' and (storage.foldername(name))[1] = (select auth.uid())::text' else '' end);
  end loop;
exception when insufficient_privilege then
  raise warning 'Policies on storage.objects could not be created here.'
    using hint = 'Add those of schema.sql, section 2.4, in the dashboard.';
end $$;

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
--   brightrun.mark        where in the index of ready rows the claims of a group begin;  brightrun.settling  how far marks may go
--   brightrun.lease       one row per running job: who holds it, the fencing token, when it expires, its latest progress
--   brightrun.event       append-only history, one partition per UTC day, a default partition so that nothing is lost
--   brightrun.brief*      lanes: jobs of milliseconds, one row each and no history; see "Lanes" below
--   brightrun.outbox      messages to the world outside, written in the transaction that makes them true
--   brightrun.job_kind    optional settings of a kind: its projector and its retry curve
--   brightrun.limit_rule  how many of an owner or a key may run at once, and how many may start in a stretch of time
--   brightrun.account     what all jobs of an owner may cost
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
    if v_found > 2 then
        raise exception 'the database has engine schema version %, this file is version 2', v_found
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

-- Functions on the way of every job keep one plan for all calls (force_generic_plan): to plan their statements anew, as PostgreSQL
-- does for the first five calls of a session and at its discretion afterwards, costs as much as to execute them.

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

-- Written at enqueue, at a cancel request, and at the end. No index covers a column that changes, and each page keeps room for a second
-- version of its rows, so that the final update is HOT also where a whole page of jobs ends in one statement.
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
) with (fillfactor = 50);
alter table brightrun.job set (fillfactor = 50);

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

-- What a job needs of a machine, each combination once: a claim looks only where its machine will do, and never walks past heads it
-- may not take. Row 0 needs nothing.
create table if not exists brightrun.requirement (
    id          integer generated by default as identity primary key,
    vram_mb     integer not null default 0 check (vram_mb >= 0),
    gpu_classes text[] check (cardinality(gpu_classes) between 1 and 100),
    gpu_count   integer not null default 0 check (gpu_count between 0 and 1024),
    max_price   numeric(12,4) check (max_price > 0),
    constraint requirement_is_one unique nulls not distinct (vram_mb, gpu_classes, gpu_count, max_price)
);
-- A job that has been ready for widens_after is content with what widens_to says: more classes, in the order its owner prefers them.
alter table brightrun.requirement add column if not exists widens_to integer references brightrun.requirement (id);
alter table brightrun.requirement add column if not exists widens_after interval check (widens_after > interval '0');
alter table brightrun.requirement drop constraint if exists requirement_is_one;
create unique index if not exists requirement_one_each on brightrun.requirement
    (vram_mb, gpu_classes, gpu_count, max_price, widens_to, widens_after) nulls not distinct;
insert into brightrun.requirement (id) values (0) on conflict do nothing;

-- Who shares with whom. Jobs of one share have the same owner (null: not shared by owner) and the same concurrency key (null: none).
create table if not exists brightrun.share (
    id    bigint generated always as identity primary key,
    owner uuid,
    key   text check (length(key) between 1 and 200),
    constraint share_is_one unique nulls not distinct (owner, key)
);
create index if not exists share_by_key on brightrun.share (key) where key is not null;

-- The row that claims for an owner or for a key lock, so that counting and taking are one. Usage is never stored: it is the count of
-- leases, so that no crash can leave it wrong. used_seconds, halved every day since used_at, orders owners.
create table if not exists brightrun.limit_rule (
    scope        text not null,
    name         text not null,
    at_most      integer check (at_most >= 0),
    weight       float8 not null default 1 check (weight > 0),
    used_seconds float8 not null default 0,
    used_at      timestamptz not null default pg_catalog.clock_timestamp(),
    primary key (scope, name)
) with (fillfactor = 70);

-- A rate is a bucket of tokens on the same row: it holds starts_most, a start takes one, and it is full again after starts_per. So in
-- any stretch of time w at most starts_most * (1 + w / starts_per) start. Scope `queue` bounds the claims of a queue, `api` what else
-- is asked of somebody who counts (see take_rate).
alter table brightrun.limit_rule add column if not exists starts_most integer check (starts_most > 0);
alter table brightrun.limit_rule add column if not exists starts_per interval check (starts_per > interval '0');
alter table brightrun.limit_rule add column if not exists tokens float8 not null default 0;
alter table brightrun.limit_rule add column if not exists filled_at timestamptz not null default pg_catalog.clock_timestamp();
alter table brightrun.limit_rule drop constraint if exists limit_rule_scope_check;
alter table brightrun.limit_rule drop constraint if exists limit_rule_scope_known;
alter table brightrun.limit_rule add constraint limit_rule_scope_known check (scope in ('owner', 'key', 'queue', 'api'));
alter table brightrun.limit_rule drop constraint if exists limit_rule_rate_is_whole;
alter table brightrun.limit_rule add constraint limit_rule_rate_is_whole check ((starts_most is null) = (starts_per is null));

-- What all jobs of an owner together may cost, for good or in each day, week or month (UTC). What they have cost is never stored: it
-- is the sum of brightrun.usage and of the leases.
create table if not exists brightrun.account (
    owner  uuid primary key,
    budget numeric(14,4) not null check (budget >= 0),
    period text check (period in ('day', 'week', 'month'))
);

create table if not exists brightrun.queue_setting (
    queue      text primary key,
    paused     boolean not null default false,
    reason     text,
    changed_at timestamptz not null
);

alter table brightrun.job add column if not exists share_id bigint references brightrun.share (id);
alter table brightrun.job add column if not exists requirement_id integer not null default 0;
alter table brightrun.job add column if not exists budget numeric(14,4);
alter table brightrun.job add column if not exists price_per_hour numeric(12,4);
alter table brightrun.job add column if not exists checkpoint jsonb;  -- of a failed job, for its redrive
alter table brightrun.job drop constraint if exists job_budget_positive;
alter table brightrun.job add constraint job_budget_positive check (budget > 0) not valid;
alter table brightrun.ready add column if not exists share_id bigint;
alter table brightrun.ready add column if not exists requirement_id integer not null default 0;
alter table brightrun.ready add column if not exists checkpoint jsonb;
alter table brightrun.ready add column if not exists spent numeric(14,4) not null default 0;
alter table brightrun.ready add column if not exists aged smallint not null default 0;

drop index if exists brightrun.ready_claim;
create index if not exists ready_claim_open on brightrun.ready (queue, kind, requirement_id, priority, ready_seq)
    where ready_seq is not null and share_id is null;
create index if not exists ready_claim_shared on brightrun.ready (queue, kind, share_id, requirement_id, priority, ready_seq)
    where ready_seq is not null and share_id is not null;
create index if not exists ready_scheduled on brightrun.ready (run_at) where ready_seq is null;

-- Low-water marks: where in ready_claim_open a claim begins. While somebody holds an old snapshot, the entries of claimed jobs stay in
-- that index, and a claim from its head would read all of them. No snapshot shows an open ready row of a mark's group whose ready_seq is
-- below the mark it shows. A group without a mark is read from its head, so a mark may be missing but never be too high.
--   * A mark is raised, by whoever has it locked, to the first row of its group that it then sees, and never above brightrun.settling.
--   * Whoever puts a row with an older ready_seq into a group (ageing, widening, a hand) lowers the mark in the same transaction: the
--     trigger ready_*_keeps_marks, so nobody can forget it.
create table if not exists brightrun.mark (
    queue          text not null,
    kind           text not null,
    requirement_id integer not null,
    priority       smallint not null,
    low            bigint not null default -9223372036854775808,
    moved_at       timestamptz not null default pg_catalog.clock_timestamp(),
    primary key (queue, kind, requirement_id, priority)
) with (fillfactor = 50, autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 200);

-- Up to which ready_seq every transaction that drew one is over: no row can come in below any more. First the sequence is sampled; a
-- later claim, which sees that sample before it has a transaction id, leaves its id as the horizon; the sample is settled when all
-- transactions up to the horizon are over. One that goes on writing for long therefore holds marks where they are; an old snapshot alone
-- does not. A step of that many jobs lies between two samples, since each leaves versions of this row behind while a snapshot is held.
create table if not exists brightrun.settling (
    only_row   boolean primary key default true check (only_row),
    settled    bigint not null default 0,
    sampled    bigint not null default 0,
    sampled_by xid8,
    horizon    xid8,
    step       bigint not null default 2000 check (step > 0),
    strays     bigint not null default 0,  -- rows ever found below their mark: a mistake in the above, see _tend_marks
    looked_at  timestamptz not null default pg_catalog.clock_timestamp(),
    constraint settling_in_order check (settled <= sampled)
) with (fillfactor = 50, autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 200);
insert into brightrun.settling default values on conflict do nothing;
-- The sample again, where all see it at once, whatever their snapshot.
create sequence if not exists brightrun.ready_sampled minvalue 0;

-- One row per running job, rewritten by every heartbeat: nothing but the key is indexed, so that stays HOT. The few thousand
-- rows this table can hold are read whole by the rescue. That its job exists is held by the baton's guards: a foreign key would write
-- to the job's row, and to the log, at every claim.
create table if not exists brightrun.lease (
    job_id      uuid primary key,
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

alter table brightrun.lease add column if not exists share_id bigint;
alter table brightrun.lease add column if not exists requirement_id integer not null default 0;
alter table brightrun.lease add column if not exists checkpoint jsonb;
alter table brightrun.lease add column if not exists spent numeric(14,4) not null default 0;
alter table brightrun.lease add column if not exists price_per_hour numeric(12,4);
alter table brightrun.lease add column if not exists sampled_at timestamptz;
alter table brightrun.lease drop constraint if exists lease_job_id_fkey;
alter table brightrun.lease drop constraint if exists lease_checkpoint_bounded;
alter table brightrun.lease add constraint lease_checkpoint_bounded check (pg_catalog.pg_column_size(checkpoint) <= 65536) not valid;
create index if not exists lease_of_share on brightrun.lease (share_id) where share_id is not null;

-- What each run cost, one row per lease, written when it ends. A correction is another row of somebody else's, never a change.
create table if not exists brightrun.usage (
    token          bigint primary key,
    job_id         uuid not null,
    kind           text not null,
    owner          uuid,
    worker         text not null,
    started_at     timestamptz not null,
    ended_at       timestamptz not null,
    price_per_hour numeric(12,4),
    cost           numeric(14,4),
    ended          text not null,
    constraint usage_runs_forward check (ended_at >= started_at)
);
create index if not exists usage_of_owner on brightrun.usage (owner, ended_at);

-- A job that waits for others: its ready row is scheduled for a time that never comes, until the last of them has completed.
create table if not exists brightrun.dependency (
    job_id   uuid not null references brightrun.job (id) on delete cascade,
    after_id uuid not null references brightrun.job (id) on delete cascade,
    primary key (job_id, after_id),
    constraint dependency_is_on_another check (job_id <> after_id)
);
create index if not exists dependency_after on brightrun.dependency (after_id);

-- Keys that are taken only while their job lives.
create table if not exists brightrun.live_key (
    kind   text not null,
    key    text not null,
    job_id uuid not null unique references brightrun.job (id) on delete cascade,
    primary key (kind, key)
);

create table if not exists brightrun.schedule (
    name         text primary key check (length(name) between 1 and 200),
    kind         text not null,
    payload      jsonb not null default '{}',
    queue        text not null default 'default',
    priority     smallint not null default 0,
    owner        uuid,
    max_attempts smallint not null default 3,
    cron         text,
    every        interval check (every >= interval '1 second'),
    time_zone    text not null default 'UTC',
    paused       boolean not null default false,
    next_at      timestamptz not null,
    last_at      timestamptz,
    last_job_id  uuid,
    constraint schedule_has_one_rhythm check ((cron is null) <> (every is null))
);

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
alter table brightrun.event add column if not exists level text;  -- null: info

create table if not exists brightrun.job_kind (
    kind       text primary key,
    projector  text,
    retry_base interval not null default interval '10 seconds',
    retry_cap  interval not null default interval '10 minutes',
    constraint job_kind_retry_sane check (retry_base > interval '0' and retry_cap >= retry_base)
);

-- fair: jobs with an owner share; the owner who used the least of late goes first.   metered: every run leaves a row of usage.
-- age_step: a waiting job gains one priority for each; at most age_most.   progress_every: how often progress goes to the history.
alter table brightrun.job_kind add column if not exists fair boolean not null default false;
alter table brightrun.job_kind add column if not exists metered boolean not null default false;
alter table brightrun.job_kind add column if not exists age_step interval check (age_step > interval '0');
alter table brightrun.job_kind add column if not exists age_most smallint not null default 100 check (age_most > 0);
alter table brightrun.job_kind add column if not exists progress_every interval check (progress_every > interval '0');

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

-- Lanes, for jobs of milliseconds: see "The interface: lanes". A waiting job is one row, which a claim deletes; a claimed batch is
-- one row, whatever its size, which its last ending deletes. So a job costs one insert and one delete, and nothing else.
create sequence if not exists brightrun.brief_seq;

create table if not exists brightrun.brief (
    lane       text not null,
    seq        bigint not null default pg_catalog.nextval('brightrun.brief_seq'),
    id         bigint not null,
    attempt    smallint not null default 0,
    due_at     timestamptz,
    payload    jsonb not null,
    constraint brief_lane_is_a_name     check (lane <> '' and length(lane) <= 100),
    constraint brief_payload_is_bounded check (pg_catalog.pg_column_size(payload) <= 65536)
) with (fillfactor = 100, autovacuum_vacuum_scale_factor = 0.01, autovacuum_vacuum_threshold = 5000, autovacuum_vacuum_cost_delay = 0);

create index if not exists brief_claim on brightrun.brief (lane, seq) where due_at is null;
create index if not exists brief_due on brightrun.brief (due_at) where due_at is not null;

create table if not exists brightrun.brief_lane (
    lane         text primary key,
    max_attempts smallint not null default 5 check (max_attempts between 1 and 1000),
    retry_base   interval not null default interval '1 second' check (retry_base > interval '0'),
    retry_cap    interval not null default interval '10 minutes',
    paused       boolean not null default false
);

create table if not exists brightrun.brief_batch (
    token      bigint primary key default pg_catalog.nextval('brightrun.lease_token'),
    lane       text not null,
    worker     text not null,
    lease_for  interval not null,
    expires_at timestamptz not null,
    ended      bit varying not null,     -- one bit for each job of the batch; the arrays never change
    ids        bigint[] not null,
    attempts   smallint[] not null,
    payloads   jsonb[] not null,
    constraint brief_batch_worker_is_a_name check (worker <> '' and length(worker) <= 200),
    constraint brief_batch_lease_is_sane    check (lease_for > interval '0' and lease_for <= interval '1 day')
) with (fillfactor = 70, autovacuum_vacuum_scale_factor = 0.01, autovacuum_vacuum_threshold = 500, autovacuum_vacuum_cost_delay = 0);

create table if not exists brightrun.brief_dead (
    id      bigint primary key,
    lane    text not null,
    attempt smallint not null,
    payload jsonb not null,
    error   jsonb not null,
    died_at timestamptz not null
);

create table if not exists brightrun.housekeeping (
    only_row        boolean primary key default true check (only_row),
    last_sweep_at   timestamptz,
    steady_since    timestamptz,
    event_retention interval not null default interval '30 days' check (event_retention >= interval '1 day'),
    job_retention   interval not null default interval '90 days' check (job_retention >= interval '1 hour'),
    constraint housekeeping_sweep_iff check ((last_sweep_at is null) = (steady_since is null))
) with (fillfactor = 50);

-- Whom tick() tells, by pg_net, that jobs wait and nobody is there to run them. A hint; it carries no secret.
alter table brightrun.housekeeping add column if not exists wake_url text check (wake_url ~ '^https?://' and length(wake_url) <= 2000);

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
       lease.worker, lease.token, lease.expires_at, lease.deadline_at,
       coalesce(lease.checkpoint, ready.checkpoint, job.checkpoint) as checkpoint, job.share_id, job.requirement_id, job.budget
from brightrun.job
left join brightrun.lease on lease.job_id = job.id
left join brightrun.ready on ready.job_id = job.id;

-- What a worker is told about a job it has just claimed. Time is told as what is left, so that clocks need not agree.
create or replace view brightrun.claimed with (security_invoker = true) as
select lease.job_id, lease.token, lease.kind, lease.queue, lease.worker, job.payload, job.owner, job.external_id,
       lease.attempt::integer as attempt, job.max_attempts::integer as max_attempts, lease.claims,
       lease.progress, job.created_at,
       extract(epoch from lease.expires_at - brightrun.now())::float8 as lease_seconds,
       extract(epoch from lease.deadline_at - brightrun.now())::float8 as deadline_seconds, lease.checkpoint
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
    -- Each look-up is fenced by `offset 0`, so that it stays an index probe per row: a plan made while the tables were empty would
    -- otherwise be a join that reads the whole of brightrun.job, once per statement, until the next ANALYZE.
    if tg_table_name = 'job' then
        select fresh.id into v_job from fresh
        where fresh.outcome is not null
          and ((select true from brightrun.ready where ready.job_id = fresh.id offset 0)
            or (select true from brightrun.lease where lease.job_id = fresh.id offset 0))
        limit 1;
    elsif tg_table_name = 'lease' then
        select fresh.job_id into v_job from fresh
        where (select job.outcome is not null from brightrun.job where job.id = fresh.job_id offset 0) is not false
           or (select true from brightrun.ready where ready.job_id = fresh.job_id offset 0)
        limit 1;
        if v_job is not null and not exists (select from brightrun.job where id = v_job) then
            raise exception 'there is no job % to lease', v_job using errcode = '23503';
        end if;
    else
        select fresh.job_id into v_job from fresh
        where (select job.outcome is not null from brightrun.job where job.id = fresh.job_id offset 0)
           or (select true from brightrun.lease where lease.job_id = fresh.job_id offset 0)
        limit 1;
    end if;
    if v_job is not null then
        raise exception 'job % would be in two places at once', v_job using errcode = '23514';
    end if;
    return null;
end
$$;

-- Marks stay below every row. A row above the sample needs nothing: this transaction has its id already, so a horizon that is yet to be
-- taken lies above it. One below is waited for if the id is older than the sample (as it is in every function of this file, which write
-- before they draw). Otherwise the row is an old one that was moved: its mark is lowered, and stays locked until this commits.
create or replace function brightrun._keep_marks() returns trigger
language plpgsql set search_path = '' as $$
declare
    v_below bigint := coalesce(pg_catalog.pg_sequence_last_value('brightrun.ready_sampled'), 0);
    v_moved record;
begin
    if not exists (select from fresh where ready_seq <= v_below) then
        return null;
    end if;
    -- With an older snapshot than this statement's nothing can be told from the row, and a mark that has moved since is an error 40001.
    if pg_catalog.current_setting('transaction_isolation') = 'read committed' then
        select case when pg_catalog.pg_current_xact_id() < coalesce(horizon, sampled_by) then settled else sampled end
        into v_below from brightrun.settling where only_row;
    end if;
    for v_moved in
        select queue, kind, requirement_id, priority, min(ready_seq) as seq from fresh
        where ready_seq <= v_below and share_id is null group by 1, 2, 3, 4 order by 1, 2, 3, 4
    loop
        loop
            insert into brightrun.mark (queue, kind, requirement_id, priority)
            values (v_moved.queue, v_moved.kind, v_moved.requirement_id, v_moved.priority) on conflict do nothing;
            update brightrun.mark set low = least(low, v_moved.seq)
            where queue = v_moved.queue and kind = v_moved.kind and requirement_id = v_moved.requirement_id and priority = v_moved.priority;
            exit when found;
        end loop;
    end loop;
    return null;
end
$$;

-- A job that runs cannot be forgotten.
create or replace function brightrun._guard_leased() returns trigger
language plpgsql set search_path = '' as $$
declare
    v_job uuid;
begin
    select gone.id into v_job from gone
    where (select true from brightrun.lease where lease.job_id = gone.id offset 0) limit 1;
    if v_job is not null then
        raise exception 'job % runs and cannot be deleted', v_job using errcode = '23503';
    end if;
    return null;
end
$$;

create or replace trigger job_that_runs_stays after delete on brightrun.job
    referencing old table as gone for each statement execute function brightrun._guard_leased();
create or replace trigger job_has_one_baton after update on brightrun.job
    referencing new table as fresh for each statement execute function brightrun._guard_baton();
create or replace trigger ready_is_the_only_baton after insert on brightrun.ready
    referencing new table as fresh for each statement execute function brightrun._guard_baton();
create or replace trigger ready_row_keeps_marks after insert on brightrun.ready
    referencing new table as fresh for each statement execute function brightrun._keep_marks();
create or replace trigger ready_move_keeps_marks after update on brightrun.ready
    referencing new table as fresh for each statement execute function brightrun._keep_marks();
create or replace trigger lease_is_the_only_baton after insert on brightrun.lease
    referencing new table as fresh for each statement execute function brightrun._guard_baton();

-- --- Internal steps ---------------------------------------------------------------------------------------------------

-- The object a projector gets: the worker's own words with the engine's facts over them.
-- (What is called for every job is plpgsql throughout, whose plans are kept; a function in SQL with a search_path is planned each time.)
create or replace function brightrun._detail(p_words jsonb, p_attempt integer, p_worker text) returns jsonb
language plpgsql immutable set search_path = '' as $$
begin
    return case when p_words is null then '{}'
                when pg_catalog.jsonb_typeof(p_words) = 'object' then p_words
                else pg_catalog.jsonb_build_object('value', p_words) end
        || pg_catalog.jsonb_build_object('attempt', p_attempt, 'worker', p_worker);
end
$$;

-- A line of history. What has a column of its own is not said twice.
create or replace function brightrun._append(p_job_id uuid, p_event text, p_detail jsonb, p_attempt integer,
                                             p_token bigint, p_worker text) returns void
language plpgsql volatile set search_path = '' as $$
begin
    insert into brightrun.event (at, job_id, event, attempt, token, worker, detail)
    values (brightrun.now(), p_job_id, p_event, p_attempt, p_token, p_worker, p_detail - '{attempt,worker}'::text[]);
end
$$;

create or replace function brightrun._is_projected(p_kind text) returns boolean
language plpgsql stable set search_path = '' as $$
begin
    return exists (select from brightrun.job_kind where kind = p_kind and projector is not null);
end
$$;

-- Whether each job of this kind has something of its own to do when it is enqueued.
create or replace function brightrun._enqueues_one_by_one(p_kind text) returns boolean
language sql stable set search_path = '' as $$
    select exists (select from brightrun.job_kind where kind = p_kind and (projector is not null or fair))
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

-- What a job has cost up to a moment of its current run.
create or replace function brightrun._spent(p_lease brightrun.lease, p_at timestamptz) returns numeric
language sql immutable set search_path = '' as $$
    select p_lease.spent + coalesce(p_lease.price_per_hour
        * greatest(extract(epoch from p_at - p_lease.claimed_at), 0)::numeric / 3600, 0)
$$;

-- Seconds used, halved for every day since.
create or replace function brightrun._used(p_seconds float8, p_at timestamptz, p_now timestamptz) returns float8
language plpgsql immutable set search_path = '' as $$
begin
    return p_seconds * pg_catalog.power(0.5, least(greatest(extract(epoch from p_now - p_at) / 86400, 0), 1000));
end
$$;

-- The run's row of usage, and its owner's account. The account is only tried: it orders, it does not bill.
create or replace function brightrun._meter(p_lease brightrun.lease, p_ended text) returns void
language plpgsql volatile set search_path = '' as $$
declare
    v_now     timestamptz := greatest(brightrun.now(), p_lease.claimed_at);
    v_seconds float8 := extract(epoch from v_now - p_lease.claimed_at);
begin
    if p_lease.price_per_hour is not null or exists (select from brightrun.job_kind where kind = p_lease.kind and metered) then
        insert into brightrun.usage (token, job_id, kind, owner, worker, started_at, ended_at, price_per_hour, cost, ended)
        select p_lease.token, p_lease.job_id, p_lease.kind, job.owner, p_lease.worker, p_lease.claimed_at, v_now,
               p_lease.price_per_hour, p_lease.price_per_hour * v_seconds::numeric / 3600, p_ended
        from brightrun.job where id = p_lease.job_id
        on conflict (token) do nothing;
    end if;
    if p_lease.share_id is not null then
        perform brightrun._charge((select owner from brightrun.share where id = p_lease.share_id), v_seconds - 60, v_now);
    end if;
end
$$;

create or replace function brightrun._charge(p_owner uuid, p_seconds float8, p_now timestamptz) returns void
language plpgsql volatile set search_path = '' as $$
begin
    update brightrun.limit_rule
    set used_seconds = greatest(brightrun._used(used_seconds, used_at, p_now) + p_seconds, 0), used_at = p_now
    where (scope, name) in (select scope, name from brightrun.limit_rule
                            where scope = 'owner' and name = p_owner::text for no key update skip locked);
end
$$;

-- How many starts a rule has to give at a moment.
create or replace function brightrun._tokens(p_rule brightrun.limit_rule, p_now timestamptz) returns float8
language plpgsql immutable set search_path = '' as $$
begin
    return least(p_rule.starts_most, p_rule.tokens
        + p_rule.starts_most * greatest(extract(epoch from p_now - p_rule.filled_at) / extract(epoch from p_rule.starts_per), 0))::float8;
end
$$;

-- Takes starts from the rules of one scope and these names that are rates. The caller holds them.
create or replace function brightrun._take_tokens(p_scope text, p_name text, p_count integer, p_now timestamptz) returns void
language plpgsql volatile set search_path = '' as $$
begin
    update brightrun.limit_rule
    set tokens = brightrun._tokens(limit_rule, p_now) - p_count, filled_at = greatest(p_now, filled_at)
    where scope = p_scope and name = p_name and starts_most is not null;
end
$$;

-- A start of a share: of its owner's and of its key's, under the locks that admitted it.
create or replace function brightrun._note_start(p_share_id bigint, p_now timestamptz) returns void
language plpgsql volatile set search_path = '' as $$
declare
    v_share brightrun.share;
begin
    select * into v_share from brightrun.share where id = p_share_id;
    perform brightrun._take_tokens('key', v_share.key, 1, p_now);
    perform brightrun._take_tokens('owner', v_share.owner::text, 1, p_now);
end
$$;

-- How many jobs of a queue may start now; null: as many as there are. The rule stays locked, so that counting and taking are one;
-- where another claim holds it, none, and the next look will tell.
create or replace function brightrun._queue_starts(p_queue text, p_now timestamptz) returns integer
language plpgsql volatile set search_path = '' as $$
declare
    v_rule brightrun.limit_rule;
begin
    if not exists (select from brightrun.limit_rule where scope = 'queue' and name = p_queue and starts_most is not null) then
        return null;
    end if;
    select * into v_rule from brightrun.limit_rule where scope = 'queue' and name = p_queue for no key update skip locked;
    return case when found then floor(brightrun._tokens(v_rule, p_now)) else 0 end;
end
$$;

create or replace function brightrun._period_began(p_period text, p_now timestamptz) returns timestamptz
language sql stable set search_path = '' as $$
    select case when p_period is null then '-infinity' else pg_catalog.date_trunc(p_period, p_now, 'UTC') end
$$;

-- What an owner's runs have cost since a moment: those that have ended, and those under way until now.
create or replace function brightrun._owner_spent(p_owner uuid, p_since timestamptz, p_now timestamptz) returns numeric
language sql stable set search_path = '' as $$
    select coalesce((select sum(price_per_hour * greatest(extract(epoch from ended_at - greatest(started_at, p_since)), 0)::numeric / 3600)
                     from brightrun.usage where owner = p_owner and ended_at >= p_since), 0)
         + coalesce((select sum(price_per_hour * greatest(extract(epoch from p_now - greatest(claimed_at, p_since)), 0)::numeric / 3600)
                     from brightrun.lease where price_per_hour is not null
                      and (select job.owner from brightrun.job where job.id = lease.job_id offset 0) = p_owner), 0)
$$;

-- Which of these owners have used up their budgets.
create or replace function brightrun._overspent(p_owners uuid[], p_now timestamptz) returns uuid[]
language sql stable set search_path = '' as $$
    select array(select owner from brightrun.account
                 where owner = any (p_owners)
                   and brightrun._owner_spent(owner, brightrun._period_began(period, p_now), p_now) >= budget)
$$;

create or replace function brightrun._budget_error(p_owner uuid) returns jsonb
language sql stable set search_path = '' as $$
    select pg_catalog.jsonb_build_object('code', 'QUEUE_OWNER_BUDGET_EXCEEDED', 'blame', 'user',
        'message', pg_catalog.format('the jobs of owner %s have used up their budget of %s%s', p_owner, budget, ' per ' || period))
    from brightrun.account where owner = p_owner
$$;

-- Puts waiting jobs aside whose owners have no money left, for a minute each time; returns the others. The caller holds their rows.
create or replace function brightrun._affordable(p_jobs uuid[], p_now timestamptz) returns uuid[]
language plpgsql volatile set search_path = '' as $$
declare
    v_poor uuid[];
begin
    if not exists (select from brightrun.account) then
        return p_jobs;
    end if;
    v_poor := brightrun._overspent(array(select distinct owner from brightrun.job where id = any (p_jobs)), p_now);
    if v_poor = '{}' then
        return p_jobs;
    end if;
    update brightrun.ready
    set ready_seq = null, run_at = p_now + interval '1 minute', last_error = brightrun._budget_error(job.owner)
    from brightrun.job where job.id = ready.job_id and ready.job_id = any (p_jobs) and job.owner = any (v_poor);
    return array(select given.id from pg_catalog.unnest(p_jobs) with ordinality as given (id, place) join brightrun.job on job.id = given.id
                 where (owner = any (v_poor)) is not true order by place);
end
$$;

-- Ends the time of runs whose owners have no money left; the sweep that calls this takes them.
create or replace function brightrun._stop_overspent(p_now timestamptz) returns void
language plpgsql volatile set search_path = '' as $$
declare
    v_poor uuid[];
begin
    if not exists (select from brightrun.account) then
        return;
    end if;
    v_poor := brightrun._overspent(array(select distinct job.owner from brightrun.lease join brightrun.job on job.id = lease.job_id
                                         where lease.price_per_hour is not null), p_now);
    if v_poor = '{}' then
        return;
    end if;
    update brightrun.lease set deadline_at = p_now, expires_at = p_now
    where job_id in (select lease.job_id from brightrun.lease join brightrun.job on job.id = lease.job_id
                     where lease.price_per_hour is not null and job.owner = any (v_poor)
                     for update of lease skip locked);
    if found then
        perform pg_catalog.pg_notify('brightrun_cancel', '');
    end if;
end
$$;

-- What the end of jobs means for others: their live keys are free, and who waited for them runs, or never will.
create or replace function brightrun._after_end(p_jobs uuid[]) returns void
language plpgsql volatile set search_path = '' as $$
declare
    v_job    uuid;
    v_bad    uuid;
    v_cancel boolean;
begin
    delete from brightrun.live_key where job_id = any (p_jobs);
    if not exists (select from brightrun.dependency where after_id = any (p_jobs)) then
        return;
    end if;
    for v_job in select distinct job_id from brightrun.dependency where after_id = any (p_jobs) order by job_id loop
        -- Two that end at once must not each think the other is still open: the second waits here for the first.
        perform from brightrun.ready where job_id = v_job for update;
        continue when not found;
        select cancel_requested_at is not null into v_cancel from brightrun.job where id = v_job;
        select after_id into v_bad from brightrun.dependency join brightrun.job on job.id = after_id
        where dependency.job_id = v_job and job.outcome in ('failed', 'cancelled') limit 1;
        if v_bad is not null or v_cancel then
            perform brightrun._cancel_waiting(v_job, 'job ' || v_bad || ', which it waits for, did not complete');
        elsif not exists (select from brightrun.dependency join brightrun.job on job.id = after_id
                          where dependency.job_id = v_job and job.outcome is null) then
            update brightrun.ready set run_at = (select run_at from brightrun.job where id = v_job) where job_id = v_job;
            perform pg_catalog.pg_notify('brightrun_ready', '');
        end if;
    end loop;
end
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
            finished_at = greatest(brightrun.now(), p_lease.started_at, created_at), final_token = p_lease.token,
            result = case when v_outcome = 'completed' then p_result end,
            error = case when v_outcome = 'failed' then p_error end,
            checkpoint = case when v_outcome = 'failed' then p_lease.checkpoint end
        where id = p_lease.job_id;
    else
        insert into brightrun.ready (job_id, queue, kind, priority, share_id, requirement_id, checkpoint, spent,
                                     ready_seq, run_at, attempt, claims, started_at, last_token, last_error, progress)
        values (p_lease.job_id, p_lease.queue, p_lease.kind, p_lease.priority, p_lease.share_id, p_lease.requirement_id,
                p_lease.checkpoint, brightrun._spent(p_lease, brightrun.now()),
                case when p_run_at is null then pg_catalog.nextval('brightrun.ready_seq') end,
                coalesce(p_run_at, brightrun.now()), p_attempt, p_lease.claims, p_lease.started_at,
                p_lease.token, p_error, p_lease.progress);
    end if;
    -- The result is on the job's row.
    perform brightrun._append(p_lease.job_id, v_event, case when v_event = 'completed' then '{}' else v_detail end,
                              p_lease.attempt, p_lease.token, p_lease.worker);
    perform brightrun._meter(p_lease, v_event);
    if v_outcome is not null then
        perform brightrun._after_end(array[p_lease.job_id]);
    end if;
    return coalesce(v_outcome, case when p_run_at is null then 'ready' else 'scheduled' end);
end
$$;

-- Ends the plain ones among many leases as completed: token current, kind without a projector, no cancel asked for, job row free.
-- Same lock order as _leave, and the cancel is likewise read under the job row's lock; a job row that somebody holds is left to
-- the one-by-one way, so that this never waits for an app. Returns the jobs it ended.
create or replace function brightrun._complete_plain(p_job_ids uuid[], p_tokens bigint[], p_results jsonb[]) returns uuid[]
language plpgsql volatile set search_path = '' as $$
declare
    v_now      timestamptz := brightrun.now();
    v_ids      uuid[];
    v_tokens   bigint[];
    v_attempts smallint[];
    v_started  timestamptz[];
    v_workers  text[];
    v_results  jsonb[];
begin
    select pg_catalog.array_agg(held.job_id), pg_catalog.array_agg(held.token), pg_catalog.array_agg(held.attempt),
           pg_catalog.array_agg(held.started_at), pg_catalog.array_agg(held.worker), pg_catalog.array_agg(held.result)
    into v_ids, v_tokens, v_attempts, v_started, v_workers, v_results
    from (
        select lease.job_id, lease.token, lease.attempt, lease.started_at, lease.worker, asked.result, job.cancel_requested_at
        from (
            select distinct on (given.job_id, given.token) given.job_id, given.token, given.result
            from rows from (pg_catalog.unnest(p_job_ids), pg_catalog.unnest(p_tokens), pg_catalog.unnest(p_results))
                 as given (job_id, token, result)
            order by given.job_id, given.token
        ) asked
        join brightrun.lease on lease.job_id = asked.job_id and lease.token = asked.token
        join brightrun.job on job.id = lease.job_id
        -- Those whose end has to do with more than their own rows go one by one.
        where lease.share_id is null and lease.price_per_hour is null
          and not exists (select from brightrun.job_kind where job_kind.kind = lease.kind and (projector is not null or metered))
        order by lease.job_id
        for update of lease for no key update of job skip locked
    ) held
    where held.cancel_requested_at is null;
    if v_ids is null then
        return '{}';
    end if;
    delete from brightrun.lease where job_id = any (v_ids);
    update brightrun.job
    set outcome = 'completed', attempt = held.attempt, started_at = held.started_at,
        finished_at = greatest(v_now, held.started_at, created_at), final_token = held.token, result = coalesce(held.result, '{}')
    from rows from (pg_catalog.unnest(v_ids), pg_catalog.unnest(v_tokens), pg_catalog.unnest(v_attempts),
                    pg_catalog.unnest(v_started), pg_catalog.unnest(v_results))
         as held (job_id, token, attempt, started_at, result)
    where job.id = held.job_id;
    insert into brightrun.event (at, job_id, event, attempt, token, worker, detail)
    select v_now, held.job_id, 'completed', held.attempt, held.token, held.worker, '{}'
    from rows from (pg_catalog.unnest(v_ids), pg_catalog.unnest(v_tokens), pg_catalog.unnest(v_attempts), pg_catalog.unnest(v_workers))
         as held (job_id, token, attempt, worker);
    perform brightrun._after_end(v_ids);
    return v_ids;
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
        finished_at = greatest(brightrun.now(), created_at, v_ready.started_at), final_token = v_ready.last_token,
        cancel_requested_at = coalesce(cancel_requested_at, brightrun.now()),
        cancel_reason = coalesce(cancel_reason, p_reason)
    where id = p_job_id;
    perform brightrun._append(p_job_id, 'cancelled', v_detail, v_ready.attempt, v_ready.last_token, null);
    perform brightrun._after_end(array[p_job_id]);
end
$$;

-- Turns scheduled rows whose time has come into ready ones, oldest first. Part of every claim, so no process need live for it.
create or replace function brightrun._promote(p_now timestamptz) returns void
language plpgsql volatile set search_path = '' as $$
begin
    if not exists (select from brightrun.ready where ready_seq is null and run_at <= p_now) then
        return;
    end if;
    with due as materialized (
        select job_id, run_at from brightrun.ready
        where ready_seq is null and run_at <= p_now
        order by run_at limit 500
        for update skip locked
    ), numbered as (
        select job_id, pg_catalog.nextval('brightrun.ready_seq') as seq from (select job_id from due order by run_at) oldest_first
    )
    update brightrun.ready set ready_seq = numbered.seq from numbered where ready.job_id = numbered.job_id;
end
$$;

-- One step of the settling of ready_seq (see brightrun.settling), if one is due; returns the distance of marks. To be called before the
-- transaction has written anything: what is read here must be older than its id. Never waits.
create or replace function brightrun._settle() returns bigint
language plpgsql volatile set search_path = '' as $$
declare
    v_last    bigint := coalesce(pg_catalog.pg_sequence_last_value('brightrun.ready_seq'), 0);
    v_seen    brightrun.settling;
    v_now     brightrun.settling;
    v_foreign boolean;
begin
    select * into v_seen from brightrun.settling where only_row;
    if (v_seen.sampled = v_seen.settled and v_last - v_seen.settled < v_seen.step)
       or pg_catalog.pg_current_xact_id_if_assigned() is not null
       or pg_catalog.current_setting('transaction_isolation') <> 'read committed' then
        return v_seen.step;
    end if;
    -- Ids from the future are those of another server, from which this database was restored: they say nothing here.
    v_foreign := coalesce(coalesce(v_seen.horizon, v_seen.sampled_by)
                          >= pg_catalog.pg_snapshot_xmax(pg_catalog.pg_current_snapshot()), false);
    if not v_foreign and v_seen.horizon >= pg_catalog.pg_snapshot_xmin(pg_catalog.pg_current_snapshot()) then
        return v_seen.step;
    end if;
    select * into v_now from brightrun.settling where only_row for update skip locked;
    if not found or v_now is distinct from v_seen then
        return v_seen.step;
    end if;
    if v_seen.sampled > v_seen.settled and v_seen.horizon is null and not v_foreign then
        update brightrun.settling set horizon = pg_catalog.pg_current_xact_id() where only_row;
        return v_seen.step;
    end if;
    v_now.settled := case when v_foreign then v_seen.settled else v_seen.sampled end;
    v_now.sampled := case when v_last - v_now.settled < v_seen.step then v_now.settled else v_last end;
    if v_now.sampled > v_now.settled then
        perform pg_catalog.setval('brightrun.ready_sampled', v_now.sampled);
    end if;
    update brightrun.settling
    set settled = v_now.settled, sampled = v_now.sampled, sampled_by = pg_catalog.pg_current_xact_id(), horizon = null where only_row;
    return v_seen.step;
end
$$;

-- Raises the marks of some priorities of one kind and need, where that is worth a version of their rows; makes those that are missing,
-- but not so many that to look at each costs a claim more than they save. Called last, so that a mark is locked for a moment only.
create or replace function brightrun._raise_marks(p_queue text, p_kind text, p_need integer, p_priorities smallint[]) returns void
language plpgsql volatile set search_path = '' as $$
declare
    v_settled  bigint;
    v_step     bigint;
    v_priority smallint;
    v_low      bigint;
    v_to       bigint;
begin
    -- A mark is raised by what is seen after it was locked, which an older snapshot does not show.
    if pg_catalog.current_setting('transaction_isolation') <> 'read committed' then
        return;
    end if;
    select settled, step into v_settled, v_step from brightrun.settling where only_row;
    foreach v_priority in array p_priorities loop
        select low into v_low from brightrun.mark
        where queue = p_queue and kind = p_kind and requirement_id = p_need and priority = v_priority;
        if not found then
            continue when (select count(*) from brightrun.mark
                           where queue = p_queue and kind = p_kind and requirement_id = p_need) >= 32;
            begin
                insert into brightrun.mark (queue, kind, requirement_id, priority) values (p_queue, p_kind, p_need, v_priority)
                on conflict do nothing;
            exception when lock_not_available then
                continue;
            end;
        else
            continue when v_low > v_settled - v_step;
        end if;
        select low into v_low from brightrun.mark
        where queue = p_queue and kind = p_kind and requirement_id = p_need and priority = v_priority for update skip locked;
        continue when not found;
        select ready_seq into v_to from brightrun.ready
        where queue = p_queue and kind = p_kind and requirement_id = p_need and share_id is null
          and priority = v_priority and ready_seq >= v_low and ready_seq <= v_settled
        order by ready_seq limit 1;
        v_to := coalesce(v_to, v_settled + 1);
        if v_low <= v_to - v_step then
            update brightrun.mark set low = v_to, moved_at = brightrun.now()
            where queue = p_queue and kind = p_kind and requirement_id = p_need and priority = v_priority;
        end if;
    end loop;
end
$$;

-- What a sweep does for marks: raises those that claims have left behind, and once a minute looks below all of them for rows that cannot
-- be there. One that is found anyway is counted, which the doctor tells, and its mark lowered. The look reads what marks spare the
-- claims, so it is left out while that is very much.
create or replace function brightrun._tend_marks(p_now timestamptz) returns void
language plpgsql volatile set search_path = '' set enable_seqscan = off as $$
declare
    v_late  record;
    v_state brightrun.settling;
begin
    if pg_catalog.current_setting('transaction_isolation') <> 'read committed' then
        return;
    end if;
    select * into v_state from brightrun.settling where only_row;
    for v_late in
        select queue, kind, requirement_id, pg_catalog.array_agg(priority) as priorities
        from brightrun.mark where low <= v_state.settled - v_state.step group by queue, kind, requirement_id
    loop
        perform brightrun._raise_marks(v_late.queue, v_late.kind, v_late.requirement_id, v_late.priorities);
    end loop;
    if p_now < v_state.looked_at + interval '1 minute' or pg_catalog.pg_stat_get_dead_tuples('brightrun.ready'::regclass) > 1000000 then
        return;
    end if;
    perform from brightrun.settling where only_row for update skip locked;
    if not found then
        return;
    end if;
    for v_late in
        select * from (
            select mark.*, (select ready_seq from brightrun.ready
                            where ready.queue = mark.queue and ready.kind = mark.kind and ready.requirement_id = mark.requirement_id
                              and share_id is null and ready.priority = mark.priority and ready_seq < mark.low
                            order by ready_seq limit 1) as stray
            from brightrun.mark
        ) looked
        where stray is not null order by queue, kind, requirement_id, priority
    loop
        update brightrun.mark set low = least(low, v_late.stray)
        where queue = v_late.queue and kind = v_late.kind and requirement_id = v_late.requirement_id and priority = v_late.priority;
        v_state.strays := v_state.strays + 1;
    end loop;
    update brightrun.settling set strays = v_state.strays, looked_at = p_now where only_row;
end
$$;

-- Moves ready rows that the caller has locked to leases, all of one kind, and tells the history. A batch is one statement.
create or replace function brightrun._lease(p_jobs uuid[], p_worker text, p_lease interval, p_price numeric default null) returns uuid[]
language plpgsql volatile set search_path = '' as $$
declare
    v_now    timestamptz := brightrun.now();
    v_leased uuid[];
begin
    with taken as (
        delete from brightrun.ready where job_id = any (p_jobs) returning *
    ), leased as (
        insert into brightrun.lease (job_id, queue, kind, priority, share_id, requirement_id, checkpoint, spent, price_per_hour,
                                     worker, attempt, claims, lease_for, started_at, claimed_at,
                                     beat_at, expires_at, deadline_at, progress)
        select taken.job_id, taken.queue, taken.kind, taken.priority, taken.share_id, taken.requirement_id, taken.checkpoint,
               taken.spent, price.per_hour, p_worker, taken.attempt + 1, taken.claims + 1, p_lease,
               coalesce(taken.started_at, v_now), v_now, v_now,
               least(v_now + p_lease, bound.deadline_at), bound.deadline_at, taken.progress
        from taken join brightrun.job on job.id = taken.job_id,
             lateral (select coalesce(p_price, job.price_per_hour) as per_hour) price,
             -- Money is time: a budget is a hard deadline at the machine's price, less what earlier runs have spent.
             lateral (select v_now + least(job.hard_deadline, case when job.budget is not null and price.per_hour > 0
                          then least(greatest((job.budget - taken.spent) / price.per_hour, 0), 876000) * interval '1 hour' end)
                      as deadline_at) bound
        order by taken.priority, taken.ready_seq
        returning job_id, token, worker, attempt, claims
    ), told as (
        insert into brightrun.event (at, job_id, event, attempt, token, worker, detail)
        select v_now, job_id, case when claims = 1 then 'claimed' else 'resumed' end, attempt, token, worker, '{}'
        from leased
    )
    select pg_catalog.array_agg(job_id) into v_leased from leased;
    return coalesce(v_leased, '{}');
end
$$;

-- Grants leases on ready rows of one kind that the caller has locked; returns the jobs granted. A job whose cancel was asked
-- for meanwhile ends here. With a projector each job is a transaction of its own inside the claim, so that one job whose
-- projector raises steps aside for a minute instead of blocking the head of its queue for everybody.
create or replace function brightrun._grant(p_kind text, p_jobs uuid[], p_worker text, p_lease interval,
                                            p_price numeric default null) returns uuid[]
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
        return brightrun._lease(p_jobs, p_worker, p_lease, p_price);
    end if;
    foreach v_job in array p_jobs loop
        continue when v_job = any (v_doomed);
        begin
            perform brightrun._lease(array[v_job], p_worker, p_lease, p_price);
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

-- The share of an owner and a key, made when first seen, with the rules its claims will lock.
create or replace function brightrun._share(p_owner uuid, p_key text) returns bigint
language plpgsql volatile set search_path = '' as $$
declare
    v_id bigint;
begin
    select id into v_id from brightrun.share where owner is not distinct from p_owner and key is not distinct from p_key;
    if found then
        return v_id;
    end if;
    insert into brightrun.limit_rule (scope, name, at_most, starts_most, starts_per, tokens)
    select named.scope, named.name, case when fallback.name is null and named.scope = 'key' then 1 else fallback.at_most end,
           fallback.starts_most, fallback.starts_per, coalesce(fallback.starts_most, 0)
    from (values ('key', p_key), ('owner', p_owner::text)) as named (scope, name)
    left join brightrun.limit_rule fallback on fallback.scope = named.scope and fallback.name = '*'
    where named.name is not null
    on conflict do nothing;
    insert into brightrun.share (owner, key) values (p_owner, p_key) on conflict do nothing;
    select id into v_id from brightrun.share where owner is not distinct from p_owner and key is not distinct from p_key;
    return v_id;
end
$$;

-- The class of machines a job asks for: {vram_mb, gpu_classes, gpu_count, max_price, fallback: [{after_seconds, gpu_classes}, …]}. Each
-- fallback adds its classes once the job has been ready for that long.
create or replace function brightrun._requirement(p_requires jsonb) returns integer
language plpgsql volatile set search_path = '' as $$
declare
    v_vram    integer := coalesce((p_requires ->> 'vram_mb')::integer, 0);
    v_classes text[] := array(select distinct lower(class) from pg_catalog.jsonb_array_elements_text(p_requires -> 'gpu_classes') as class order by 1);
    v_count   integer := coalesce((p_requires ->> 'gpu_count')::integer, 0);
    v_price   numeric(12,4) := (p_requires ->> 'max_price')::numeric;
    v_later   jsonb := p_requires -> 'fallback' -> 0;
    v_to      integer;
    v_after   interval;
    v_id      integer;
begin
    v_classes := nullif(v_classes, '{}');
    if v_later is not null then
        if v_classes is null then
            raise exception 'a job that runs on any class has nothing to fall back to' using errcode = '22023';
        end if;
        v_after := pg_catalog.make_interval(secs => (v_later ->> 'after_seconds')::float8);
        v_to := brightrun._requirement(p_requires || pg_catalog.jsonb_build_object(
            'gpu_classes', (p_requires -> 'gpu_classes') || (v_later -> 'gpu_classes'), 'fallback', (p_requires -> 'fallback') - 0));
    end if;
    for v_round in 1 .. 2 loop
        select id into v_id from brightrun.requirement
        where vram_mb = v_vram and gpu_count = v_count
          and gpu_classes is not distinct from v_classes and max_price is not distinct from v_price
          and widens_to is not distinct from v_to and widens_after is not distinct from v_after;
        exit when found;
        insert into brightrun.requirement (vram_mb, gpu_classes, gpu_count, max_price, widens_to, widens_after)
        values (v_vram, v_classes, v_count, v_price, v_to, v_after) on conflict do nothing;
    end loop;
    return v_id;
end
$$;

-- Notes what a new job waits for. The rows of those jobs are locked against their ending until this commits. Whether it must wait;
-- null if one of them has ended badly already.
create or replace function brightrun._depend(p_job_id uuid, p_after uuid[]) returns boolean
language plpgsql volatile set search_path = '' as $$
declare
    v_after  uuid[] := array(select distinct after from pg_catalog.unnest(p_after) as after order by 1);
    v_found  integer;
    v_bad    boolean;
    v_open   boolean;
begin
    perform from brightrun.job where id = any (v_after) order by id for share;
    select count(*), bool_or(outcome in ('failed', 'cancelled')), bool_or(outcome is null) into v_found, v_bad, v_open
    from brightrun.job where id = any (v_after);
    if v_found <> pg_catalog.cardinality(v_after) then
        raise exception 'a job to wait for does not exist' using errcode = '22023';
    end if;
    insert into brightrun.dependency (job_id, after_id) select p_job_id, after from pg_catalog.unnest(v_after) as after;
    return case when v_bad then null else v_open end;
end
$$;

drop function if exists brightrun.enqueue(text, jsonb, uuid, text, integer, uuid, text, integer, timestamptz, interval, interval, text, boolean);
create or replace function brightrun.enqueue(
    p_kind text, p_payload jsonb default '{}', p_id uuid default null, p_queue text default 'default',
    p_priority integer default 0, p_owner uuid default null, p_idempotency_key text default null,
    p_max_attempts integer default 3, p_run_at timestamptz default null, p_delay interval default null,
    p_hard_deadline interval default null, p_external_id text default null, p_notify boolean default false,
    p_live_key text default null, p_concurrency_key text default null, p_requires jsonb default null, p_after uuid[] default null,
    p_budget numeric default null, p_price_per_hour numeric default null) returns uuid
language plpgsql volatile security definer set search_path = '' set plan_cache_mode = force_generic_plan as $$
declare
    v_now         timestamptz := brightrun.now();
    v_run_at      timestamptz := coalesce(p_run_at, v_now + p_delay, v_now);
    v_id          uuid;
    v_share       bigint;
    v_requirement integer := 0;
    v_waits       boolean := false;
begin
    if p_live_key is not null then
        select job_id into v_id from brightrun.live_key where kind = p_kind and key = p_live_key;
        if found then
            return v_id;
        end if;
    end if;
    if p_concurrency_key is not null
       or (p_owner is not null and exists (select from brightrun.job_kind where kind = p_kind and fair)) then
        v_share := brightrun._share(case when exists (select from brightrun.job_kind where kind = p_kind and fair) then p_owner end,
                                    p_concurrency_key);
    end if;
    if p_requires is not null then
        v_requirement := brightrun._requirement(p_requires);
    end if;
    insert into brightrun.job (id, kind, queue, priority, payload, owner, idempotency_key, max_attempts, hard_deadline,
                               external_id, run_at, created_at, share_id, requirement_id, budget, price_per_hour)
    values (coalesce(p_id, pg_catalog.gen_random_uuid()), p_kind, p_queue, p_priority, p_payload, p_owner, p_idempotency_key,
            p_max_attempts, p_hard_deadline, p_external_id, v_run_at, v_now, v_share, v_requirement, p_budget, p_price_per_hour)
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
    if p_live_key is not null then
        insert into brightrun.live_key (kind, key, job_id) values (p_kind, p_live_key, v_id) on conflict do nothing;
        if not found then
            raise exception 'another transaction is enqueueing a job with the same live key' using errcode = '40001',
                hint = 'try again: it will be found';
        end if;
    end if;
    if p_after is not null then
        v_waits := brightrun._depend(v_id, p_after);
    end if;
    insert into brightrun.ready (job_id, queue, kind, priority, share_id, requirement_id, ready_seq, run_at)
    values (v_id, p_queue, p_kind, p_priority, v_share, v_requirement,
            case when v_run_at <= v_now and not coalesce(v_waits, true) then pg_catalog.nextval('brightrun.ready_seq') end,
            case when coalesce(v_waits, true) then v_now + interval '100 years' else v_run_at end);
    perform brightrun._append(v_id, 'enqueued', brightrun._detail(null, 0, null), 0, null, null);
    perform brightrun._project(p_kind, v_id, 'enqueued', brightrun._detail(null, 0, null));
    if v_waits is null then
        perform brightrun._cancel_waiting(v_id, 'a job it waits for did not complete');
    end if;
    if p_notify then
        perform pg_catalog.pg_notify('brightrun_ready', '');
    end if;
    return v_id;
end
$$;

-- Many jobs of one kind in one statement: the set-wise form of enqueue(), thirty times as fast. The ids come back in the order
-- of the payloads. p_keys, where given, are idempotency keys, one each; a known key gives the existing job's id. As fast as
-- COPY into the tables would be here, and needs no right on them.
create or replace function brightrun.enqueue_many(
    p_kind text, p_payloads jsonb[], p_keys text[] default null, p_queue text default 'default', p_priority integer default 0,
    p_owner uuid default null, p_max_attempts integer default 3, p_run_at timestamptz default null, p_delay interval default null,
    p_hard_deadline interval default null, p_notify boolean default false) returns uuid[]
language plpgsql volatile security definer set search_path = '' set plan_cache_mode = force_generic_plan as $$
declare
    v_now    timestamptz := brightrun.now();
    v_run_at timestamptz := coalesce(p_run_at, v_now + p_delay, v_now);
    v_ids    uuid[];
begin
    if p_keys is not null or brightrun._enqueues_one_by_one(p_kind) then
        for v_place in 1 .. coalesce(pg_catalog.cardinality(p_payloads), 0) loop
            v_ids := v_ids || brightrun.enqueue(p_kind, p_payloads[v_place], null, p_queue, p_priority, p_owner, p_keys[v_place],
                                                p_max_attempts, p_run_at, p_delay, p_hard_deadline, null, false);
        end loop;
    else
        v_ids := array(select pg_catalog.gen_random_uuid() from pg_catalog.generate_series(1, pg_catalog.cardinality(p_payloads)));
        insert into brightrun.job (id, kind, queue, priority, payload, owner, max_attempts, hard_deadline, run_at, created_at)
        select given.id, p_kind, p_queue, p_priority, given.payload, p_owner, p_max_attempts, p_hard_deadline, v_run_at, v_now
        from rows from (pg_catalog.unnest(v_ids), pg_catalog.unnest(p_payloads)) as given (id, payload);
        insert into brightrun.ready (job_id, queue, kind, priority, ready_seq, run_at)
        select id, p_queue, p_kind, p_priority,
               case when v_run_at <= v_now then pg_catalog.nextval('brightrun.ready_seq') end, v_run_at
        from pg_catalog.unnest(v_ids) as id;
        insert into brightrun.event (at, job_id, event, attempt, detail)
        select v_now, id, 'enqueued', 0, '{}' from pg_catalog.unnest(v_ids) as id;
    end if;
    if p_notify then
        perform pg_catalog.pg_notify('brightrun_ready', '');
    end if;
    return coalesce(v_ids, '{}');
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

-- An operator's act: a failed job gets a fresh set of attempts, and resumes from its last checkpoint. Returns its new state, or null if it is not a failed job.
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
    set outcome = null, attempt = null, finished_at = null, started_at = null, error = null, final_token = null, checkpoint = null
    where id = p_job_id and outcome = 'failed';
    if not found then
        raise exception 'job % was redriven by somebody else', p_job_id using errcode = '40001';
    end if;
    insert into brightrun.ready (job_id, queue, kind, priority, share_id, requirement_id, ready_seq, run_at, claims, started_at,
                                 last_token, last_error, checkpoint)
    values (p_job_id, v_job.queue, v_job.kind, v_job.priority, v_job.share_id, v_job.requirement_id, pg_catalog.nextval('brightrun.ready_seq'), brightrun.now(),
            v_job.attempt, v_job.started_at, v_job.final_token, v_job.error, v_job.checkpoint);
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

-- Whether a machine will do. p_can: {vram_mb, gpu_class, gpu_count, price_per_hour}; null: a machine that promises nothing.
create or replace function brightrun._will_do(p_need brightrun.requirement, p_can jsonb) returns boolean
language sql immutable set search_path = '' as $$
    select p_need.id = 0
        or (p_need.vram_mb <= coalesce((p_can ->> 'vram_mb')::integer, 0)
            and p_need.gpu_count <= coalesce((p_can ->> 'gpu_count')::integer, 0)
            and (p_need.gpu_classes is null or lower(p_can ->> 'gpu_class') = any (p_need.gpu_classes))
            and (p_need.max_price is null or (p_can ->> 'price_per_hour')::numeric <= p_need.max_price))
$$;

-- Locks a share's rules, in one order for everybody, and counts its leases under that lock. A rule that another claim holds is not
-- waited for: false, and the next look will tell. The count is exact, since whoever grants holds the same lock until it commits.
create or replace function brightrun._admit(p_share_id bigint) returns boolean
language plpgsql volatile set search_path = '' as $$
declare
    v_share brightrun.share;
    v_rule  brightrun.limit_rule;
    v_want  integer;
    v_seen  integer := 0;
begin
    select * into v_share from brightrun.share where id = p_share_id;
    v_want := (v_share.key is not null)::integer + (v_share.owner is not null)::integer;
    for v_rule in
        select * from brightrun.limit_rule
        where (scope = 'key' and name = v_share.key) or (scope = 'owner' and name = v_share.owner::text)
        order by scope for no key update skip locked
    loop
        v_seen := v_seen + 1;
        if v_rule.at_most is not null and (
            select count(*) from brightrun.lease join brightrun.share on share.id = lease.share_id
            where case v_rule.scope when 'key' then share.key = v_share.key else share.owner = v_share.owner end
        ) >= v_rule.at_most then
            return false;
        end if;
        if v_rule.starts_most is not null and brightrun._tokens(v_rule, brightrun.now()) < 1 then
            return false;
        end if;
    end loop;
    return v_seen = v_want;
end
$$;

-- One job for each share that waits and is admitted, best first: by priority, then the owner who used the least of late, then by the
-- order of becoming ready. Ineligible shares cost a probe each, however many jobs wait in them.
create or replace function brightrun._claim_shared(p_queue text, p_kinds text[], p_needs integer[], p_worker text, p_lease interval,
                                                   p_price numeric, p_limit integer) returns uuid[]
language plpgsql volatile set search_path = '' as $$
declare
    v_now     timestamptz := brightrun.now();
    v_next    record;
    v_job     uuid;
    v_one     uuid[];
    v_granted uuid[] := '{}';
    v_before  integer;
begin
    loop
        v_before := pg_catalog.cardinality(v_granted);
        for v_next in
            with recursive waiting (kind, share_id) as (
                select kind, (select ready.share_id from brightrun.ready
                              where queue = p_queue and ready.kind = wanted.kind and ready_seq is not null and ready.share_id is not null
                              order by ready.share_id limit 1)
                from (select distinct kind from pg_catalog.unnest(p_kinds) as given (kind)) wanted
                union all
                select waiting.kind, (select ready.share_id from brightrun.ready
                              where queue = p_queue and ready.kind = waiting.kind and ready_seq is not null and ready.share_id > waiting.share_id
                              order by ready.share_id limit 1)
                from waiting where waiting.share_id is not null
            )
            select waiting.kind, waiting.share_id, share.owner, head.job_id
            from waiting
            join brightrun.share on share.id = waiting.share_id
            cross join lateral (
                select one.job_id, one.priority, one.ready_seq
                from pg_catalog.unnest(p_needs) as need cross join lateral (
                    select job_id, priority, ready_seq from brightrun.ready
                    where queue = p_queue and ready.kind = waiting.kind and ready.share_id = waiting.share_id
                      and requirement_id = need and ready_seq is not null
                    order by priority, ready_seq limit 1
                ) one
                order by one.priority, one.ready_seq limit 1
            ) head
            left join brightrun.limit_rule on limit_rule.scope = 'owner' and limit_rule.name = share.owner::text
            order by head.priority, coalesce(brightrun._used(used_seconds, used_at, v_now) / weight, 0), head.ready_seq
        loop
            exit when pg_catalog.cardinality(v_granted) >= p_limit;
            continue when not brightrun._admit(v_next.share_id);
            select job_id into v_job from brightrun.ready
            where job_id = v_next.job_id and ready_seq is not null and share_id = v_next.share_id for update skip locked;
            continue when not found;
            continue when brightrun._affordable(array[v_job], v_now) = '{}';
            v_one := brightrun._grant(v_next.kind, array[v_job], p_worker, p_lease, p_price);
            continue when v_one = '{}';
            v_granted := v_granted || v_one;
            perform brightrun._note_start(v_next.share_id, v_now);
            -- A minute in advance, so that a batch goes round; what it really was is settled at the end of the run.
            perform brightrun._charge(v_next.owner, 60, v_now);
        end loop;
        exit when pg_catalog.cardinality(v_granted) >= p_limit or pg_catalog.cardinality(v_granted) = v_before;
    end loop;
    return v_granted;
end
$$;

-- Up to p_limit jobs of the given kinds from one queue, that this machine can run (p_can, see _will_do). Within a kind: by priority,
-- then in the order they became ready. Between kinds, and between jobs that need different machines: the one with the best head
-- first, so with one free slot the best job of all. Shared jobs (see _claim_shared) go first when the best of them is the best of all.
drop function if exists brightrun.claim(text, text[], integer, interval, text);
create or replace function brightrun.claim(p_worker text, p_kinds text[], p_limit integer default 1,
                                           p_lease interval default interval '2 minutes', p_queue text default 'default',
                                           p_can jsonb default null)
returns setof brightrun.claimed
language plpgsql volatile security definer set search_path = '' set plan_cache_mode = force_generic_plan set lock_timeout = '500ms'
set enable_seqscan = off set enable_hashjoin = off set enable_mergejoin = off as $$
declare
    v_jobs    uuid[];
    v_able    uuid[];
    v_taken   uuid[];
    v_granted uuid[] := '{}';
    v_left    integer := least(p_limit, 10000);
    v_price   numeric := (p_can ->> 'price_per_hour')::numeric;
    v_needs   integer[] := '{0}';
    v_starts  integer;
    v_shared  boolean;
    v_first   boolean;
    v_step    bigint;
    v_due     boolean;
    v_paused  boolean;
    v_kinds   text[] := p_kinds;
    v_wants   integer[];
    v_far     smallint[];
    v_behind  jsonb;
begin
    select exists (select from brightrun.queue_setting where queue = p_queue and paused), step, sampled > settled
           or pg_catalog.pg_sequence_last_value('brightrun.ready_seq') - settled >= step
    into v_paused, v_step, v_due from (select) once left join brightrun.settling on only_row;
    if v_paused then
        return;
    end if;
    if v_due then
        perform brightrun._settle();
    end if;
    v_starts := brightrun._queue_starts(p_queue, brightrun.now());
    v_left := least(v_left, v_starts);
    if v_left <= 0 then
        return;
    end if;
    perform brightrun._promote(brightrun.now());
    if p_can is not null then
        v_needs := array(select id from brightrun.requirement where brightrun._will_do(requirement, p_can));
    end if;
    v_shared := exists (select from brightrun.ready where queue = p_queue and kind = any (p_kinds)
                        and ready_seq is not null and share_id is not null);
    if v_shared then
        v_first := (select (priority, ready_seq) from brightrun.ready
                    where queue = p_queue and kind = any (p_kinds) and requirement_id = any (v_needs) and ready_seq is not null and share_id is not null
                    order by priority, ready_seq limit 1)
                 < (select (priority, ready_seq) from brightrun.ready
                    where queue = p_queue and kind = any (p_kinds) and requirement_id = any (v_needs) and ready_seq is not null and share_id is null
                    order by priority, ready_seq limit 1);
        if v_first then
            v_granted := brightrun._claim_shared(p_queue, p_kinds, v_needs, p_worker, p_lease, v_price, v_left);
            v_left := v_left - pg_catalog.cardinality(v_granted);
        end if;
    end if;
    v_wants := v_needs;
    if pg_catalog.cardinality(p_kinds) <> 1 or pg_catalog.cardinality(v_needs) <> 1 then
        select pg_catalog.array_agg(wanted.kind order by head.priority, head.ready_seq),
               pg_catalog.array_agg(need order by head.priority, head.ready_seq)
        into v_kinds, v_wants
        from (select distinct kind from pg_catalog.unnest(p_kinds) as given (kind)) wanted
        cross join pg_catalog.unnest(v_needs) as need
        cross join lateral (
            select one.priority, one.ready_seq
            from (
                select priority::integer as priority, low, pg_catalog.lead(priority::integer, 1, 32768) over (order by priority) as until
                from brightrun.mark where mark.queue = p_queue and mark.kind = wanted.kind and mark.requirement_id = need
                union all
                select -32768, -9223372036854775808, coalesce((
                    select min(priority) from brightrun.mark
                    where mark.queue = p_queue and mark.kind = wanted.kind and mark.requirement_id = need), 32768)
                order by priority, low
            ) stretch
            cross join lateral (
                select ready.priority, ready.ready_seq from brightrun.ready
                where queue = p_queue and ready.kind = wanted.kind and requirement_id = need and ready_seq is not null and share_id is null
                  and (ready.priority, ready.ready_seq) >= (stretch.priority, stretch.low) and ready.priority < stretch.until
                order by priority, ready_seq limit 1
            ) one
            limit 1
        ) head;
    end if;
    for v_place in 1 .. coalesce(pg_catalog.cardinality(v_kinds), 0) loop
        loop
            exit when v_left <= 0;
            -- The marks cut the index into stretches, each from a mark to the next marked priority, and one before the first mark. They
            -- are read in their order, each only if those before it did not fill the claim.
            select pg_catalog.array_agg(best.job_id), pg_catalog.array_agg(distinct best.priority) filter (where best.far)
            into v_jobs, v_far
            from (
                select one.job_id, one.priority, one.priority <> stretch.priority or stretch.low < one.ready_seq - v_step as far
                from (
                    select priority::integer as priority, low, pg_catalog.lead(priority::integer, 1, 32768) over (order by priority) as until
                    from brightrun.mark where mark.queue = p_queue and mark.kind = v_kinds[v_place] and mark.requirement_id = v_wants[v_place]
                    union all
                    select -32768, -9223372036854775808, coalesce((
                        select min(priority) from brightrun.mark
                        where mark.queue = p_queue and mark.kind = v_kinds[v_place] and mark.requirement_id = v_wants[v_place]), 32768)
                    order by priority, low
                ) stretch
                cross join lateral (
                    select job_id, priority, ready_seq from brightrun.ready
                    where queue = p_queue and kind = v_kinds[v_place] and requirement_id = v_wants[v_place] and ready_seq is not null and share_id is null
                      and (ready.priority, ready.ready_seq) >= (stretch.priority, stretch.low) and ready.priority < stretch.until
                    order by priority, ready_seq limit v_left
                    for update skip locked
                ) one
                limit v_left
            ) best;
            exit when v_jobs is null;
            if v_far is not null then
                v_behind := coalesce(v_behind, '[]') || pg_catalog.jsonb_build_object(
                    'kind', v_kinds[v_place], 'need', v_wants[v_place], 'priorities', v_far);
            end if;
            v_able := brightrun._affordable(v_jobs, brightrun.now());
            if v_able <> '{}' then
                v_taken := brightrun._grant(v_kinds[v_place], v_able, p_worker, p_lease, v_price);
                v_granted := v_granted || v_taken;
                v_left := v_left - pg_catalog.cardinality(v_taken);
            end if;
            -- Whose money is gone makes room for those behind.
            exit when pg_catalog.cardinality(v_able) = pg_catalog.cardinality(v_jobs);
        end loop;
    end loop;
    if v_shared and not coalesce(v_first, false) and v_left > 0 then
        v_granted := v_granted || brightrun._claim_shared(p_queue, p_kinds, v_needs, p_worker, p_lease, v_price, v_left);
    end if;
    if v_starts is not null and v_granted <> '{}' then
        perform brightrun._take_tokens('queue', p_queue, pg_catalog.cardinality(v_granted), brightrun.now());
    end if;
    if v_behind is not null then
        perform brightrun._raise_marks(p_queue, far ->> 'kind', (far ->> 'need')::integer,
                                       array(select pg_catalog.jsonb_array_elements_text(far -> 'priorities')::smallint))
        from pg_catalog.jsonb_array_elements(v_behind) as far;
    end if;
    return query select * from brightrun.claimed where job_id = any (v_granted) order by token;
end
$$;

-- One job by its id, for a worker that was sent for it. No row: it is not waiting, its time has not come, or another claim has it.
drop function if exists brightrun.claim_job(text, uuid, interval);
create or replace function brightrun.claim_job(p_worker text, p_job_id uuid, p_lease interval default interval '2 minutes',
                                               p_can jsonb default null)
returns setof brightrun.claimed
language plpgsql volatile security definer set search_path = '' set plan_cache_mode = force_generic_plan set lock_timeout = '500ms'
set enable_seqscan = off set enable_hashjoin = off set enable_mergejoin = off as $$
declare
    v_kind   text;
    v_queue  text;
    v_share  bigint;
    v_starts integer;
begin
    select kind, queue, share_id into v_kind, v_queue, v_share from brightrun.ready
    where job_id = p_job_id and (ready_seq is not null or run_at <= brightrun.now())
      and not exists (select from brightrun.queue_setting where queue_setting.queue = ready.queue and paused)
    for update skip locked;
    -- Who sent the worker chose the machine; limits hold all the same.
    if not found or (v_share is not null and not brightrun._admit(v_share)) then
        return;
    end if;
    v_starts := brightrun._queue_starts(v_queue, brightrun.now());
    if v_starts <= 0 or brightrun._affordable(array[p_job_id], brightrun.now()) = '{}' then
        return;
    end if;
    if brightrun._grant(v_kind, array[p_job_id], p_worker, p_lease, (p_can ->> 'price_per_hour')::numeric) <> '{}' then
        if v_share is not null then
            perform brightrun._note_start(v_share, brightrun.now());
            perform brightrun._charge((select owner from brightrun.share where id = v_share), 60, brightrun.now());
        end if;
        perform brightrun._take_tokens('queue', v_queue, 1, brightrun.now());
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
language plpgsql volatile security definer set search_path = '' set plan_cache_mode = force_generic_plan set lock_timeout = '500ms' as $$
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

    with sampled as (
        update brightrun.lease set sampled_at = v_now
        from brightrun.job_kind
        where p_progress is not null and job_kind.kind = lease.kind and job_kind.progress_every is not null
          and lease.job_id = any (p_job_ids) and lease.beat_at = v_now and lease.progress is not null
          and (lease.sampled_at is null or lease.sampled_at <= v_now - job_kind.progress_every)
        returning lease.job_id, lease.attempt, lease.token, lease.worker, lease.progress
    )
    insert into brightrun.event (at, job_id, event, attempt, token, worker, detail, level)
    select v_now, sampled.job_id, 'progress', sampled.attempt, sampled.token, sampled.worker,
           brightrun._detail(sampled.progress, sampled.attempt, sampled.worker) - '{attempt,worker}'::text[], 'debug'
    from sampled;

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
language plpgsql volatile security definer set search_path = '' set plan_cache_mode = force_generic_plan as $$
declare
    v_lease  brightrun.lease := brightrun._hold(p_job_id, p_token);
    v_detail jsonb := brightrun._detail(p_detail, v_lease.attempt, v_lease.worker);
begin
    if p_event in ('progress', 'checkpoint', 'enqueued', 'claimed', 'resumed', 'completed', 'failed', 'retry', 'snoozed', 'released', 'cancelled',
                   'cancel_requested', 'redriven', 'projector_error') then
        raise exception 'the event name % belongs to the engine', p_event using errcode = '22023';
    end if;
    perform brightrun._append(p_job_id, p_event, v_detail, v_lease.attempt, p_token, v_lease.worker);
    perform brightrun._project(v_lease.kind, p_job_id, p_event, v_detail);
end
$$;

-- A line of the run's log: kept in the history with its level, and readable by the job's owner. Not handed to the projector.
create or replace function brightrun.log(p_job_id uuid, p_token bigint, p_level text, p_type text, p_message text, p_data jsonb default null)
returns void
language plpgsql volatile security definer set search_path = '' set plan_cache_mode = force_generic_plan as $$
declare
    v_lease brightrun.lease := brightrun._hold(p_job_id, p_token);
begin
    if p_level not in ('debug', 'info', 'warn', 'error') then
        raise exception 'a level is debug, info, warn or error, not %', p_level using errcode = '22023';
    end if;
    insert into brightrun.event (at, job_id, event, attempt, token, worker, detail, level)
    values (brightrun.now(), p_job_id, 'log.' || p_type, v_lease.attempt, p_token, v_lease.worker,
            pg_catalog.jsonb_strip_nulls(pg_catalog.jsonb_build_object('message', pg_catalog.left(p_message, 8000), 'data', p_data)), p_level);
end
$$;

-- Where the next run is to resume: handed to it by its claim, whatever ends this one. Say it when what it names is safely stored.
create or replace function brightrun.checkpoint(p_job_id uuid, p_token bigint, p_checkpoint jsonb) returns void
language plpgsql volatile security definer set search_path = '' set plan_cache_mode = force_generic_plan as $$
declare
    v_lease brightrun.lease := brightrun._hold(p_job_id, p_token);
begin
    update brightrun.lease set checkpoint = p_checkpoint where job_id = p_job_id;
    perform brightrun._append(p_job_id, 'checkpoint', brightrun._detail(p_checkpoint, v_lease.attempt, v_lease.worker),
                              v_lease.attempt, p_token, v_lease.worker);
end
$$;

-- The endings. Each returns the state the job got, which after a cancel request is 'cancelled' whatever was asked for, and each
-- can be repeated: the same token is told again what it did.
create or replace function brightrun.complete(p_job_id uuid, p_token bigint, p_result jsonb default '{}') returns text
language plpgsql volatile security definer set search_path = '' set plan_cache_mode = force_generic_plan as $$
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
language plpgsql volatile security definer set search_path = '' set plan_cache_mode = force_generic_plan as $$
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

-- Many good endings in one statement and one commit. One row for each that was asked for, in the order asked: the state it got,
-- or the SQLSTATE with which it was refused. Each row has its own token checked; one refusal does not hurt its neighbours.
-- Jobs without a projector are ended set-wise. The rest, and those that somebody is just cancelling, go the way of complete().
create or replace function brightrun.complete_many(p_job_ids uuid[], p_tokens bigint[], p_results jsonb[] default null)
returns table (job_id uuid, token bigint, state text, refused text)
language plpgsql volatile security definer set search_path = '' set plan_cache_mode = force_generic_plan set lock_timeout = '500ms'
set enable_seqscan = off set enable_hashjoin = off set enable_mergejoin = off as $$
#variable_conflict use_column
declare
    v_done   uuid[] := brightrun._complete_plain(p_job_ids, p_tokens, p_results);
    v_all    boolean := pg_catalog.cardinality(v_done) = pg_catalog.cardinality(p_job_ids);
begin
    for v_place in 1 .. coalesce(pg_catalog.cardinality(p_job_ids), 0) loop
        job_id := p_job_ids[v_place];
        token := p_tokens[v_place];
        refused := null;
        if v_all or job_id = any (v_done) then
            -- Asked for twice in one call, or once with a stale token: the second is told by the token, as ever.
            state := case when v_all then 'completed' else brightrun._done_by(job_id, token) end;
            refused := case when state is null then 'BR003' end;
        else
            begin
                state := brightrun.complete(job_id, token, p_results[v_place]);
            exception when others then
                state := null;
                refused := sqlstate;
            end;
        end if;
        return next;
    end loop;
end
$$;

-- Not now: run again after p_delay. Not an attempt.
create or replace function brightrun.snooze(p_job_id uuid, p_token bigint, p_delay interval, p_reason text default null) returns text
language plpgsql volatile security definer set search_path = '' set plan_cache_mode = force_generic_plan as $$
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
language plpgsql volatile security definer set search_path = '' set plan_cache_mode = force_generic_plan as $$
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
language plpgsql volatile security definer set search_path = '' set plan_cache_mode = force_generic_plan set lock_timeout = '500ms' as $$
#variable_conflict use_column
declare
    v_now    timestamptz := brightrun.now();
    v_house  brightrun.housekeeping;
    v_steady timestamptz;
    v_lease  brightrun.lease;
    v_error  jsonb;
begin
    perform brightrun._settle();
    select * into v_house from brightrun.housekeeping for update skip locked;
    if not found then
        return;
    end if;
    v_steady := case when v_house.last_sweep_at is null or v_now - v_house.last_sweep_at > p_gap then v_now
                     else greatest(v_house.steady_since, pg_catalog.pg_postmaster_start_time()) end;
    update brightrun.housekeeping set last_sweep_at = v_now, steady_since = v_steady;
    perform brightrun._brief_rescue(v_now, v_steady, p_limit);
    perform brightrun._run_schedules(v_now);
    perform brightrun._move(v_now);
    perform brightrun._stop_overspent(v_now);
    for v_lease in
        select * from brightrun.lease
        where expires_at <= v_now and (v_steady <= v_now - lease_for or deadline_at <= v_now)
        order by expires_at limit p_limit
        for update skip locked
    loop
        v_error := case when v_lease.deadline_at <= v_now and brightrun._spent(v_lease, v_lease.deadline_at + interval '1 millisecond')
                             >= (select budget from brightrun.job where id = v_lease.job_id)
            then pg_catalog.jsonb_build_object('code', 'QUEUE_BUDGET_EXCEEDED', 'blame', 'user',
                'message', pg_catalog.format('the job has used up its budget of %s',
                                             (select budget from brightrun.job where id = v_lease.job_id)))
            when v_lease.deadline_at <= v_now and v_lease.price_per_hour is not null
                 and brightrun._overspent(array(select owner from brightrun.job where id = v_lease.job_id), v_now) <> '{}'
            then brightrun._budget_error((select owner from brightrun.job where id = v_lease.job_id))
            when v_lease.deadline_at <= v_now
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
    perform brightrun._tend_marks(v_now);
end
$$;

-- The numbers one field of a cron line means: `*`, `5`, `1-5`, `*/15`, `8-18/2`, and lists of these.
create or replace function brightrun._cron_field(p_field text, p_low integer, p_high integer) returns integer[]
language plpgsql immutable set search_path = '' as $$
declare
    v_part   text;
    v_match  text[];
    v_from   integer;
    v_to     integer;
    v_all    integer[] := '{}';
begin
    foreach v_part in array pg_catalog.string_to_array(p_field, ',') loop
        v_match := pg_catalog.regexp_match(v_part, '^(?:(\*)|(\d{1,2})(?:-(\d{1,2}))?)(?:/(\d{1,2}))?$');
        v_from := coalesce(v_match[2]::integer, p_low);
        v_to := coalesce(v_match[3]::integer, case when v_match[2] is null or v_match[4] is not null then p_high else v_from end);
        if v_match is null or v_from < p_low or v_to > p_high or v_from > v_to or v_match[4]::integer = 0 then
            raise exception '`%` is no field of a cron line between % and %', p_field, p_low, p_high using errcode = '22023';
        end if;
        v_all := v_all || array(select pg_catalog.generate_series(v_from, v_to, coalesce(v_match[4]::integer, 1)));
    end loop;
    return array(select distinct number from pg_catalog.unnest(v_all) as number order by 1);
end
$$;

-- The first minute after p_after that a cron line (minute hour day month weekday; 0 and 7 are Sunday) names, by the clocks of a time
-- zone. As in cron, day and weekday are alternatives when both are given. A minute that a change of clocks skips is skipped.
create or replace function brightrun.cron_next(p_cron text, p_after timestamptz, p_time_zone text default 'UTC') returns timestamptz
language plpgsql stable set search_path = '' as $$
declare
    v_fields   text[] := pg_catalog.regexp_split_to_array(pg_catalog.btrim(p_cron), '\s+');
    v_minutes  integer[];
    v_hours    integer[];
    v_days     integer[];
    v_months   integer[];
    v_weekdays integer[];
    v_local    timestamp := p_after at time zone p_time_zone;
    v_day      date;
    v_found    timestamptz;
begin
    if pg_catalog.cardinality(v_fields) <> 5 then
        raise exception 'a cron line has five fields: `%`', p_cron using errcode = '22023';
    end if;
    v_minutes := brightrun._cron_field(v_fields[1], 0, 59);
    v_hours := brightrun._cron_field(v_fields[2], 0, 23);
    v_days := brightrun._cron_field(v_fields[3], 1, 31);
    v_months := brightrun._cron_field(v_fields[4], 1, 12);
    v_weekdays := array(select distinct number % 7 from pg_catalog.unnest(brightrun._cron_field(v_fields[5], 0, 7)) as number);
    for v_ahead in 0 .. 366 * 8 loop
        v_day := v_local::date + v_ahead;
        continue when not extract(month from v_day)::integer = any (v_months);
        continue when not case
            when v_fields[3] like '*%' or v_fields[5] like '*%'
            then extract(day from v_day)::integer = any (v_days) and extract(dow from v_day)::integer = any (v_weekdays)
            else extract(day from v_day)::integer = any (v_days) or extract(dow from v_day)::integer = any (v_weekdays) end;
        select min(moment.at) into v_found
        from pg_catalog.unnest(v_hours) as hour, pg_catalog.unnest(v_minutes) as minute,
             lateral (select v_day + pg_catalog.make_time(hour, minute, 0) as wanted) clock,
             lateral (select clock.wanted at time zone p_time_zone as at) moment
        where moment.at > p_after and moment.at at time zone p_time_zone = clock.wanted;
        if v_found is not null then
            return v_found;
        end if;
    end loop;
    raise exception 'the cron line `%` names no day of the next eight years', p_cron using errcode = '22023';
end
$$;

-- Makes or changes a recurring job. One of p_cron and p_every.
create or replace function brightrun.set_schedule(
    p_name text, p_kind text, p_payload jsonb default '{}', p_cron text default null, p_every interval default null,
    p_time_zone text default 'UTC', p_queue text default 'default', p_priority integer default 0, p_owner uuid default null,
    p_max_attempts integer default 3) returns timestamptz
language plpgsql volatile security definer set search_path = '' as $$
declare
    v_now  timestamptz := brightrun.now();
    v_next timestamptz := case when p_cron is not null then brightrun.cron_next(p_cron, v_now, p_time_zone) else v_now + p_every end;
begin
    insert into brightrun.schedule (name, kind, payload, queue, priority, owner, max_attempts, cron, every, time_zone, next_at)
    values (p_name, p_kind, p_payload, p_queue, p_priority, p_owner, p_max_attempts, p_cron, p_every, p_time_zone, v_next)
    on conflict (name) do update
    set kind = excluded.kind, payload = excluded.payload, queue = excluded.queue, priority = excluded.priority, owner = excluded.owner,
        max_attempts = excluded.max_attempts, cron = excluded.cron, every = excluded.every, time_zone = excluded.time_zone,
        next_at = excluded.next_at, paused = false;
    return v_next;
end
$$;

create or replace function brightrun.drop_schedule(p_name text) returns boolean
language plpgsql volatile security definer set search_path = '' as $$
begin
    delete from brightrun.schedule where name = p_name;
    return found;
end
$$;

-- Enqueues what is due. Part of every sweep, so no process need live for it. Times missed while nobody swept are made up by one job,
-- not by one each; the idempotency key makes two sweeps at once harmless. A schedule whose job cannot be enqueued is paused, not
-- allowed to stop the others.
create or replace function brightrun._run_schedules(p_now timestamptz) returns void
language plpgsql volatile set search_path = '' as $$
declare
    v_due brightrun.schedule;
begin
    for v_due in select * from brightrun.schedule where next_at <= p_now and not paused order by next_at limit 100 for update skip locked loop
        begin
            update brightrun.schedule
            set last_at = v_due.next_at,
                next_at = case when v_due.cron is not null then brightrun.cron_next(v_due.cron, p_now, v_due.time_zone)
                               else v_due.next_at + v_due.every * (1 + floor(extract(epoch from p_now - v_due.next_at)
                                                                            / extract(epoch from v_due.every))) end,
                last_job_id = brightrun.enqueue(v_due.kind, v_due.payload, p_queue => v_due.queue, p_priority => v_due.priority,
                    p_owner => v_due.owner, p_max_attempts => v_due.max_attempts, p_notify => true,
                    p_idempotency_key => v_due.name || '@' || pg_catalog.to_char(v_due.next_at at time zone 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS"Z"'))
            where name = v_due.name;
        exception when others then
            update brightrun.schedule set paused = true where name = v_due.name;
            raise warning 'schedule % is paused: %', v_due.name, sqlerrm;
        end;
    end loop;
end
$$;

-- Priorities with age: one better for each full age_step of waiting.
create or replace function brightrun._age(p_now timestamptz) returns void
language plpgsql volatile set search_path = '' as $$
begin
    if not exists (select from brightrun.job_kind where age_step is not null) then
        return;
    end if;
    with older as materialized (
        select ready.job_id, gained.steps
        from brightrun.ready
        join brightrun.job_kind on job_kind.kind = ready.kind and job_kind.age_step is not null,
             lateral (select least(floor(extract(epoch from p_now - ready.run_at) / extract(epoch from age_step)), age_most)::integer
                      as steps) gained
        where ready.ready_seq is not null and gained.steps > ready.aged
        limit 1000 for update of ready skip locked
    )
    update brightrun.ready set priority = greatest(priority - (older.steps - aged), -32768), aged = older.steps
    from older where ready.job_id = older.job_id;
end
$$;

-- Jobs that have waited long enough for the machines they prefer are content with more.
create or replace function brightrun._widen(p_now timestamptz) returns void
language plpgsql volatile set search_path = '' as $$
begin
    if not exists (select from brightrun.requirement where widens_to is not null) then
        return;
    end if;
    with content as materialized (
        select ready.job_id, requirement.widens_to
        from brightrun.ready join brightrun.requirement on requirement.id = ready.requirement_id and widens_to is not null
        where ready.ready_seq is not null and ready.run_at <= p_now - widens_after
        limit 1000 for update of ready skip locked
    )
    update brightrun.ready set requirement_id = content.widens_to from content where ready.job_id = content.job_id;
    if found then
        perform pg_catalog.pg_notify('brightrun_ready', '');
    end if;
end
$$;

-- Both. Somebody who moves rows by hand may have a mark locked that these want to lower; a sweep does not fail of that, it tries again.
create or replace function brightrun._move(p_now timestamptz) returns void
language plpgsql volatile set search_path = '' as $$
begin
    perform brightrun._age(p_now);
    perform brightrun._widen(p_now);
exception when lock_not_available then
    null;
end
$$;

-- What pg_cron calls each minute where a project has it, so that recurring jobs come into being and history gets its partitions while
-- no process of ours lives. It judges no lease: whoever lives inside the database cannot know who is only cut off from it.
create or replace function brightrun.tick() returns jsonb
language plpgsql volatile security definer set search_path = '' set lock_timeout = '2s' as $$
declare
    v_now timestamptz := brightrun.now();
begin
    perform brightrun._run_schedules(v_now);
    perform brightrun._move(v_now);
    perform brightrun._promote(v_now);
    perform brightrun._knock(v_now);
    if pg_catalog.to_regclass('cron.job_run_details') is not null then
        -- pg_cron keeps its history for ever.
        execute 'delete from cron.job_run_details where end_time < $1 and jobid in (select jobid from cron.job where jobname = ''brightrun-tick'')'
            using v_now - interval '1 day';
    end if;
    return brightrun.maintain();
end
$$;

-- Tells a process that sleeps outside (an endpoint scaled to zero, say) that jobs wait and nobody has swept for a minute. By pg_net, so
-- after the commit, at most once and without a promise: whoever is told looks for himself.
create or replace function brightrun._knock(p_now timestamptz) returns void
language plpgsql volatile set search_path = '' as $$
declare
    v_url     text;
    v_waiting bigint;
begin
    select wake_url into v_url from brightrun.housekeeping
    where wake_url is not null and coalesce(last_sweep_at, '-infinity') < p_now - interval '1 minute';
    if not found or not exists (select from pg_catalog.pg_proc where proname = 'http_post'
                                and pronamespace = pg_catalog.to_regnamespace('net')) then
        return;
    end if;
    select count(*) into v_waiting from (select from brightrun.ready where ready_seq is not null limit 1000) waiting;
    if v_waiting > 0 then
        execute 'select net.http_post(url := $1, body := $2)'
            using v_url, pg_catalog.jsonb_build_object('type', 'jobs_waiting', 'waiting', v_waiting);
    end if;
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
    -- A mark that nobody moves spares nothing; where its group is in use a claim makes it again.
    delete from brightrun.mark where (queue, kind, requirement_id, priority) in (
        select queue, kind, requirement_id, priority from brightrun.mark
        where moved_at < brightrun.now() - interval '1 day' limit p_limit for update skip locked);
    return v_count;
end
$$;

-- --- The interface: lanes ---------------------------------------------------------------------------------------------
-- A lane is a queue for jobs of milliseconds, where the job engine above would cost more than the work. What it keeps: leases,
-- a fencing token on every write, retries with backoff, dead letters, no declared death before a full lease. What it drops:
-- history, results, status by id, priorities, cancels, limits, projectors. Order is the order of becoming ready.

-- Where a lane differs from the defaults it has a row of brightrun.brief_lane.
create or replace function brightrun._brief_lane(p_lane text) returns brightrun.brief_lane
language plpgsql stable set search_path = '' as $$
declare
    v_lane brightrun.brief_lane;
begin
    select * into v_lane from brightrun.brief_lane where lane = p_lane;
    if not found then
        v_lane := row(p_lane, 5, interval '1 second', interval '10 minutes', false);
    end if;
    return v_lane;
end
$$;

-- Adds jobs, in one statement however many; returns their ids in order.
create or replace function brightrun.brief_push(p_lane text, p_payloads jsonb[], p_delay interval default null,
                                                p_notify boolean default false) returns bigint[]
language plpgsql volatile security definer set search_path = '' set plan_cache_mode = force_generic_plan as $$
declare
    v_due timestamptz := case when p_delay > interval '0' then brightrun.now() + p_delay end;
    v_ids bigint[];
begin
    with pushed as (
        insert into brightrun.brief (lane, seq, id, due_at, payload)
        select p_lane, seq, seq, v_due, payload
        from (select pg_catalog.nextval('brightrun.brief_seq') as seq, payload
              from pg_catalog.unnest(p_payloads) as payload offset 0) given
        returning id
    )
    select pg_catalog.array_agg(id) into v_ids from pushed;
    if p_notify then
        perform pg_catalog.pg_notify('brightrun_ready', '');
    end if;
    return coalesce(v_ids, '{}');
end
$$;

-- Up to p_limit jobs as one batch under one token: no row if there is none. p_after is a lower bound on their places in the lane
-- that the caller knows from its last claim. It spares the scan the index entries of jobs that are gone, which nobody may clean up
-- while an old snapshot is held anywhere. What is below it (a transaction that committed late) is found by a claim with 0, which
-- a worker makes whenever a bounded one finds nothing, and now and then in any case.
create or replace function brightrun.brief_claim(p_worker text, p_lane text, p_limit integer default 100,
                                                 p_lease interval default interval '1 minute', p_after bigint default 0)
returns table (token bigint, lease_seconds float8, last_seq bigint, ids bigint[], attempts smallint[], payloads jsonb[])
language plpgsql volatile security definer set search_path = '' set plan_cache_mode = force_generic_plan set enable_seqscan = off as $$
#variable_conflict use_column
declare
    v_now timestamptz := brightrun.now();
begin
    if exists (select from brightrun.brief_lane where lane = p_lane and paused) then
        return;
    end if;
    if exists (select from brightrun.brief where due_at <= v_now) then
        with due as materialized (
            select ctid as place from brightrun.brief where due_at <= v_now order by due_at limit 500 for update skip locked
        )
        update brightrun.brief set due_at = null, seq = pg_catalog.nextval('brightrun.brief_seq')
        where ctid = any (array(select place from due));
    end if;
    with taken as (
        delete from brightrun.brief where ctid = any (array(
            select ctid from brightrun.brief
            where lane = p_lane and due_at is null and seq >= p_after
            order by seq limit least(p_limit, 10000)
            for update skip locked))
        returning id, seq, attempt, payload
    )
    select pg_catalog.max(seq), pg_catalog.array_agg(id), pg_catalog.array_agg((attempt + 1)::smallint), pg_catalog.array_agg(payload)
    into last_seq, ids, attempts, payloads
    from (select * from taken order by seq) ordered;
    if ids is null then
        return;
    end if;
    insert into brightrun.brief_batch (lane, worker, lease_for, expires_at, ended, ids, attempts, payloads)
    values (p_lane, p_worker, p_lease, v_now + p_lease, pg_catalog.repeat('0', pg_catalog.cardinality(ids))::bit varying, ids,
            attempts, payloads)
    returning brief_batch.token into token;
    lease_seconds := extract(epoch from p_lease);
    return next;
end
$$;

-- Puts the jobs at some places of a batch back, or among the dead. The caller holds the batch's row.
create or replace function brightrun._brief_fail(p_batch brightrun.brief_batch, p_places integer[], p_errors jsonb[],
                                                 p_retry_after interval) returns void
language plpgsql volatile set search_path = '' as $$
declare
    v_now  timestamptz := brightrun.now();
    v_lane brightrun.brief_lane := brightrun._brief_lane(p_batch.lane);
begin
    with failed as (
        select p_batch.ids[place] as id, p_batch.attempts[place] as attempt, p_batch.payloads[place] as payload, error,
               p_batch.attempts[place] >= v_lane.max_attempts or error ->> 'blame' = 'user' as is_last
        from rows from (pg_catalog.unnest(p_places), pg_catalog.unnest(p_errors)) as given (place, error)
    ), dead as (
        insert into brightrun.brief_dead (id, lane, attempt, payload, error, died_at)
        select id, p_batch.lane, attempt, payload, error, v_now from failed where is_last
    )
    insert into brightrun.brief (lane, id, attempt, due_at, payload)
    select p_batch.lane, id, attempt,
           v_now + coalesce(p_retry_after, brightrun.backoff(attempt, v_lane.retry_base, v_lane.retry_cap)), payload
    from failed where not is_last;
end
$$;

-- Ends jobs: one row each, in the order asked, telling whether it was accepted. p_places are places in the batch, from 1; an error
-- that is null means done. Accepted exactly if the token is of a batch that is still held and that place has not ended. So a
-- worker whose batch was taken away can end nothing, and asking twice ends nothing twice (the second answer is false).
create or replace function brightrun.brief_finish(p_tokens bigint[], p_places integer[], p_errors jsonb[] default null,
                                                  p_retry_after interval default null) returns boolean[]
language plpgsql volatile security definer set search_path = '' set plan_cache_mode = force_generic_plan as $$
declare
    v_batch    brightrun.brief_batch;
    v_accepted boolean[] := pg_catalog.array_fill(false, array[coalesce(pg_catalog.cardinality(p_tokens), 0)]);
    v_failed   integer[];
    v_errors   jsonb[];
    v_asked    integer[];
    v_place    integer;
    v_token    bigint;
begin
    for v_token in select distinct token from pg_catalog.unnest(p_tokens) as token order by token loop
        select * into v_batch from brightrun.brief_batch where token = v_token for update;
        continue when not found;
        v_failed := '{}';
        v_errors := '{}';
        v_asked := array(select place from pg_catalog.unnest(p_tokens) with ordinality as given (token, place) where token = v_token);
        foreach v_place in array v_asked loop
            continue when p_places[v_place] not between 1 and pg_catalog.length(v_batch.ended)
                or pg_catalog.get_bit(v_batch.ended, p_places[v_place] - 1) = 1;
            v_batch.ended := pg_catalog.set_bit(v_batch.ended, p_places[v_place] - 1, 1);
            v_accepted[v_place] := true;
            if p_errors[v_place] is not null then
                v_failed := v_failed || p_places[v_place];
                v_errors := v_errors || p_errors[v_place];
            end if;
        end loop;
        if v_failed <> '{}' then
            perform brightrun._brief_fail(v_batch, v_failed, v_errors, p_retry_after);
        end if;
        if pg_catalog.bit_count(v_batch.ended) = pg_catalog.length(v_batch.ended) then
            delete from brightrun.brief_batch where token = v_token;
        else
            update brightrun.brief_batch set ended = v_batch.ended where token = v_token;
        end if;
    end loop;
    return v_accepted;
end
$$;

-- Extends the leases of batches; returns, in order, whether each is still held.
create or replace function brightrun.brief_beat(p_tokens bigint[]) returns boolean[]
language plpgsql volatile security definer set search_path = '' set plan_cache_mode = force_generic_plan as $$
declare
    v_now timestamptz := brightrun.now();
begin
    with held as materialized (
        select token from brightrun.brief_batch where token = any (p_tokens) order by token for update skip locked
    )
    update brightrun.brief_batch set expires_at = v_now + lease_for from held where brief_batch.token = held.token;
    return array(select exists (select from brightrun.brief_batch where brief_batch.token = given.token)
                 from pg_catalog.unnest(p_tokens) with ordinality as given (token, place) order by place);
end
$$;

-- Gives back what of a batch has not ended, not counted as an attempt. Returns how many jobs that were.
create or replace function brightrun.brief_release(p_token bigint) returns integer
language plpgsql volatile security definer set search_path = '' as $$
declare
    v_batch brightrun.brief_batch;
    v_count integer;
begin
    select * into v_batch from brightrun.brief_batch where token = p_token for update;
    if not found then
        return 0;
    end if;
    insert into brightrun.brief (lane, id, attempt, payload)
    select v_batch.lane, v_batch.ids[place], v_batch.attempts[place] - 1, v_batch.payloads[place]
    from pg_catalog.generate_series(1, pg_catalog.length(v_batch.ended)) as place
    where pg_catalog.get_bit(v_batch.ended, place - 1) = 0;
    get diagnostics v_count = row_count;
    delete from brightrun.brief_batch where token = p_token;
    perform pg_catalog.pg_notify('brightrun_ready', '');
    return v_count;
end
$$;

-- Expired batches, by the rule of rescue_expired: an attempt is used up, for the work may have been what killed the worker.
create or replace function brightrun._brief_rescue(p_now timestamptz, p_steady timestamptz, p_limit integer) returns void
language plpgsql volatile set search_path = '' as $$
declare
    v_batch  brightrun.brief_batch;
    v_places integer[];
    v_error  jsonb;
begin
    for v_batch in
        select * from brightrun.brief_batch where expires_at <= p_now and p_steady <= p_now - lease_for
        order by expires_at limit p_limit for update skip locked
    loop
        v_places := array(select place from pg_catalog.generate_series(1, pg_catalog.length(v_batch.ended)) as place
                          where pg_catalog.get_bit(v_batch.ended, place - 1) = 0);
        v_error := pg_catalog.jsonb_build_object('code', 'QUEUE_LEASE_EXPIRED', 'blame', 'platform',
            'message', pg_catalog.format('worker %s has not been heard of for %s', v_batch.worker, v_batch.lease_for));
        perform brightrun._brief_fail(v_batch, v_places, pg_catalog.array_fill(v_error, array[pg_catalog.cardinality(v_places)]), null);
        delete from brightrun.brief_batch where token = v_batch.token;
    end loop;
end
$$;

-- Dead jobs of a lane get a fresh set of attempts. Returns how many.
create or replace function brightrun.brief_redrive(p_lane text, p_limit integer default 1000) returns integer
language plpgsql volatile security definer set search_path = '' as $$
declare
    v_count integer;
begin
    with revived as (
        delete from brightrun.brief_dead where id = any (array(
            select id from brightrun.brief_dead where lane = p_lane order by id limit p_limit for update skip locked))
        returning lane, id, payload
    )
    insert into brightrun.brief (lane, id, payload) select lane, id, payload from revived;
    get diagnostics v_count = row_count;
    return v_count;
end
$$;

-- Counts by lane. Waiting jobs are counted row by row: not for every second.
create or replace function brightrun.brief_stats()
returns table (lane text, ready bigint, scheduled bigint, running bigint, expired bigint, dead bigint)
language sql stable security definer set search_path = '' as $$
    select counted.lane, sum(ready)::bigint, sum(scheduled)::bigint, sum(running)::bigint, sum(expired)::bigint, sum(dead)::bigint
    from (
        select lane, count(*) filter (where due_at is null) as ready, count(due_at) as scheduled, 0 as running, 0 as expired, 0 as dead
        from brightrun.brief group by lane
        union all
        select lane, 0, 0, pg_catalog.length(ended) - pg_catalog.bit_count(ended),
               case when expires_at <= brightrun.now() then pg_catalog.length(ended) - pg_catalog.bit_count(ended) else 0 end, 0
        from brightrun.brief_batch
        union all
        select lane, 0, 0, 0, 0, count(*) from brightrun.brief_dead group by lane
    ) counted
    group by counted.lane order by counted.lane
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

-- --- The interface: operating ----------------------------------------------------------------------------------------

-- No claim takes anything from a paused queue; what runs goes on. Returns how many jobs that are: a drained queue has none.
create or replace function brightrun.pause(p_queue text default 'default', p_reason text default null) returns integer
language plpgsql volatile security definer set search_path = '' as $$
begin
    insert into brightrun.queue_setting (queue, paused, reason, changed_at) values (p_queue, true, p_reason, brightrun.now())
    on conflict (queue) do update set paused = true, reason = excluded.reason, changed_at = excluded.changed_at;
    return (select count(*) from brightrun.lease where queue = p_queue);
end
$$;

create or replace function brightrun.resume(p_queue text default 'default') returns boolean
language plpgsql volatile security definer set search_path = '' as $$
begin
    update brightrun.queue_setting set paused = false, changed_at = brightrun.now() where queue = p_queue and paused;
    if not found then
        return false;
    end if;
    perform pg_catalog.pg_notify('brightrun_ready', '');
    return true;
end
$$;

-- Redrives failed jobs of a kind, of one error code if given, newest first. Returns how many; call again for more.
create or replace function brightrun.redrive_many(p_kind text, p_code text default null, p_limit integer default 100) returns integer
language plpgsql volatile security definer set search_path = '' as $$
declare
    v_job   uuid;
    v_count integer := 0;
begin
    for v_job in
        select id from brightrun.job where kind = p_kind and outcome = 'failed' and (p_code is null or error ->> 'code' = p_code)
        order by created_at desc limit p_limit for update skip locked
    loop
        v_count := v_count + (brightrun.redrive(v_job, 'redriven with others') is not null)::integer;
    end loop;
    return v_count;
end
$$;

-- Cancels jobs of a kind that wait or run, of one owner if given. Returns how many; call again for more.
create or replace function brightrun.cancel_many(p_kind text, p_owner uuid default null, p_reason text default null,
                                                 p_limit integer default 100) returns integer
language plpgsql volatile security definer set search_path = '' as $$
declare
    v_job   uuid;
    v_count integer := 0;
begin
    for v_job in
        select live.job_id from (select job_id from brightrun.ready where kind = p_kind
                                 union all select job_id from brightrun.lease where kind = p_kind) live
        join brightrun.job on job.id = live.job_id
        where job.cancel_requested_at is null and (p_owner is null or job.owner = p_owner)
        order by live.job_id limit p_limit
    loop
        v_count := v_count + (brightrun.cancel(v_job, p_reason) in ('cancelled', 'cancel_requested'))::integer;
    end loop;
    return v_count;
end
$$;

-- How many jobs of an owner or of a concurrency key may run at once (null: any number), and an owner's weight when turns are taken.
-- The name '*' is what owners and keys that are not known yet will start with.
create or replace function brightrun.set_limit(p_scope text, p_name text, p_at_most integer, p_weight float8 default 1) returns void
language sql volatile security definer set search_path = '' as $$
    insert into brightrun.limit_rule (scope, name, at_most, weight) values (p_scope, p_name, p_at_most, p_weight)
    on conflict (scope, name) do update set at_most = excluded.at_most, weight = excluded.weight
$$;

-- How many jobs of an owner, of a concurrency key or of a queue may start in a stretch of time, or how often take_rate() may be granted
-- (scope `api`). Null: any number. The name '*' is what owners and keys that are not known yet will start with.
create or replace function brightrun.set_rate(p_scope text, p_name text, p_starts integer, p_per interval default interval '1 minute')
returns void
language sql volatile security definer set search_path = '' as $$
    insert into brightrun.limit_rule (scope, name, at_most, starts_most, starts_per, tokens)
    select p_scope, p_name,
           case when p_scope = 'key' then coalesce((select at_most from brightrun.limit_rule where scope = 'key' and name = '*'), 1)
                when p_scope = 'owner' then (select at_most from brightrun.limit_rule where scope = 'owner' and name = '*') end,
           p_starts, case when p_starts is not null then p_per end, coalesce(p_starts, 0)
    on conflict (scope, name) do update
    set starts_most = excluded.starts_most, starts_per = excluded.starts_per, tokens = excluded.tokens, filled_at = brightrun.now()
$$;

-- Asks to do something that somebody counts (a provider's API, say) p_count times: 0 means go on, it is counted; otherwise ask again
-- after so many seconds. A name without a rate is never counted.
create or replace function brightrun.take_rate(p_name text, p_count integer default 1) returns float8
language plpgsql volatile security definer set search_path = '' as $$
declare
    v_now    timestamptz := brightrun.now();
    v_rule   brightrun.limit_rule;
    v_tokens float8;
begin
    select * into v_rule from brightrun.limit_rule where scope = 'api' and name = p_name and starts_most is not null for no key update;
    if not found then
        return 0;
    elsif p_count > v_rule.starts_most then
        raise exception 'the rate of % never allows % at once', p_name, p_count using errcode = '22023';
    end if;
    v_tokens := brightrun._tokens(v_rule, v_now);
    if v_tokens >= p_count then
        perform brightrun._take_tokens('api', p_name, p_count, v_now);
        return 0;
    end if;
    return (p_count - v_tokens) * extract(epoch from v_rule.starts_per) / v_rule.starts_most;
end
$$;

-- What all jobs of an owner may cost: for good, or in each 'day', 'week' or 'month' (UTC). Null: as much as they like. Where it is used
-- up nothing of his is claimed, and a sweep stops what runs: QUEUE_OWNER_BUDGET_EXCEEDED.
create or replace function brightrun.set_budget(p_owner uuid, p_budget numeric, p_period text default null) returns void
language plpgsql volatile security definer set search_path = '' as $$
begin
    if p_budget is null then
        delete from brightrun.account where owner = p_owner;
    else
        insert into brightrun.account (owner, budget, period) values (p_owner, p_budget, p_period)
        on conflict (owner) do update set budget = excluded.budget, period = excluded.period;
    end if;
end
$$;

-- What an owner has spent of it; no row: he has no budget.
create or replace function brightrun.budget(p_owner uuid)
returns table (budget numeric, period text, since timestamptz, spent numeric)
language sql stable security definer set search_path = '' as $$
    select account.budget, account.period, nullif(began.at, '-infinity'), brightrun._owner_spent(owner, began.at, clock.now)
    from brightrun.account cross join (select brightrun.now() as now offset 0) clock,
         lateral (select brightrun._period_began(account.period, clock.now) as at) began
    where owner = p_owner
$$;

-- The runs that have gone on longest, with how long ago they were heard of.
create or replace function brightrun.top(p_limit integer default 20)
returns table (job_id uuid, kind text, queue text, worker text, attempt integer, running_seconds float8, beat_seconds float8,
               lease_seconds float8, progress jsonb)
language sql stable security definer set search_path = '' as $$
    select job_id, kind, queue, worker, attempt::integer, extract(epoch from clock.now - claimed_at)::float8,
           extract(epoch from clock.now - beat_at)::float8, extract(epoch from expires_at - clock.now)::float8, progress
    from brightrun.lease cross join (select brightrun.now() as now offset 0) clock
    order by claimed_at limit p_limit
$$;

-- Why a job is not running, in sentences; the first is the reason if there is one.
create or replace function brightrun.explain(p_job_id uuid) returns setof text
language plpgsql stable security definer set search_path = '' as $$
declare
    v_job    brightrun.job_status;
    v_ready  brightrun.ready;
    v_need   brightrun.requirement;
    v_share  brightrun.share;
    v_rule   brightrun.limit_rule;
    v_count  bigint;
    v_recent bigint;
    v_waits  record;
begin
    select * into v_job from brightrun.job_status where id = p_job_id;
    if not found then
        return next pg_catalog.format('There is no job %s; it may have been pruned.', p_job_id);
        return;
    end if;
    if v_job.state in ('completed', 'failed', 'cancelled') then
        return next pg_catalog.format('It is %s since %s%s.', v_job.state, v_job.finished_at,
            coalesce(': ' || coalesce(v_job.error ->> 'message', v_job.cancel_reason), ''));
        return;
    elsif v_job.state = 'running' then
        return next pg_catalog.format('It runs in attempt %s of %s on %s; its lease lasts until %s.', v_job.attempt, v_job.max_attempts,
                                      v_job.worker, v_job.expires_at);
        if v_job.cancel_requested_at is not null then
            return next pg_catalog.format('A cancel was asked for at %s; its worker hears of it with its next heartbeat.', v_job.cancel_requested_at);
        end if;
        return;
    end if;
    if exists (select from brightrun.queue_setting where queue = v_job.queue and paused) then
        return next pg_catalog.format('The queue `%s` is paused%s.', v_job.queue,
            coalesce(': ' || (select reason from brightrun.queue_setting where queue = v_job.queue), ''));
    end if;
    for v_waits in
        select after_id, state from brightrun.dependency join brightrun.job_status on job_status.id = after_id
        where dependency.job_id = p_job_id and state not in ('completed')
    loop
        return next pg_catalog.format('It waits for job %s, which is %s.', v_waits.after_id, v_waits.state);
    end loop;
    select * into v_ready from brightrun.ready where job_id = p_job_id;
    if brightrun._overspent(array[v_job.owner], brightrun.now()) <> '{}' then
        return next 'Its owner''s money is gone: ' || (brightrun._budget_error(v_job.owner) ->> 'message') || '.';
    end if;
    if v_job.state = 'scheduled' and v_ready.run_at < brightrun.now() + interval '50 years' then
        return next pg_catalog.format('Its time is %s%s.', v_ready.run_at,
            coalesce(', after attempt ' || v_ready.attempt || ' failed: ' || (v_ready.last_error ->> 'message'), ''));
    end if;
    select * into v_share from brightrun.share where id = v_ready.share_id;
    if found then
        for v_rule in select * from brightrun.limit_rule where at_most is not null
                and ((scope = 'key' and name = v_share.key) or (scope = 'owner' and name = v_share.owner::text)) loop
            select count(*) into v_count from brightrun.lease join brightrun.share on share.id = lease.share_id
            where case v_rule.scope when 'key' then share.key = v_share.key else share.owner = v_share.owner end;
            if v_count >= v_rule.at_most then
                return next pg_catalog.format('The %s `%s` runs %s jobs and may run %s.', v_rule.scope, v_rule.name, v_count, v_rule.at_most);
            end if;
        end loop;
    end if;
    for v_rule in select * from brightrun.limit_rule where starts_most is not null
            and ((scope = 'key' and name = v_share.key) or (scope = 'owner' and name = v_share.owner::text)
                 or (scope = 'queue' and name = v_job.queue)) loop
        if brightrun._tokens(v_rule, brightrun.now()) < 1 then
            return next pg_catalog.format('The %s `%s` may start %s jobs in %s and has done so.', v_rule.scope, v_rule.name,
                                          v_rule.starts_most, v_rule.starts_per);
        end if;
    end loop;
    select * into v_need from brightrun.requirement where id = v_ready.requirement_id and id <> 0;
    if found then
        return next pg_catalog.format('It needs a machine with %s', pg_catalog.concat_ws(', ',
            nullif(v_need.vram_mb, 0) || ' MB of GPU memory', nullif(v_need.gpu_count, 0) || ' GPUs',
            'class ' || pg_catalog.array_to_string(v_need.gpu_classes, ' or '), 'a price of at most ' || v_need.max_price))
            || coalesce(', and is content with more after ' || v_need.widens_after, '') || '.';
    end if;
    if v_ready.ready_seq is not null then
        select count(*) into v_count from (select from brightrun.ready
            where queue = v_ready.queue and kind = v_ready.kind and ready_seq is not null
              and (priority, ready_seq) < (v_ready.priority, v_ready.ready_seq) limit 10000) before;
        return next pg_catalog.format('%s jobs of its kind are before it, and %s run; it became ready %s ago.', v_count,
            (select count(*) from brightrun.lease where queue = v_ready.queue and kind = v_ready.kind),
            pg_catalog.date_trunc('second', brightrun.now() - v_ready.run_at));
        -- An estimate for people; nothing is decided by it.
        select nullif(count(*), 0) into v_recent from brightrun.event join brightrun.job on job.id = event.job_id
        where event.at > brightrun.now() - interval '1 hour' and event.event in ('claimed', 'resumed') and job.kind = v_job.kind;
        if v_recent is not null then
            return next pg_catalog.format('In the last hour %s of its kind were started; at that rate its turn comes in about %s.', v_recent,
                pg_catalog.date_trunc('second', (v_count + 1) * interval '1 hour' / v_recent));
        end if;
    end if;
end
$$;

-- Failures and claim waits of a stretch of time, from the history.
create or replace function brightrun._recent(p_since interval)
returns table (kind text, code text, failures bigint, ends bigint)
language sql stable set search_path = '' as $$
    select job.kind, case when event.event = 'failed' then coalesce(event.detail ->> 'code', '') end, 
           count(*) filter (where event.event = 'failed'), count(*)
    from brightrun.event join brightrun.job on job.id = event.job_id
    where event.at > brightrun.now() - p_since and event.event in ('completed', 'failed')
    group by 1, 2
$$;

-- The engine in the words of Prometheus. Reads the two small tables and one hour of history: for a scrape every 15 s or slower.
create or replace function brightrun.metrics() returns text
language sql stable security definer set search_path = '' as $$
    with clock as materialized (select brightrun.now() as now),
    lines (place, name, help, type, labels, value) as (
        select 1, 'brightrun_queue_jobs', 'Jobs by state', 'gauge',
               pg_catalog.format('queue=%s,kind=%s,state="%s"', pg_catalog.to_json(queue), pg_catalog.to_json(kind), state.name), state.count::float8
        from brightrun.stats() cross join lateral (values ('ready', ready), ('scheduled', scheduled), ('running', running)) state (name, count)
        union all
        select 2, 'brightrun_queue_oldest_ready_seconds', 'Age of the job that has waited longest', 'gauge',
               pg_catalog.format('queue=%s,kind=%s', pg_catalog.to_json(queue), pg_catalog.to_json(kind)), oldest_ready_seconds
        from brightrun.stats() where oldest_ready_seconds is not null
        union all
        select 3, 'brightrun_queue_expired_leases', 'Running jobs whose lease has expired', 'gauge',
               pg_catalog.format('queue=%s,kind=%s', pg_catalog.to_json(queue), pg_catalog.to_json(kind)), expired::float8
        from brightrun.stats()
        union all
        select 3, 'brightrun_queue_lease_expiry_lag_seconds', 'How long the lease that expired first has waited for a sweep', 'gauge', null,
               coalesce(max(extract(epoch from clock.now - expires_at)) filter (where expires_at <= clock.now), 0)::float8
        from clock left join brightrun.lease on true
        union all
        select 4, 'brightrun_queue_claim_wait_seconds', 'Wait from ready to first claim, last hour', 'gauge',
               pg_catalog.format('kind=%s,quantile="%s"', pg_catalog.to_json(waits.kind), quantile),
               percentile_cont(quantile) within group (order by waits.seconds)
        from (select job.kind, extract(epoch from event.at - job.run_at)::float8 as seconds
              from brightrun.event join brightrun.job on job.id = event.job_id cross join clock
              where event.at > clock.now - interval '1 hour' and event.event = 'claimed' limit 10000) waits
             cross join (values (0.5::float8), (0.99::float8)) as wanted (quantile)
        group by waits.kind, quantile
        union all
        select 5, 'brightrun_queue_failures_last_hour', 'Jobs that failed for good, by code, last hour', 'gauge',
               pg_catalog.format('kind=%s,code=%s', pg_catalog.to_json(kind), pg_catalog.to_json(code)), failures::float8
        from brightrun._recent(interval '1 hour') where code is not null
        union all
        select 5, 'brightrun_queue_ends_last_hour', 'Jobs that completed or failed for good, last hour', 'gauge',
               pg_catalog.format('kind=%s,outcome="%s"', pg_catalog.to_json(kind), outcome.name), sum(outcome.count)::float8
        from brightrun._recent(interval '1 hour')
             cross join lateral (values ('completed', ends - failures), ('failed', failures)) outcome (name, count)
        group by kind, outcome.name
        union all
        select 6, 'brightrun_queue_lane_jobs', 'Claimed jobs of lanes', 'gauge', pg_catalog.format('lane=%s', pg_catalog.to_json(lane)),
               sum(pg_catalog.length(ended) - pg_catalog.bit_count(ended))::float8
        from brightrun.brief_batch group by lane
        union all
        select 7, 'brightrun_queue_outbox_messages', 'Messages not delivered yet', 'gauge',
               pg_catalog.format('topic=%s,dead="%s"', pg_catalog.to_json(topic), dead_at is not null), count(*)::float8
        from brightrun.outbox group by topic, dead_at is not null
        union all
        select 8, 'brightrun_queue_paused', 'Queues that are paused', 'gauge', pg_catalog.format('queue=%s', pg_catalog.to_json(queue)), 1
        from brightrun.queue_setting where paused
        union all
        select 9, 'brightrun_queue_sweep_age_seconds', 'Time since leases were last swept', 'gauge', null,
               extract(epoch from clock.now - last_sweep_at)::float8
        from brightrun.housekeeping cross join clock where last_sweep_at is not null
        union all
        select 11, 'brightrun_queue_unsettled_places', 'Places in the queue drawn since the last that all marks may pass', 'gauge', null,
               (coalesce(pg_catalog.pg_sequence_last_value('brightrun.ready_seq'), 0) - settled)::float8 from brightrun.settling
        union all
        select 12, 'brightrun_queue_strays_total', 'Waiting jobs found below the mark where claims begin', 'counter', null, strays::float8
        from brightrun.settling
        union all
        select 10, 'brightrun_queue_horizon_age_transactions', 'Transactions the oldest held snapshot is behind', 'gauge', null,
               coalesce(max(pg_catalog.age(backend_xmin)), 0)::float8
        from pg_catalog.pg_stat_activity
    )
    select coalesce(pg_catalog.string_agg(text, '' order by place, name), '') from (
        select place, name, pg_catalog.format(E'# HELP %s %s\n# TYPE %s %s\n', name, min(help), name, min(type))
            || pg_catalog.string_agg(name || coalesce('{' || labels || '}', '') || ' ' || value || E'\n', '' order by labels) as text
        from lines group by place, name
    ) families
$$;

-- What the owner wants to be woken for; no row: all is well.
create or replace function brightrun.alarms()
returns table (alarm text, message text, hint text)
language sql stable security definer set search_path = '' as $$
    with clock as materialized (select brightrun.now() as now), waiting as materialized (
        select ready.kind, ready.run_at, row_number() over (partition by ready.kind order by ready.run_at) as place
        from brightrun.ready cross join clock where ready_seq is not null
    )
    -- More than 50 waiting, and for half an hour: the fifty-first has waited that long.
    select 'queue_depth', pg_catalog.format('more than 50 jobs of kind %s have been waiting for half an hour', kind),
           'Start more workers, or see brightrun.explain() of the oldest.'
    from waiting cross join clock where place = 51 and run_at < clock.now - interval '30 minutes'
    union all
    select 'queue_age', pg_catalog.format('a job of kind %s has been waiting since %s', kind, run_at),
           'See brightrun.explain() of it: no worker, a limit, a paused queue, or a machine nobody has.'
    from waiting cross join clock where place = 1 and run_at < clock.now - interval '5 minutes'
    union all
    select 'failure_rate', pg_catalog.format('%s of the last day''s %s jobs of kind %s failed', sum(failures), sum(ends), kind),
           'See brightrun_queue_failures_last_hour by code, and brightrun.jobs().'
    from brightrun._recent(interval '24 hours') group by kind having sum(failures) > 0.2 * sum(ends) and sum(ends) >= 5
    union all
    select 'slow_validation', pg_catalog.format('job %s of kind %s has been running since %s', job_id, kind, claimed_at),
           'See its events; a data set that takes this long is too large or its storage is slow.'
    from brightrun.lease cross join clock where kind = 'validate_dataset' and claimed_at < clock.now - interval '5 minutes'
    union all
    select 'nobody_sweeps', pg_catalog.format('leases were last swept at %s', last_sweep_at), 'No worker runs, or none reaches the database.'
    from brightrun.housekeeping cross join clock
    where last_sweep_at < clock.now - interval '2 minutes' and exists (select from brightrun.lease)
$$;

-- Whether the engine is in good order. `ok` is null where it cannot be known.
create or replace function brightrun.doctor() returns table (item text, ok boolean, message text, hint text)
language sql stable security definer set search_path = '' as $$
    select 'one_baton', count(*) = 0, pg_catalog.format('%s jobs are not in exactly one place', count(*)),
           'Somebody wrote to the tables by hand: see brightrun.violations().' from brightrun.violations()
    union all
    select 'partitions', count(*) >= 2, pg_catalog.format('%s days of history are prepared ahead', count(*)),
           'Call brightrun.maintain(); every worker does.'
    from pg_catalog.pg_inherits join pg_catalog.pg_class on pg_class.oid = inhrelid
    where inhparent = 'brightrun.event'::regclass and relname ~ '^event_\d{4}_\d{2}_\d{2}$'
      and pg_catalog.to_date(pg_catalog.substr(relname, 7), 'YYYY_MM_DD') >= (brightrun.now() at time zone 'UTC')::date
    union all
    select 'sweeps', last_sweep_at > brightrun.now() - interval '2 minutes', 'leases were last swept at ' || last_sweep_at,
           'Start a worker: each of them sweeps.' from brightrun.housekeeping
    union all
    select 'old_snapshot', coalesce(max(brightrun.now() - xact_start), interval '0') < interval '10 minutes',
           pg_catalog.format('the oldest transaction of this server is %s old', pg_catalog.date_trunc('second', max(brightrun.now() - xact_start))),
           'While it is open nothing can be cleaned up: find it in pg_stat_activity.'
    from pg_catalog.pg_stat_activity where backend_xmin is not null
    union all
    select 'dead_rows:' || relname, n_dead_tup < 100000 + n_live_tup, pg_catalog.format('%s dead rows beside %s', n_dead_tup, n_live_tup),
           'VACUUM it, and see old_snapshot.'
    from pg_catalog.pg_stat_user_tables where schemaname = 'brightrun' and relname in ('ready', 'lease', 'job', 'brief', 'brief_batch')
    union all
    select 'projector:' || kind, pg_catalog.to_regprocedure(projector || '(uuid,text,jsonb)') is not null, projector,
           'Apply schema.sql again, or correct brightrun.job_kind.' from brightrun.job_kind where projector is not null
    union all
    select 'schedule:' || name, not paused, 'next at ' || next_at, 'Its job could not be enqueued: correct it with brightrun.set_schedule().'
    from brightrun.schedule
    union all
    select 'marks', strays = 0, pg_catalog.format('%s jobs were found below the mark where claims begin, and brought back', strays),
           'A mistake of the engine: keep the rows of brightrun.mark and brightrun.settling, and report it.' from brightrun.settling
    union all
    select 'dead_letters', count(*) = 0, pg_catalog.format('%s messages could not be delivered', count(*)), 'See brightrun.outbox where dead_at is set.'
    from brightrun.outbox where dead_at is not null
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
alter table brightrun.brief        enable row level security;
alter table brightrun.requirement  enable row level security;
alter table brightrun.mark         enable row level security;
alter table brightrun.settling     enable row level security;
alter table brightrun.share        enable row level security;
alter table brightrun.limit_rule   enable row level security;
alter table brightrun.queue_setting enable row level security;
alter table brightrun.account      enable row level security;
alter table brightrun.usage        enable row level security;
alter table brightrun.dependency   enable row level security;
alter table brightrun.live_key     enable row level security;
alter table brightrun.schedule     enable row level security;
alter table brightrun.brief_lane   enable row level security;
alter table brightrun.brief_batch  enable row level security;
alter table brightrun.brief_dead   enable row level security;

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
            'enqueue(text,jsonb,uuid,text,integer,uuid,text,integer,timestamptz,interval,interval,text,boolean,text,text,jsonb,uuid[],numeric,numeric)',
            'enqueue_many(text,jsonb[],text[],text,integer,uuid,integer,timestamptz,interval,interval,boolean)',
            'complete_many(uuid[],bigint[],jsonb[])',
            'brief_push(text,jsonb[],interval,boolean)', 'brief_claim(text,text,integer,interval,bigint)',
            'brief_finish(bigint[],integer[],jsonb[],interval)', 'brief_beat(bigint[])', 'brief_release(bigint)', 'brief_stats()',
            'brief_redrive(text,integer)',
            'cancel(uuid,text)', 'redrive(uuid,text)', 'set_external_id(uuid,text)',
            'claim(text,text[],integer,interval,text,jsonb)', 'claim_job(text,uuid,interval,jsonb)',
            'log(uuid,bigint,text,text,text,jsonb)', 'checkpoint(uuid,bigint,jsonb)', 'explain(uuid)', 'top(integer)', 'metrics()', 'alarms()',
            'doctor()', 'take_rate(text,integer)', 'budget(uuid)',
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
        grant execute on function brightrun.pause(text, text) to service_role;
        grant execute on function brightrun.resume(text) to service_role;
        grant execute on function brightrun.redrive_many(text, text, integer) to service_role;
        grant execute on function brightrun.set_limit(text, text, integer, float8) to service_role;
        grant execute on function brightrun.set_schedule(text, text, jsonb, text, interval, text, text, integer, uuid, integer) to service_role;
        grant execute on function brightrun.drop_schedule(text) to service_role;
        grant execute on function brightrun.cancel_many(text, uuid, text, integer) to service_role;
        grant execute on function brightrun.set_rate(text, text, integer, interval) to service_role;
        grant execute on function brightrun.set_budget(uuid, numeric, text) to service_role;
        grant execute on function brightrun.tick() to service_role;
        grant select on all tables in schema brightrun to service_role;
    end if;
end
$$;

select brightrun.maintain();

-- pg_cron, where this database has it and lets us.
do $$
begin
    if exists (select from pg_catalog.pg_proc where proname = 'schedule' and pronargs = 3
               and pronamespace = pg_catalog.to_regnamespace('cron')) then
        execute pg_catalog.format('select cron.schedule(%L, %L, %L)', 'brightrun-tick', '* * * * *', 'select brightrun.tick()');
    end if;
exception when others then
    raise notice 'pg_cron could not be told to call brightrun.tick(): %. It is not needed; every worker does the same.', sqlerrm;
end
$$;

insert into brightrun.version (section, version) values ('engine', 2)
on conflict (section) do update set version = excluded.version, applied_at = excluded.applied_at;
-- <<< engine

-- =====================================================================================================================
-- 4  PROJECTION: THE APP'S ROWS AND THE ENGINE'S JOBS
-- =====================================================================================================================
-- Downwards, triggers: an inserted training job becomes an engine job of kind `train` (with the same id), a dataset that
-- turns `validating` becomes one of kind `validate_dataset`, a status set to `cancelled` becomes a cancel request. All in
-- the app's own transaction: if it rolls back, nothing was asked.
--
-- Upwards, projectors: project_training_job and project_dataset_job are the only functions that write app rows. The
-- engine calls them inside each transition. What they promise:
--   * a row that is completed, failed or cancelled keeps its status (redrive, an operator's act, may reopen a failed one)
--   * progress never falls; progress and money are always finite numbers; text fits its column
--   * completed ⇒ model_artifacts, cost_records, both notifications and artifact_id were written in that transaction
--   * one cost record per job, whose amount equals final_cost; one job_started notification per job
--   * at most 100 metrics points per job, in order of steps, always with the first and the last
--
-- ## What `detail` carries, per event of kind `train`
-- Unknown keys and events are ignored; each key may be missing unless marked (!). Numbers must be JSON numbers: null,
-- strings and anything not finite are treated as missing, anything too large for its column is clamped.
-- SPEND stands for: gpu_seconds, cost. Both count from this attempt's claim; earlier attempts are remembered here.
-- Without cost it is gpu_config's cost_per_gpu_hour × num_gpus × gpu_seconds. SPEND is accepted after a cancel, too.
--
--   claimed, resumed    –                                    status and stage initializing; both key dialects
--   resolved (report)   hyperparameters, gpu_config, base_model, total_steps, total_epochs, estimated_total_cost
--                       either dialect; gpu_config should bring cost_per_gpu_hour and gpu_memory_gb
--   submitted (report)  external_job_id, stage               stage queued_on_gpu; the status stays
--   running (report)    stage, gpu_type, gpu_count           status running, started_at, notification once
--   progress            progress 0–100, stage, epoch, step, metrics {training_loss, validation_loss, learning_rate,
--                       throughput, gpu_utilization, gradient_norm, …}, seconds_left, points [{step, epoch, …metrics}],
--                       SPEND.  Without `points`, `metrics` itself is the point of `step`. step > 0 implies running.
--   dataset_invalid (report)  –                              the data set's file is refused: its known issues go
--   issues (report)     issues, as below                     the data set's issues and validation_errors
--   spend (report)      SPEND                                the last word on cost before an ending that carries none
--   retry               –                                    status and stage queued, retry_count + 1
--   snoozed, released   reason                               the same, not counted; with reason `submitted` the row stays
--   completed           artifact (!) {id (!), artifacts (!) {file name → path}, name, description, quality_metrics,
--                       training_summary, configuration}, metrics, epoch, step, points, SPEND
--                       every path is {user_id}/{artifact id}/{file name}. Keys of section 6.3 and 6.4 of the app's
--                       contract (overall_score, final_loss, …) are computed here; the given objects add to them.
--   failed              code, message, detail {place, hint, stack, SPEND} (or these keys at top level)
--   cancelled           SPEND
--   redriven            –                                    a failed job is queued again
--
-- The engine bounds an object: 64 KiB with a heartbeat, 1 MiB with a report or a result.
--
-- ## … and of kind `validate_dataset`
--   claimed, resumed    –                                    the issues of the last validation go
--   issues (report)     issues [{line, path, code, message, hint, severity error|warning|info}], as often as there are
--                       more than fit; 10,000 are kept
--   completed           valid (default: no issue is an error), error_count, error_message, sample_data [≤3 records],
--                       statistics {total_training_pairs, total_validation_pairs, total_tokens,
--                       avg_turns_per_conversation, avg_tokens_per_turn}, issues (the rest of them)
--   failed              as above; the dataset turns `error` with that text
--   cancelled           the dataset turns `error`
-- A bad dataset is a *completed* validation with valid = false; `failed` means that it could not be examined.

-- ---------------------------------------------------------------------------------------------------------------------
-- 4.1  What the projection remembers, because the app's tables have no room for it
-- ---------------------------------------------------------------------------------------------------------------------

create table if not exists brightrun.training_projection (
  job_id              uuid primary key references public.training_jobs (id) on delete cascade,
  settled_cost        numeric(24,4) not null default 0 check (settled_cost >= 0),         -- of finished attempts
  settled_gpu_seconds numeric(24,3) not null default 0 check (settled_gpu_seconds >= 0),
  attempt_cost        numeric(24,4) not null default 0 check (attempt_cost >= 0),         -- of the current attempt
  attempt_gpu_seconds numeric(24,3) not null default 0 check (attempt_gpu_seconds >= 0),
  start_announced     boolean not null default false,  -- job_started was sent
  ended               boolean not null default false,  -- the engine has ended this job; not another request to it
  cost_record_id      uuid                             -- the one cost record
) with (fillfactor = 70);

-- The validation that counts for a dataset: the latest asked for. Earlier ones are cancelled and no longer heard.
create table if not exists brightrun.dataset_validation (
  dataset_id uuid primary key references public.datasets (id) on delete cascade,
  job_id     uuid not null unique
);

-- Every problem of a dataset, replaced by each validation. datasets.validation_errors shows the first ten errors.
create table if not exists brightrun.dataset_issue (
  dataset_id uuid not null references public.datasets (id) on delete cascade,
  ordinal    integer not null check (ordinal > 0),
  user_id    uuid not null,
  severity   text not null check (severity in ('error', 'warning', 'info')),
  line       bigint check (line > 0),     -- 1-based; null: the file as a whole
  path       text,                        -- inside the record, as in messages[2].role
  code       text not null,               -- AREA_WHAT, stable
  message    text not null,
  hint       text,
  primary key (dataset_id, ordinal)
);
create index if not exists dataset_issue_user_id on brightrun.dataset_issue (user_id);
alter table brightrun.dataset_issue enable row level security;
drop policy if exists "Users can view own dataset issues" on brightrun.dataset_issue;
create policy "Users can view own dataset issues" on brightrun.dataset_issue
  for select to authenticated using (user_id = (select auth.uid()));

-- For the API, which does not expose schema brightrun. The caller's rights and policies apply.
create or replace view public.dataset_issues with (security_invoker = true) as
  select dataset_id, ordinal, severity, line, path, code, message, hint from brightrun.dataset_issue;

-- ---------------------------------------------------------------------------------------------------------------------
-- 4.2  Small helpers. A leading underscore marks a function that only this section calls.
-- ---------------------------------------------------------------------------------------------------------------------

-- A JSON number between two bounds; null for anything that is not a number. Twenty decimals are more than any column or
-- chart has, and fewer than would underflow a double.
create or replace function brightrun._number(p_object jsonb, p_key text, p_low numeric, p_high numeric) returns numeric
language sql immutable set search_path = '' as $$
  select case when jsonb_typeof(p_object -> p_key) = 'number'
              then trim_scale(round(least(greatest((p_object ->> p_key)::numeric, p_low), p_high), 20)) end
$$;

create or replace function brightrun._integer(p_object jsonb, p_key text) returns integer
language sql immutable set search_path = '' as $$
  select trunc(brightrun._number(p_object, p_key, 0, 2147483647))::integer
$$;

-- A JSON string that is not blank, cut to fit a column.
create or replace function brightrun._text(p_object jsonb, p_key text, p_length integer) returns text
language sql immutable set search_path = '' as $$
  select case when jsonb_typeof(p_object -> p_key) = 'string' then nullif(left(btrim(p_object ->> p_key), p_length), '') end
$$;

-- Postgres holds JSON that others cannot read back: numbers beyond a double, nesting without end.
create or replace function brightrun._is_readable(p_value jsonb) returns boolean
language sql immutable set search_path = '' as $$
  select not jsonb_path_exists(p_value, '$.**{32 to last}')
     and not jsonb_path_exists(p_value, '$.** ? (@.type() == "number" && (@ > 1e300 || @ < -1e300))')
$$;

create or replace function brightrun._object(p_value jsonb) returns jsonb
language sql immutable set search_path = '' as $$
  select case when jsonb_typeof(p_value) = 'object' and brightrun._is_readable(p_value)
              then jsonb_strip_nulls(p_value) else '{}'::jsonb end
$$;

create or replace function brightrun._array(p_value jsonb) returns jsonb
language sql immutable set search_path = '' as $$
  select case when jsonb_typeof(p_value) = 'array' then p_value else '[]'::jsonb end
$$;

-- The app writes and reads two dialects of the same settings; a stored object always speaks both. Where an object
-- already does and they differ, each keeps its own word.
create or replace function brightrun._both_dialects(p_settings jsonb, p_twins text[]) returns jsonb
language sql immutable set search_path = '' as $$
  select brightrun._object(p_settings) || coalesce(jsonb_object_agg(twin.name, brightrun._object(p_settings) -> twin.other)
           filter (where not brightrun._object(p_settings) ? twin.name and brightrun._object(p_settings) ? twin.other), '{}')
    from generate_series(1, cardinality(p_twins), 2) as pair,
         lateral (values (p_twins[pair], p_twins[pair + 1]), (p_twins[pair + 1], p_twins[pair])) as twin (name, other)
$$;

create or replace function brightrun._hyperparameters(p_settings jsonb) returns jsonb
language sql immutable set search_path = '' as $$
  select brightrun._both_dialects(p_settings,
    array['epochs', 'num_epochs', 'rank', 'lora_rank', 'alpha', 'lora_alpha', 'dropout', 'lora_dropout'])
$$;

create or replace function brightrun._gpu_config(p_settings jsonb) returns jsonb
language sql immutable set search_path = '' as $$
  select brightrun._both_dialects(p_settings, array['type', 'gpu_type', 'count', 'num_gpus'])
$$;

-- Only what a chart can draw: top-level numbers, none so large that JavaScript reads infinity.
create or replace function brightrun._finite_metrics(p_metrics jsonb) returns jsonb
language sql immutable set search_path = '' as $$
  select coalesce(jsonb_object_agg(key, brightrun._number(p_metrics, key, -1e15, 1e15))
                  filter (where jsonb_typeof(value) = 'number'), '{}')
    from jsonb_each(brightrun._object(p_metrics))
$$;

-- `what happened. where. what to do. [CODE]`, as every other part of the system says it.
create or replace function brightrun._failure_text(p_detail jsonb) returns text
language sql immutable set search_path = '' as $$
  select concat_ws(' ',
    (select string_agg(part.text || case when right(part.text, 1) in ('.', '?', '!', ':') then '' else '.' end, ' '
                       order by part.place)
       from (values
         (1, coalesce(brightrun._text(p_detail, 'message', 4000), 'The job failed for an unknown reason')),
         (2, coalesce(brightrun._text(p_detail, 'place', 1000), brightrun._text(p_detail -> 'detail', 'place', 1000))),
         (3, coalesce(brightrun._text(p_detail, 'hint', 2000), brightrun._text(p_detail -> 'detail', 'hint', 2000))))
         as part (place, text)
      where part.text is not null),
    '[' || brightrun._text(p_detail, 'code', 100) || ']')
$$;

create or replace function brightrun._notify_user(
  p_user_id uuid, p_type text, p_title text, p_message text, p_priority text, p_action_url text, p_metadata jsonb)
returns void language sql set search_path = '' as $$
  insert into public.notifications (user_id, type, title, message, priority, action_url, metadata)
  values (p_user_id, p_type, p_title, p_message, p_priority, p_action_url, p_metadata)
$$;

-- ---------------------------------------------------------------------------------------------------------------------
-- 4.3  From the app to the engine
-- ---------------------------------------------------------------------------------------------------------------------

create or replace function brightrun._dataset_snapshot(p_dataset public.datasets) returns jsonb
language sql stable set search_path = '' as $$
  select jsonb_build_object(
    'id', p_dataset.id, 'name', p_dataset.name, 'format', p_dataset.format,
    'storage_bucket', coalesce(p_dataset.storage_bucket, 'lora-datasets'), 'storage_path', p_dataset.storage_path,
    'file_name', p_dataset.file_name, 'file_size', p_dataset.file_size,
    'total_training_pairs', p_dataset.total_training_pairs)
$$;

-- The job as it was asked for: the worker trains from this, whatever happens to the rows later.
create or replace function brightrun._enqueue_training_job(p_job public.training_jobs) returns void
language plpgsql set search_path = '' as $$
declare
  v_dataset public.datasets;
begin
  select * into v_dataset from public.datasets where id = p_job.dataset_id;
  if v_dataset.user_id is distinct from p_job.user_id then
    raise exception 'Dataset % does not belong to the user of training job %.', p_job.dataset_id, p_job.id
      using errcode = 'insufficient_privilege';
  end if;
  if not (brightrun._is_readable(p_job.hyperparameters) and brightrun._is_readable(p_job.gpu_config)) then
    raise exception 'hyperparameters and gpu_config must hold numbers below 1e300, nested less than 32 deep.'
      using errcode = 'invalid_parameter_value';
  end if;
  perform brightrun.enqueue(
    p_kind    => 'train',
    p_id      => p_job.id,
    p_owner   => p_job.user_id,
    p_payload => jsonb_build_object(
      'job_id', p_job.id, 'user_id', p_job.user_id, 'preset_id', p_job.preset_id,
      'hyperparameters', p_job.hyperparameters, 'gpu_config', p_job.gpu_config,
      'total_epochs', p_job.total_epochs, 'estimated_total_cost', p_job.estimated_total_cost,
      'dataset', brightrun._dataset_snapshot(v_dataset)));
end $$;

-- The latest request for a dataset wins: the file may have been replaced while an earlier validation read it.
create or replace function brightrun._enqueue_validation(p_dataset public.datasets) returns void
language plpgsql set search_path = '' as $$
declare
  v_job_id   uuid := gen_random_uuid();
  v_previous uuid;
begin
  select job_id into v_previous from brightrun.dataset_validation where dataset_id = p_dataset.id;
  insert into brightrun.dataset_validation (dataset_id, job_id) values (p_dataset.id, v_job_id)
    on conflict (dataset_id) do update set job_id = excluded.job_id;
  if v_previous is not null then
    perform brightrun.cancel(v_previous, 'superseded');
  end if;
  perform brightrun.enqueue(
    p_kind    => 'validate_dataset',
    p_id      => v_job_id,
    p_owner   => p_dataset.user_id,
    p_payload => jsonb_build_object('dataset', brightrun._dataset_snapshot(p_dataset), 'user_id', p_dataset.user_id));
end $$;

-- The trigger functions run with the owner's rights: the app's users may not call the engine themselves.
create or replace function brightrun.on_training_job_queued() returns trigger
language plpgsql security definer set search_path = '' as $$
begin
  perform brightrun._enqueue_training_job(new);
  return null;
end $$;

create or replace function brightrun.on_training_job_cancelled() returns trigger
language plpgsql security definer set search_path = '' as $$
begin
  if not exists (select from brightrun.training_projection where job_id = new.id and ended) then
    perform brightrun.cancel(new.id, 'cancelled in the app');
  end if;
  return null;
end $$;

create or replace function brightrun.on_training_job_deleted() returns trigger
language plpgsql security definer set search_path = '' as $$
begin
  perform brightrun.cancel(old.id, 'the training job was deleted');
  return null;
end $$;

create or replace function brightrun.on_dataset_validating() returns trigger
language plpgsql security definer set search_path = '' as $$
begin
  perform brightrun._enqueue_validation(new);
  return null;
end $$;

create or replace trigger brightrun_queued after insert on public.training_jobs
  for each row when (new.status = 'queued') execute function brightrun.on_training_job_queued();
create or replace trigger brightrun_cancelled after update of status on public.training_jobs
  for each row when (new.status = 'cancelled' and old.status is distinct from 'cancelled')
  execute function brightrun.on_training_job_cancelled();
create or replace trigger brightrun_deleted after delete on public.training_jobs
  for each row execute function brightrun.on_training_job_deleted();
create or replace trigger brightrun_validating_insert after insert on public.datasets
  for each row when (new.status = 'validating') execute function brightrun.on_dataset_validating();
create or replace trigger brightrun_validating_update after update of status on public.datasets
  for each row when (new.status = 'validating' and old.status is distinct from 'validating')
  execute function brightrun.on_dataset_validating();

-- ---------------------------------------------------------------------------------------------------------------------
-- 4.4  From the engine to a training job
-- ---------------------------------------------------------------------------------------------------------------------

create or replace function brightrun._is_active(p_status text) returns boolean
language sql immutable set search_path = '' as $$
  select coalesce(p_status in ('queued', 'initializing', 'running'), false)
$$;

-- Takes note of what the current attempt has used so far; never less than noted before.
create or replace function brightrun._note_spend(p_job public.training_jobs, p_detail jsonb) returns void
language sql set search_path = '' as $$
  update brightrun.training_projection
     set attempt_gpu_seconds = greatest(attempt_gpu_seconds, used.gpu_seconds),
         attempt_cost = greatest(attempt_cost, coalesce(
           brightrun._number(p_detail, 'cost', 0, 99999999.99),
           used.gpu_seconds / 3600 * brightrun._number(settings.gpu, 'cost_per_gpu_hour', 0, 1e6)
             * coalesce(brightrun._number(settings.gpu, 'num_gpus', 1, 1e4), 1)))
    from (select brightrun._number(p_detail, 'gpu_seconds', 0, 1e9) as gpu_seconds) as used,
         (select brightrun._gpu_config(p_job.gpu_config) as gpu) as settings
   where job_id = p_job.id
$$;

-- Dollars over all attempts, as the app shows them.
create or replace function brightrun._total_cost(p_job_id uuid) returns numeric
language sql stable set search_path = '' as $$
  select round(least(settled_cost + attempt_cost, 99999999.99), 2) from brightrun.training_projection where job_id = p_job_id
$$;

-- Hours of GPU time over all attempts; where nobody counted them, the time since the first start.
create or replace function brightrun._gpu_hours(p_job public.training_jobs) returns numeric
language sql stable set search_path = '' as $$
  select round(coalesce(nullif(settled_gpu_seconds + attempt_gpu_seconds, 0),
                        extract(epoch from coalesce(p_job.completed_at, now()) - p_job.started_at), 0) / 3600, 4)
    from brightrun.training_projection where job_id = p_job.id
$$;

-- Writes the job's one cost record, or corrects it after a redriven job ended again. Returns the amount.
create or replace function brightrun._bill(p_job public.training_jobs, p_outcome text) returns numeric
language plpgsql set search_path = '' as $$
declare
  v_amount  numeric := brightrun._total_cost(p_job.id);
  v_gpu     jsonb := brightrun._gpu_config(p_job.gpu_config);
  v_details jsonb := jsonb_build_object(
    'gpu_type', v_gpu -> 'gpu_type', 'gpu_count', v_gpu -> 'num_gpus',
    'duration_hours', brightrun._gpu_hours(p_job), 'outcome', p_outcome);
  v_record_id uuid;
begin
  select cost_record_id into v_record_id from brightrun.training_projection where job_id = p_job.id;
  if v_record_id is not null then
    update public.cost_records set amount = v_amount, details = v_details where id = v_record_id;
  elsif p_outcome = 'completed' or p_job.started_at is not null or v_amount > 0 then
    insert into public.cost_records (user_id, job_id, cost_type, amount, details, billing_period)
    values (p_job.user_id, p_job.id, 'training_compute', v_amount, v_details, (now() at time zone 'utc')::date)
    returning id into v_record_id;
  end if;
  update brightrun.training_projection set cost_record_id = v_record_id, ended = true where job_id = p_job.id;
  return v_amount;
end $$;

-- Adds points of steps not yet passed, then thins to 100: the steps are cut into at most 98 equal stretches, of which each
-- keeps its first point, and the newest point always stays. A repeated or late point changes nothing.
create or replace function brightrun._add_metrics_points(p_job public.training_jobs, p_points jsonb) returns void
language plpgsql set search_path = '' as $$
declare
  v_stretch integer;
begin
  insert into public.metrics_points (job_id, timestamp, epoch, step, training_loss, validation_loss, learning_rate,
                                     gradient_norm, throughput, gpu_utilization)
  select p_job.id,
         clock_timestamp() + point.ordinal * interval '1 microsecond',
         coalesce(brightrun._integer(point.value, 'epoch'), 0),
         point.step,
         brightrun._number(point.value, 'training_loss', -9999, 9999),
         brightrun._number(point.value, 'validation_loss', -9999, 9999),
         coalesce(brightrun._number(point.value, 'learning_rate', 1e-10, 99), 1e-10),
         brightrun._number(point.value, 'gradient_norm', 0, 9999),
         brightrun._number(point.value, 'throughput', 0, 99999999),
         brightrun._number(point.value, 'gpu_utilization', 0, 100)
    from (select distinct on (brightrun._integer(value, 'step')) value, brightrun._integer(value, 'step') as step,
                 row_number() over (order by brightrun._integer(value, 'step'), ordinality) as ordinal
            from jsonb_array_elements(brightrun._array(p_points)) with ordinality
           where jsonb_typeof(value) = 'object' and brightrun._number(value, 'training_loss', -9999, 9999) is not null
           order by brightrun._integer(value, 'step'), ordinality) as point
   where point.step > coalesce((select max(step) from public.metrics_points where job_id = p_job.id), -1)
   order by point.step;

  select ceil(greatest(max(step) - min(step) + 1, p_job.total_steps) / 98.0) into v_stretch
    from public.metrics_points where job_id = p_job.id having count(*) > 1;

  delete from public.metrics_points
   where id in (
     select id
       from (select id, step, max(step) over (partition by job_id) as newest,
                    row_number() over (partition by job_id, (step - first) / v_stretch order by step) as place
               from (select id, job_id, step, min(step) over (partition by job_id) as first
                       from public.metrics_points where job_id = p_job.id) as known) as placed
      where place > 1 and step < newest);
end $$;

-- Stars as the app defines them: how far the training loss fell from the first point to the last, less one when the
-- held-out loss ended more than 0.5 above it.
create or replace function brightrun._quality(p_job_id uuid) returns jsonb
language plpgsql stable set search_path = '' as $$
declare
  v_first      numeric;
  v_last       numeric;
  v_validation numeric;
  v_reduction  numeric;
  v_quality    text;
  v_score      integer;
begin
  select (array_agg(training_loss order by timestamp, step))[1],
         (array_agg(training_loss order by timestamp desc, step desc))[1],
         (array_agg(validation_loss order by timestamp desc, step desc) filter (where validation_loss is not null))[1]
    into v_first, v_last, v_validation
    from public.metrics_points where job_id = p_job_id;
  if v_first is null then
    return jsonb_build_object('overall_score', 3, 'convergence_quality', 'unknown', 'final_training_loss', null,
                              'final_validation_loss', null, 'perplexity', null);
  end if;
  v_reduction := coalesce((v_first - v_last) / nullif(v_first, 0) * 100, 0);
  select quality, score into v_quality, v_score
    from (values (50, 'excellent', 5), (30, 'good', 4), (15, 'fair', 3), (5, 'poor', 2), (null, 'poor', 1))
         as band (above, quality, score)
   where above is null or v_reduction > above order by above desc nulls last limit 1;
  if v_last <> 0 and v_validation <> 0 and v_validation - v_last > 0.5 then
    v_quality := 'overfit';
    v_score := greatest(2, v_score - 1);
  end if;
  return jsonb_build_object(
    'overall_score', v_score, 'convergence_quality', v_quality, 'final_training_loss', v_last,
    'final_validation_loss', v_validation, 'loss_reduction_percent', round(v_reduction, 2),
    'perplexity', case when v_validation is not null then round(exp(least(v_validation, 100)), 4) end);
end $$;

-- A new attempt: what the previous one used is settled, and the row speaks both dialects from now on.
create or replace function brightrun._training_claimed(p_job public.training_jobs) returns void
language plpgsql set search_path = '' as $$
begin
  update brightrun.training_projection
     set settled_cost = settled_cost + attempt_cost, settled_gpu_seconds = settled_gpu_seconds + attempt_gpu_seconds,
         attempt_cost = 0, attempt_gpu_seconds = 0
   where job_id = p_job.id;
  update public.training_jobs
     set status = 'initializing', current_stage = 'initializing',
         hyperparameters = brightrun._hyperparameters(hyperparameters),
         gpu_config = brightrun._gpu_config(gpu_config)
   where id = p_job.id and brightrun._is_active(status);
end $$;

create or replace function brightrun._training_resolved(p_job public.training_jobs, p_detail jsonb) returns void
language sql set search_path = '' as $$
  update public.training_jobs
     set hyperparameters = brightrun._hyperparameters(hyperparameters)
                           || brightrun._hyperparameters(p_detail -> 'hyperparameters')
                           || jsonb_strip_nulls(jsonb_build_object('base_model', brightrun._text(p_detail, 'base_model', 500))),
         gpu_config = brightrun._gpu_config(gpu_config) || brightrun._gpu_config(p_detail -> 'gpu_config'),
         total_steps = coalesce(brightrun._integer(p_detail, 'total_steps'), total_steps),
         total_epochs = coalesce(brightrun._integer(p_detail, 'total_epochs'), total_epochs),
         estimated_total_cost = coalesce(brightrun._number(p_detail, 'estimated_total_cost', 0, 99999999.99),
                                         estimated_total_cost)
   where id = p_job.id and brightrun._is_active(status)
$$;

create or replace function brightrun._training_submitted(p_job public.training_jobs, p_detail jsonb) returns void
language sql set search_path = '' as $$
  update public.training_jobs
     set external_job_id = coalesce(brightrun._text(p_detail, 'external_job_id', 255), external_job_id),
         current_stage = coalesce(brightrun._text(p_detail, 'stage', 50), 'queued_on_gpu')
   where id = p_job.id and brightrun._is_active(status)
$$;

create or replace function brightrun._training_running(p_job public.training_jobs, p_detail jsonb) returns void
language plpgsql set search_path = '' as $$
declare
  v_gpu jsonb := brightrun._gpu_config(p_job.gpu_config) || brightrun._gpu_config(p_detail);
begin
  if not brightrun._is_active(p_job.status) then
    return;
  end if;
  update public.training_jobs
     set status = 'running', started_at = coalesce(started_at, now()),
         current_stage = coalesce(brightrun._text(p_detail, 'stage', 50), 'training')
   where id = p_job.id;
  update brightrun.training_projection set start_announced = true where job_id = p_job.id and not start_announced;
  if found then
    perform brightrun._notify_user(
      p_job.user_id, 'job_started', 'Training Started',
      format('Your training job has started on %sx %s',
             coalesce(brightrun._integer(p_detail, 'gpu_count'), brightrun._integer(v_gpu, 'num_gpus'), 1),
             coalesce(brightrun._text(v_gpu, 'gpu_type', 100), 'GPU')),
      'medium', '/training/jobs/' || p_job.id, jsonb_build_object('job_id', p_job.id));
  end if;
end $$;

-- The part of progress that an ending carries, too.
create or replace function brightrun._training_advanced(p_job public.training_jobs, p_detail jsonb) returns void
language plpgsql set search_path = '' as $$
declare
  v_metrics jsonb := brightrun._finite_metrics(p_detail -> 'metrics');
  v_step    integer := brightrun._integer(p_detail, 'step');
begin
  perform brightrun._note_spend(p_job, p_detail);
  if not brightrun._is_active(p_job.status) then
    return;
  end if;
  perform brightrun._add_metrics_points(p_job, coalesce(
    p_detail -> 'points',
    jsonb_build_array(v_metrics || jsonb_build_object('step', v_step, 'epoch', brightrun._integer(p_detail, 'epoch')))));
  update public.training_jobs
     set current_epoch = coalesce(brightrun._integer(p_detail, 'epoch'), current_epoch),
         current_step = coalesce(v_step, current_step),
         current_metrics = brightrun._object(current_metrics) || v_metrics,
         current_cost = greatest(coalesce(current_cost, 0), brightrun._total_cost(id))
   where id = p_job.id;
end $$;

create or replace function brightrun._training_progressed(p_job public.training_jobs, p_detail jsonb) returns void
language plpgsql set search_path = '' as $$
begin
  if p_job.status <> 'running' and brightrun._integer(p_detail, 'step') > 0 then
    perform brightrun._training_running(p_job, p_detail);
  end if;
  perform brightrun._training_advanced(p_job, p_detail);
  update public.training_jobs
     set progress = greatest(coalesce(progress, 0), coalesce(brightrun._number(p_detail, 'progress', 0, 100), 0)),
         current_stage = coalesce(brightrun._text(p_detail, 'stage', 50), current_stage),
         estimated_completion_at = coalesce(
           now() + brightrun._number(p_detail, 'seconds_left', 0, 1e8)::double precision * interval '1 second',
           estimated_completion_at)
   where id = p_job.id and brightrun._is_active(status);
end $$;

-- Training has found its data set unusable, which no validation had (one that is asked for meanwhile goes before). The
-- status stays the app's: the file may be mended in its place.
create or replace function brightrun._training_found_issues(p_job public.training_jobs, p_event text, p_detail jsonb)
returns void language plpgsql set search_path = '' as $$
declare
  v_dataset public.datasets;
begin
  select * into v_dataset from public.datasets where id = p_job.dataset_id and status <> 'validating' for no key update;
  if not found then
    return;
  end if;
  if p_event = 'dataset_invalid' then
    delete from brightrun.dataset_issue where dataset_id = v_dataset.id;
  end if;
  perform brightrun._add_dataset_issues(v_dataset, p_detail -> 'issues');
  update public.datasets set validation_errors = brightrun._validation_errors(id) where id = v_dataset.id;
end $$;

create or replace function brightrun._training_requeued(p_job public.training_jobs, p_is_attempt boolean, p_detail jsonb)
returns void language sql set search_path = '' as $$
  update public.training_jobs
     set status = 'queued', current_stage = 'queued', estimated_completion_at = null,
         retry_count = coalesce(retry_count, 0) + case when p_is_attempt then 1 else 0 end
   where id = p_job.id and brightrun._is_active(status)
     and (p_is_attempt or p_detail ->> 'reason' is distinct from 'submitted')
$$;

-- Refuses an ending without proof: an id, at least one file, every path in the user's own folder of this artifact.
create or replace function brightrun._check_artifact(p_job public.training_jobs, p_artifact jsonb) returns void
language plpgsql set search_path = '' as $$
declare
  v_folder text := p_job.user_id || '/' || (p_artifact ->> 'id') || '/';
begin
  if (p_artifact ->> 'id') is null or coalesce(jsonb_typeof(p_artifact -> 'artifacts'), '') <> 'object'
     or p_artifact -> 'artifacts' = '{}' then
    raise exception 'Training job % cannot complete without an artifact id and its files.', p_job.id
      using errcode = 'check_violation';
  end if;
  if exists (select from jsonb_each(p_artifact -> 'artifacts') as file
              where jsonb_typeof(file.value) <> 'string' or file.value #>> '{}' <> v_folder || file.key) then
    raise exception 'Training job %: artifact files must lie at %{file name} in lora-models.', p_job.id, v_folder
      using errcode = 'check_violation';
  end if;
end $$;

create or replace function brightrun._store_artifact(p_job public.training_jobs, p_artifact jsonb) returns integer
language plpgsql set search_path = '' as $$
declare
  v_quality jsonb := brightrun._quality(p_job.id);
  v_dataset text := (select name from public.datasets where id = p_job.dataset_id);
begin
  insert into public.model_artifacts (id, user_id, job_id, dataset_id, name, description, quality_metrics,
                                      training_summary, configuration, artifacts)
  values (
    (p_artifact ->> 'id')::uuid, p_job.user_id, p_job.id, p_job.dataset_id,
    coalesce(brightrun._text(p_artifact, 'name', 200),
             left(coalesce(v_dataset, 'Model'), 180) || to_char(now() at time zone 'utc', '" - "FMMM/FMDD/YYYY')),
    brightrun._text(p_artifact, 'description', 10000),
    brightrun._object(p_artifact -> 'quality_metrics') || v_quality,
    brightrun._object(p_artifact -> 'training_summary') || jsonb_build_object(
      'epochs_completed', p_job.current_epoch, 'total_steps', p_job.current_step,
      'final_loss', p_job.current_metrics -> 'training_loss',
      'training_duration_hours', brightrun._gpu_hours(p_job), 'total_cost', brightrun._total_cost(p_job.id)),
    brightrun._object(p_artifact -> 'configuration') || jsonb_build_object(
      'preset_id', p_job.preset_id, 'hyperparameters', p_job.hyperparameters, 'gpu_config', p_job.gpu_config),
    p_artifact -> 'artifacts');
  return (v_quality ->> 'overall_score')::integer;
end $$;

create or replace function brightrun._training_completed(p_job public.training_jobs, p_detail jsonb) returns void
language plpgsql set search_path = '' as $$
declare
  v_artifact jsonb := p_detail -> 'artifact';
  v_job      public.training_jobs;
  v_score    integer;
  v_cost     numeric;
begin
  if not brightrun._is_active(p_job.status) then
    return;
  end if;
  perform brightrun._check_artifact(p_job, v_artifact);
  perform brightrun._training_advanced(p_job, p_detail);
  update public.training_jobs
     set hyperparameters = brightrun._hyperparameters(hyperparameters), gpu_config = brightrun._gpu_config(gpu_config)
   where id = p_job.id returning * into v_job;
  v_score := brightrun._store_artifact(v_job, v_artifact);
  v_cost := brightrun._bill(v_job, 'completed');
  update public.training_jobs
     set status = 'completed', current_stage = 'completed', progress = 100, completed_at = now(),
         started_at = coalesce(started_at, now()), current_cost = v_cost, final_cost = v_cost,
         artifact_id = (v_artifact ->> 'id')::uuid, error_message = null, error_stack = null
   where id = p_job.id;
  perform brightrun._notify_user(
    p_job.user_id, 'job_completed', 'Training Complete',
    format('Your training job finished successfully. Cost: $%s', to_char(v_cost, 'FM99999990.00')),
    'high', '/training/jobs/' || p_job.id, jsonb_build_object('job_id', p_job.id, 'final_cost', v_cost));
  perform brightrun._notify_user(
    p_job.user_id, 'artifact_ready', 'Model Ready for Download',
    format('Your trained model is ready. Quality score: %s/5 stars', v_score),
    'high', '/models/' || (v_artifact ->> 'id'),
    jsonb_build_object('artifact_id', v_artifact ->> 'id', 'job_id', p_job.id));
end $$;

create or replace function brightrun._training_failed(p_job public.training_jobs, p_detail jsonb) returns void
language plpgsql set search_path = '' as $$
declare
  v_error text := brightrun._failure_text(p_detail);
  v_cost  numeric;
begin
  if not brightrun._is_active(p_job.status) then
    return;
  end if;
  perform brightrun._note_spend(p_job, brightrun._object(p_detail -> 'detail') || p_detail);
  v_cost := brightrun._bill(p_job, 'failed');
  update public.training_jobs
     set status = 'failed', completed_at = now(), current_cost = v_cost, final_cost = v_cost,
         progress = coalesce(progress, 0), error_message = v_error,
         error_stack = coalesce(brightrun._text(p_detail, 'stack', 20000), brightrun._text(p_detail -> 'detail', 'stack', 20000))
   where id = p_job.id;
  perform brightrun._notify_user(
    p_job.user_id, 'job_failed', 'Training Failed',
    format(case when p_job.started_at is null then 'Your training job failed to start: %s'
                else 'Your training job failed: %s' end, v_error),
    'high', '/training/jobs/' || p_job.id, jsonb_build_object('job_id', p_job.id));
end $$;

-- The app has set the status and told the user, unless the cancel came from an operator. Cost is the engine's to say: the
-- GPU may have worked on for a moment after the app wrote final_cost.
create or replace function brightrun._training_cancelled(p_job public.training_jobs, p_detail jsonb) returns void
language plpgsql set search_path = '' as $$
declare
  v_cost numeric;
begin
  if not (brightrun._is_active(p_job.status) or p_job.status = 'cancelled')
     or (select ended from brightrun.training_projection where job_id = p_job.id) then
    return;
  end if;
  perform brightrun._note_spend(p_job, p_detail);
  v_cost := brightrun._bill(p_job, 'cancelled');
  update public.training_jobs
     set status = 'cancelled', current_stage = 'cancelled', completed_at = coalesce(completed_at, now()),
         progress = coalesce(progress, 0), current_cost = v_cost, final_cost = v_cost
   where id = p_job.id;
  if p_job.status <> 'cancelled' then
    perform brightrun._notify_user(
      p_job.user_id, 'job_cancelled', 'Job Cancelled', 'Your training job was cancelled',
      'medium', '/training/jobs/' || p_job.id, jsonb_build_object('job_id', p_job.id));
  end if;
end $$;

-- An operator tries a failed job again. Its cost record stays and will be corrected when the job ends again.
create or replace function brightrun._training_redriven(p_job public.training_jobs) returns void
language plpgsql set search_path = '' as $$
begin
  update brightrun.training_projection set ended = false where job_id = p_job.id and p_job.status = 'failed';
  update public.training_jobs
     set status = 'queued', current_stage = 'queued', completed_at = null, final_cost = null, error_message = null,
         error_stack = null
   where id = p_job.id and status = 'failed';
end $$;

create or replace function brightrun.project_training_job(p_job_id uuid, p_event text, p_detail jsonb) returns void
language plpgsql set search_path = '' as $$
declare
  v_job    public.training_jobs;
  v_detail jsonb := case when jsonb_typeof(p_detail) = 'object' then p_detail else '{}' end;
begin
  select * into v_job from public.training_jobs where id = p_job_id for no key update;
  if not found then
    return; -- The row was deleted, which has asked the engine to stop.
  end if;
  insert into brightrun.training_projection (job_id) values (p_job_id) on conflict do nothing;
  case p_event
    when 'claimed', 'resumed'   then perform brightrun._training_claimed(v_job);
    when 'resolved'             then perform brightrun._training_resolved(v_job, v_detail);
    when 'submitted'            then perform brightrun._training_submitted(v_job, v_detail);
    when 'running'              then perform brightrun._training_running(v_job, v_detail);
    when 'progress'             then perform brightrun._training_progressed(v_job, v_detail);
    when 'dataset_invalid', 'issues' then perform brightrun._training_found_issues(v_job, p_event, v_detail);
    when 'spend'                then perform brightrun._training_advanced(v_job, v_detail);
    when 'retry'                then perform brightrun._training_requeued(v_job, true, v_detail);
    when 'snoozed', 'released'  then perform brightrun._training_requeued(v_job, false, v_detail);
    when 'completed'            then perform brightrun._training_completed(v_job, v_detail);
    when 'failed'               then perform brightrun._training_failed(v_job, v_detail);
    when 'cancelled'            then perform brightrun._training_cancelled(v_job, v_detail);
    when 'redriven'             then perform brightrun._training_redriven(v_job);
    else null;
  end case;
end $$;

-- ---------------------------------------------------------------------------------------------------------------------
-- 4.5  From the engine to a dataset
-- ---------------------------------------------------------------------------------------------------------------------

create or replace function brightrun._add_dataset_issues(p_dataset public.datasets, p_issues jsonb) returns void
language sql set search_path = '' as $$
  insert into brightrun.dataset_issue (dataset_id, ordinal, user_id, severity, line, path, code, message, hint)
  select p_dataset.id, known.count + issue.ordinality, p_dataset.user_id,
         case when issue.value ->> 'severity' in ('warning', 'info') then issue.value ->> 'severity' else 'error' end,
         nullif(trunc(brightrun._number(issue.value, 'line', 0, 9e18))::bigint, 0),
         brightrun._text(issue.value, 'path', 1000),
         coalesce(brightrun._text(issue.value, 'code', 100), 'DATA_UNKNOWN'),
         coalesce(brightrun._text(issue.value, 'message', 4000), 'Unknown problem.'),
         brightrun._text(issue.value, 'hint', 4000)
    from (select count(*) from brightrun.dataset_issue where dataset_id = p_dataset.id) as known,
         jsonb_array_elements(brightrun._array(p_issues)) with ordinality as issue
   where known.count + issue.ordinality <= 10000
$$;

-- The first ten errors in the shape of the app's dataset card; null when there are none.
create or replace function brightrun._validation_errors(p_dataset_id uuid) returns jsonb
language sql stable set search_path = '' as $$
  select jsonb_agg(jsonb_strip_nulls(jsonb_build_object(
           'line', coalesce(line, 0), 'error', message, 'suggestion', hint, 'code', code, 'path', path)) order by ordinal)
    from (select * from brightrun.dataset_issue
           where dataset_id = p_dataset_id and severity = 'error' order by ordinal limit 10) as first_errors
$$;

create or replace function brightrun._dataset_validated(p_dataset public.datasets, p_detail jsonb) returns void
language plpgsql set search_path = '' as $$
declare
  v_statistics jsonb := brightrun._object(p_detail -> 'statistics');
  v_errors     integer;
  v_is_valid   boolean;
begin
  perform brightrun._add_dataset_issues(p_dataset, p_detail -> 'issues');
  select greatest(count(*), brightrun._integer(p_detail, 'error_count')) into v_errors
    from brightrun.dataset_issue where dataset_id = p_dataset.id and severity = 'error';
  v_is_valid := v_errors = 0 and p_detail -> 'valid' is distinct from 'false'::jsonb;
  update public.datasets
     set status = case when v_is_valid then 'ready' else 'error' end,
         training_ready = v_is_valid,
         validated_at = case when v_is_valid then now() else validated_at end,
         validation_errors = case when not v_is_valid then brightrun._validation_errors(id) end,
         error_message = case when not v_is_valid then coalesce(
           brightrun._text(p_detail, 'error_message', 4000), format('Found %s validation error(s)', v_errors)) end,
         total_training_pairs = coalesce(brightrun._integer(v_statistics, 'total_training_pairs'), total_training_pairs),
         total_validation_pairs = coalesce(brightrun._integer(v_statistics, 'total_validation_pairs'), total_validation_pairs),
         total_tokens = coalesce(trunc(brightrun._number(v_statistics, 'total_tokens', 0, 9e18))::bigint, total_tokens),
         avg_turns_per_conversation = coalesce(
           brightrun._number(v_statistics, 'avg_turns_per_conversation', 0, 99999999.99), avg_turns_per_conversation),
         avg_tokens_per_turn = coalesce(
           brightrun._number(v_statistics, 'avg_tokens_per_turn', 0, 99999999.99), avg_tokens_per_turn),
         sample_data = case when jsonb_typeof(p_detail -> 'sample_data') = 'array'
                            then jsonb_path_query_array(p_detail -> 'sample_data', '$[0 to 2]') else sample_data end
   where id = p_dataset.id;
  if v_is_valid then
    perform brightrun._notify_user(
      p_dataset.user_id, 'dataset_ready', 'Dataset Ready',
      format('Your dataset "%s" is ready for training', p_dataset.name),
      'medium', '/datasets/' || p_dataset.id, jsonb_build_object('dataset_id', p_dataset.id));
  end if;
end $$;

create or replace function brightrun._dataset_refused(p_dataset public.datasets, p_reason text) returns void
language sql set search_path = '' as $$
  update public.datasets set status = 'error', training_ready = false, error_message = p_reason where id = p_dataset.id
$$;

create or replace function brightrun.project_dataset_job(p_job_id uuid, p_event text, p_detail jsonb) returns void
language plpgsql set search_path = '' as $$
declare
  v_dataset public.datasets;
  v_detail  jsonb := case when jsonb_typeof(p_detail) = 'object' then p_detail else '{}' end;
begin
  select dataset.* into v_dataset
    from public.datasets as dataset
    join brightrun.dataset_validation as validation on validation.dataset_id = dataset.id
   where validation.job_id = p_job_id
     and dataset.status in ('validating', 'error') -- `error`: an operator has redriven the validation
     for no key update of dataset;
  if not found then
    return;
  end if;
  case p_event
    when 'claimed', 'resumed' then delete from brightrun.dataset_issue where dataset_id = v_dataset.id;
    when 'issues'    then perform brightrun._add_dataset_issues(v_dataset, v_detail -> 'issues');
    when 'completed' then perform brightrun._dataset_validated(v_dataset, v_detail);
    when 'failed'    then perform brightrun._dataset_refused(v_dataset, brightrun._failure_text(v_detail));
    when 'cancelled' then perform brightrun._dataset_refused(v_dataset, 'The validation was cancelled. Confirm the upload again.');
    else null;
  end case;
end $$;

-- ---------------------------------------------------------------------------------------------------------------------
-- 4.6  What the app may read of the engine
-- ---------------------------------------------------------------------------------------------------------------------

-- The history of one's own job, oldest first. Which machine did the work is left out.
create or replace function public.training_job_events(job_id uuid)
returns table (at timestamptz, event text, attempt integer, message text)
language sql stable security definer set search_path = '' as $$
  select event.at, event.event, event.attempt::integer,
         coalesce(event.detail ->> 'message', event.detail ->> 'reason', event.detail ->> 'stage')
    from brightrun.event as event
    join public.training_jobs as job on job.id = event.job_id
   where job.id = training_job_events.job_id and job.user_id = (select auth.uid())
   order by event.seq
$$;

-- The whole of it, with levels and data, for the owner of each job: what its worker logged, its series of progress, its transitions.
-- The caller's rights and policies apply; of the engine's job table a user may see two columns of his own rows, which the policy needs.
drop policy if exists "Users can view own jobs" on brightrun.job;
create policy "Users can view own jobs" on brightrun.job for select to authenticated using (owner = (select auth.uid()));
drop policy if exists "Users can view own job events" on brightrun.event;
create policy "Users can view own job events" on brightrun.event for select to authenticated
  using (exists (select from brightrun.job where job.id = event.job_id and job.owner = (select auth.uid())));

create or replace view public.job_events with (security_invoker = true) as
  select job_id, seq, at, coalesce(level, 'info') as level, regexp_replace(event, '^log\.', '') as type, attempt::integer as attempt,
         coalesce(detail ->> 'message', detail ->> 'reason', detail ->> 'stage') as message,
         case when event like 'log.%' then detail -> 'data'
              when event in ('progress', 'checkpoint') then detail - 'worker' - 'attempt' end as data
    from brightrun.event;

-- Realtime tells subscribers of changed rows, each as far as the policies let him see it. Only where the publication exists and is
-- ours to change; one that is for all tables has them already.
do $$
declare
  v_table text;
begin
  if not exists (select from pg_publication where pubname = 'supabase_realtime' and not puballtables) then
    return;
  end if;
  foreach v_table in array array['training_jobs', 'datasets', 'notifications'] loop
    if not exists (select from pg_publication_tables
                    where pubname = 'supabase_realtime' and schemaname = 'public' and tablename = v_table) then
      execute format('alter publication supabase_realtime add table public.%I', v_table);
    end if;
  end loop;
exception when insufficient_privilege then
  raise notice 'the publication supabase_realtime belongs to somebody else; add training_jobs to it in the dashboard';
end $$;

-- ---------------------------------------------------------------------------------------------------------------------
-- 4.7  Registration, and the rows that waited before this file came
-- ---------------------------------------------------------------------------------------------------------------------

insert into brightrun.job_kind (kind, projector) values
  ('train', 'brightrun.project_training_job'),
  ('validate_dataset', 'brightrun.project_dataset_job')
on conflict (kind) do update set projector = excluded.projector;

do $$ begin
  perform brightrun._enqueue_training_job(job)
    from public.training_jobs as job
    join public.datasets as dataset on dataset.id = job.dataset_id and dataset.user_id = job.user_id
   where job.status = 'queued' and not exists (select from brightrun.training_projection where job_id = job.id)
     and brightrun._is_readable(job.hyperparameters) and brightrun._is_readable(job.gpu_config)
   order by job.created_at;
  perform brightrun._enqueue_validation(dataset)
    from public.datasets as dataset
   where dataset.status = 'validating' and dataset.deleted_at is null
     and not exists (select from brightrun.dataset_validation where dataset_id = dataset.id)
   order by dataset.created_at;
end $$;

-- >>> dispatch
-- ---------------------------------------------------------------------------------------------------------------------
-- 4.8  Dispatch: pushing waiting jobs to an outside system that starts workers for them (RunPod); webhooks to the app
-- ---------------------------------------------------------------------------------------------------------------------
-- A dispatch says that a waiting job was, or is about to be, handed to an endpoint. It grants nothing: the worker that comes
-- of it claims the job like any other, and a pull worker may be faster. So a job that is sent twice is still run once.
--
--   * At most one dispatch per job. It goes when the run outside is known to be over, or the job has ended.
--   * Orchestrators take dispatches for a while (`due_at`); every act carries the token of the last taking. One that dies
--     between sending and saying so is replaced after its hold, and the job is sent again.
--   * A run that ended outside before any worker had claimed the job is an attempt that failed. That goes through the engine,
--     by a lease of no length, so that retries, history and the app's rows are the same as for every other failure.
--   * `claims` is the job's count when it was dispatched: another count means that a worker has come.
-- Lock order: dispatch → baton → the app's rows → job. Only these functions lock a dispatch.

create table if not exists brightrun.dispatch (
    job_id      uuid primary key references brightrun.job (id) on delete cascade,
    endpoint    text not null,
    owner       uuid,
    reserved    numeric(12,4) not null,
    claims      integer not null,
    external_id text,
    sends       integer not null default 0,
    token       bigint not null default pg_catalog.nextval('brightrun.lease_token'),
    created_at  timestamptz not null,
    sent_at     timestamptz,
    due_at      timestamptz not null,
    constraint dispatch_endpoint_is_a_name    check (endpoint <> '' and length(endpoint) <= 200),
    constraint dispatch_external_id_is_a_name check (length(external_id) between 1 and 500),
    constraint dispatch_reserve_is_money      check (reserved >= 0),
    constraint dispatch_sent_iff_named        check ((external_id is null) = (sent_at is null))
);
create index if not exists dispatch_due on brightrun.dispatch (due_at);
alter table brightrun.dispatch enable row level security;

-- Waiting jobs of a kind that are not dispatched, in the order a claim would take them.
create or replace function brightrun.dispatch_waiting(p_queue text, p_kind text, p_limit integer)
returns table (job_id uuid, owner uuid, payload jsonb, attempt integer)
language plpgsql volatile security definer set search_path = '' as $$
begin
    perform brightrun._promote(brightrun.now());
    return query
    select ready.job_id, job.owner, job.payload, ready.attempt::integer
    from brightrun.ready
    join brightrun.job on job.id = ready.job_id
    where ready.queue = p_queue and ready.kind = p_kind and ready.ready_seq is not null
      and not exists (select from brightrun.dispatch where dispatch.job_id = ready.job_id)
    order by ready.priority, ready.ready_seq limit p_limit;
end
$$;

-- Takes a waiting job for an endpoint that has fewer than p_most dispatches, while its owner's money lasts (null: always). The
-- token, or null: the endpoint is full, too much is set aside for the owner's other jobs, or the job is not there to be had.
create or replace function brightrun.dispatch_begin(p_job_id uuid, p_endpoint text, p_most integer, p_reserved numeric,
                                                    p_owner_most numeric, p_hold interval) returns bigint
language plpgsql volatile security definer set search_path = '' as $$
declare
    v_now    timestamptz := brightrun.now();
    v_claims integer;
    v_owner  uuid;
    v_token  bigint;
begin
    -- Orchestrators count one after the other, or two could both find the last free place, or the last of the money.
    perform pg_catalog.pg_advisory_xact_lock(4702111234474983747);
    -- The dispatch of a job that has ended stays until somebody has looked at it, but takes no place.
    if (select pg_catalog.count(*) from brightrun.dispatch join brightrun.job on job.id = dispatch.job_id
        where dispatch.endpoint = p_endpoint and job.outcome is null) >= p_most then
        return null;
    end if;
    select ready.claims, job.owner into v_claims, v_owner
    from brightrun.ready join brightrun.job on job.id = ready.job_id
    where ready.job_id = p_job_id and ready.ready_seq is not null and job.cancel_requested_at is null
    for update of ready skip locked;
    if not found or (v_owner is not null and p_owner_most < (select (spend.spent + spend.reserved)::numeric + p_reserved
                                                              from brightrun.dispatch_spend(v_owner) as spend)) then
        return null;
    end if;
    insert into brightrun.dispatch (job_id, endpoint, owner, reserved, claims, created_at, due_at)
    values (p_job_id, p_endpoint, v_owner, p_reserved, v_claims, v_now, v_now + p_hold)
    on conflict do nothing
    returning token into v_token;
    return v_token;
end
$$;

-- The endpoint has the job under this name; look at it after p_look. False: somebody else has taken the dispatch since.
create or replace function brightrun.dispatch_sent(p_job_id uuid, p_token bigint, p_external_id text, p_look interval)
returns boolean
language plpgsql volatile security definer set search_path = '' as $$
declare
    v_now      timestamptz := brightrun.now();
    v_dispatch brightrun.dispatch;
    v_ready    brightrun.ready;
    v_detail   jsonb;
begin
    select * into v_dispatch from brightrun.dispatch where job_id = p_job_id and token = p_token for update;
    if not found then
        return false;
    end if;
    select * into v_ready from brightrun.ready where job_id = p_job_id for update skip locked;
    -- A worker that was faster than this call has more to tell than that the job was sent.
    if found and v_ready.claims = v_dispatch.claims then
        v_detail := brightrun._detail(pg_catalog.jsonb_build_object('external_job_id', p_external_id,
                                      'endpoint', v_dispatch.endpoint), v_ready.attempt, null);
        perform brightrun._append(p_job_id, 'submitted', v_detail, v_ready.attempt, null, null);
        perform brightrun._project(v_ready.kind, p_job_id, 'submitted', v_detail);
    end if;
    update brightrun.job set external_id = p_external_id where id = p_job_id and outcome is null;
    update brightrun.dispatch
    set external_id = p_external_id, sent_at = v_now, due_at = v_now + p_look, sends = sends + 1
    where job_id = p_job_id;
    return true;
end
$$;

-- Dispatches that are to be looked at, kept from other orchestrators for p_hold, with what is known of their jobs.
create or replace function brightrun.dispatch_take(p_limit integer, p_hold interval)
returns table (job_id uuid, token bigint, endpoint text, external_id text, sent_seconds float8, state text, worker text,
               was_claimed boolean, cancel_requested boolean, payload jsonb)
language plpgsql volatile security definer set search_path = '' as $$
#variable_conflict use_column
declare
    v_now timestamptz := brightrun.now();
begin
    return query
    with due as materialized (
        select dispatch.job_id from brightrun.dispatch where due_at <= v_now order by due_at limit p_limit
        for update skip locked
    ), taken as (
        update brightrun.dispatch
        set token = pg_catalog.nextval('brightrun.lease_token'), due_at = v_now + p_hold
        from due where dispatch.job_id = due.job_id
        returning dispatch.*
    )
    select taken.job_id, taken.token, taken.endpoint, taken.external_id,
           extract(epoch from v_now - taken.sent_at)::float8, job_status.state, job_status.worker,
           job_status.claims <> taken.claims, job_status.cancel_requested_at is not null, job_status.payload
    from taken join brightrun.job_status on job_status.id = taken.job_id;
end
$$;

-- Look again after p_after.
create or replace function brightrun.dispatch_again(p_job_id uuid, p_token bigint, p_after interval) returns boolean
language plpgsql volatile security definer set search_path = '' as $$
begin
    update brightrun.dispatch set due_at = brightrun.now() + p_after where job_id = p_job_id and token = p_token;
    return found;
end
$$;

-- The run outside is over, or never began: a job that still waits may be dispatched again.
create or replace function brightrun.dispatch_over(p_job_id uuid, p_token bigint) returns boolean
language plpgsql volatile security definer set search_path = '' as $$
begin
    delete from brightrun.dispatch where job_id = p_job_id and token = p_token;
    return found;
end
$$;

-- Fails a waiting job as an attempt that no worker lived to begin. Its new state; null where it does not wait.
create or replace function brightrun._fail_waiting(p_job_id uuid, p_worker text, p_error jsonb) returns text
language plpgsql volatile set search_path = '' as $$
declare
    v_kind  text;
    v_lease brightrun.lease;
begin
    select kind into v_kind from brightrun.ready where job_id = p_job_id for update skip locked;
    if not found or brightrun._grant(v_kind, array[p_job_id], p_worker, interval '1 minute') = '{}' then
        return null;
    end if;
    select * into v_lease from brightrun.lease where job_id = p_job_id;
    return brightrun._fail(v_lease, p_error, null);
end
$$;

-- The run outside ended badly before any worker had claimed the job. Returns the job's new state, 'claimed' where a worker has
-- come after all, or null: the dispatch is not the caller's any more, or the job is just being claimed.
create or replace function brightrun.dispatch_failed(p_job_id uuid, p_token bigint, p_error jsonb) returns text
language plpgsql volatile security definer set search_path = '' as $$
declare
    v_dispatch brightrun.dispatch;
    v_claims   integer;
    v_state    text;
begin
    select * into v_dispatch from brightrun.dispatch where job_id = p_job_id and token = p_token for update;
    if not found then
        return null;
    end if;
    select claims into v_claims from brightrun.ready where job_id = p_job_id for update skip locked;
    if not found then
        return null;
    end if;
    if v_claims = v_dispatch.claims then
        v_state := brightrun._fail_waiting(p_job_id, 'endpoint ' || v_dispatch.endpoint, p_error);
        if v_state is null then
            return null;
        end if;
    end if;
    delete from brightrun.dispatch where job_id = p_job_id;
    return coalesce(v_state, 'claimed');
end
$$;

-- A waiting job that must not be sent at all, for what it would cost. Null where it does not wait any more.
create or replace function brightrun.dispatch_refuse(p_job_id uuid, p_error jsonb) returns text
language plpgsql volatile security definer set search_path = '' as $$
begin
    if exists (select from brightrun.dispatch where job_id = p_job_id) then
        return null;
    end if;
    return brightrun._fail_waiting(p_job_id, 'orchestrator', p_error);
end
$$;

-- What a user's jobs have cost since the month began (UTC), and what is set aside for those that are dispatched.
create or replace function brightrun.dispatch_spend(p_owner uuid) returns table (spent float8, reserved float8)
language sql stable security definer set search_path = '' as $$
  select (select coalesce(sum(amount), 0)::float8 from public.cost_records
           where user_id = p_owner and billing_period >= date_trunc('month', brightrun.now() at time zone 'utc')::date),
         (select coalesce(sum(dispatch.reserved), 0)::float8 from brightrun.dispatch where owner = p_owner)
$$;

-- Topics of the outbox that somebody reads, and until when: nothing is written for nobody.
create table if not exists brightrun.outbox_topic (
    topic        text primary key check (topic <> '' and length(topic) <= 100),
    wanted_until timestamptz not null
);
alter table brightrun.outbox_topic enable row level security;

create or replace function brightrun.outbox_subscribe(p_topic text, p_for interval) returns void
language sql volatile security definer set search_path = '' as $$
    insert into brightrun.outbox_topic (topic, wanted_until) values (p_topic, brightrun.now() + p_for)
    on conflict (topic) do update set wanted_until = greatest(outbox_topic.wanted_until, excluded.wanted_until)
$$;

-- A webhook per step that a user would want to hear of, in the transaction that makes it true.
create or replace function brightrun.on_training_job_told() returns trigger
language plpgsql security definer set search_path = '' as $$
begin
  if exists (select from brightrun.outbox_topic where topic = 'webhook' and wanted_until > brightrun.now()) then
    perform brightrun.outbox_put('webhook', jsonb_build_object(
      'type', 'training_job.' || new.status, 'timestamp', now(),
      'data', jsonb_build_object('job_id', new.id, 'user_id', new.user_id, 'status', new.status, 'artifact_id', new.artifact_id,
                                 'error_message', new.error_message, 'final_cost', new.final_cost)), new.id::text);
  end if;
  return null;
end $$;
create or replace trigger brightrun_told after update of status on public.training_jobs
  for each row when (new.status is distinct from old.status and new.status in ('running', 'completed', 'failed', 'cancelled'))
  execute function brightrun.on_training_job_told();

do $$
declare
    v_role text;
    v_name text;
begin
    foreach v_role in array array['brightrun_worker', 'service_role'] loop
        continue when to_regrole(v_role) is null;
        foreach v_name in array array[
            'dispatch_waiting(text,text,integer)', 'dispatch_begin(uuid,text,integer,numeric,numeric,interval)',
            'dispatch_sent(uuid,bigint,text,interval)', 'dispatch_take(integer,interval)',
            'dispatch_again(uuid,bigint,interval)', 'dispatch_over(uuid,bigint)', 'dispatch_failed(uuid,bigint,jsonb)',
            'dispatch_refuse(uuid,jsonb)', 'dispatch_spend(uuid)', 'outbox_subscribe(text,interval)'
        ] loop
            execute format('grant execute on function brightrun.%s to %I', v_name, v_role);
        end loop;
    end loop;
end $$;
-- <<< dispatch

-- =====================================================================================================================
-- 5  PRIVILEGES
-- =====================================================================================================================
-- Functions are executable by everybody unless revoked. Workers get theirs in section 3; nobody gets those of section 4.

revoke execute on all functions in schema brightrun from public;
revoke all on all tables in schema brightrun from public, anon, authenticated;
grant usage on schema brightrun to authenticated, service_role;
grant select on brightrun.dataset_issue to authenticated;
grant select (id, owner) on brightrun.job to authenticated;
grant select (job_id, seq, at, level, event, attempt, detail) on brightrun.event to authenticated;
revoke all on public.job_events from anon, authenticated;
grant select on public.job_events to authenticated, service_role;
grant select on all tables in schema brightrun to service_role;
revoke all on public.dataset_issues from anon, authenticated;
grant select on public.dataset_issues to authenticated, service_role;
revoke execute on function public.training_job_events(uuid) from public, anon;
grant execute on function public.training_job_events(uuid) to authenticated, service_role;

insert into brightrun.version (section, version) values ('app', 1)
on conflict (section) do update set version = excluded.version, applied_at = excluded.applied_at;
