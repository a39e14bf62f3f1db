//! `schema.sql` can be applied to an empty database, to the owner's deployed tables and to a Supabase project, any number
//! of times, and takes nothing away from anybody.

#![allow(clippy::unwrap_used, clippy::panic, missing_docs)]

#[path = "support/database.rs"]
#[allow(dead_code)]
mod database;

use brightrun_queue::private_server::{Options, PrivateServer};
use database::{Database, SCHEMA, sqlstate};
use serde_json::{Value, json};
use tokio_postgres::Client;
use uuid::Uuid;

const OWNER_MIGRATION: &str = include_str!("fixtures/owner_migration.sql");
const SUPABASE_PLATFORM: &str = include_str!("fixtures/supabase_platform.sql");

/// Everything that a second application could change by mistake, as text.
const CATALOG: &str = "
    select jsonb_build_object(
      'columns', (select jsonb_agg(concat_ws(' ', table_schema, table_name, column_name, data_type, column_default,
                                             is_nullable) order by table_schema, table_name, ordinal_position)
                    from information_schema.columns where table_schema in ('public', 'auth', 'storage', 'brightrun')
                     and table_name not like 'event\\_2%'),
      'constraints', (select jsonb_agg(concat_ws(' ', conrelid::regclass, conname, pg_get_constraintdef(oid))
                                       order by conrelid::regclass::text, conname)
                        from pg_constraint where connamespace::regnamespace::text in ('public', 'auth', 'storage', 'brightrun')
                         and conrelid::regclass::text not like '%event\\_2%'),
      'indexes', (select jsonb_agg(indexdef order by indexdef) from pg_indexes
                   where schemaname in ('public', 'auth', 'storage', 'brightrun') and tablename not like 'event\\_2%'),
      'policies', (select jsonb_agg(to_jsonb(p) order by p.tablename, p.policyname) from pg_policies p),
      'triggers', (select jsonb_agg(pg_get_triggerdef(oid) order by pg_get_triggerdef(oid)) from pg_trigger
                    where not tgisinternal),
      'functions', (select jsonb_agg(pg_get_functiondef(oid) order by pg_get_functiondef(oid)) from pg_proc
                     where pronamespace::regnamespace::text in ('public', 'auth', 'storage', 'brightrun')),
      'grants', (select jsonb_agg(concat_ws(' ', table_schema, table_name, grantee, privilege_type)
                                  order by table_schema, table_name, grantee, privilege_type)
                   from information_schema.role_table_grants
                  where table_schema in ('public', 'auth', 'storage', 'brightrun') and table_name not like 'event\\_2%'),
      'buckets', (select jsonb_agg(to_jsonb(b) - array['created_at', 'updated_at'] order by b.id) from storage.buckets b))";

async fn catalog(client: &Client) -> Value {
    client.query_one(CATALOG, &[]).await.unwrap().get(0)
}

async fn values(client: &Client, query: &str) -> Vec<String> {
    client
        .query(query, &[])
        .await
        .unwrap()
        .iter()
        .map(|row| row.get(0))
        .collect()
}

#[tokio::test]
async fn a_second_application_changes_nothing() {
    let database = Database::migrated().await;
    let first = catalog(&database.owner).await;
    database.owner.batch_execute(SCHEMA).await.unwrap();
    let second = catalog(&database.owner).await;
    assert_same_catalog(&first, &second);
}

fn assert_same_catalog(one: &Value, other: &Value) {
    for part in [
        "columns",
        "constraints",
        "indexes",
        "policies",
        "triggers",
        "functions",
        "grants",
        "buckets",
    ] {
        let (had, has) = (one[part].as_array().unwrap(), other[part].as_array().unwrap());
        assert!(!had.is_empty(), "there are {part}");
        let lost: Vec<_> = had.iter().filter(|item| !has.contains(item)).collect();
        let new: Vec<_> = has.iter().filter(|item| !had.contains(item)).collect();
        assert!(
            lost.is_empty() && new.is_empty(),
            "{part}: lost {lost:#?}, new {new:#?}"
        );
    }
}

#[tokio::test]
async fn statements_may_arrive_one_by_one() {
    let database = Database::empty().await;
    for statement in split_statements(SCHEMA) {
        database
            .owner
            .batch_execute(&statement)
            .await
            .unwrap_or_else(|error| panic!("{error:?} in {statement}"));
    }
    let one_by_one = catalog(&database.owner).await;
    assert_same_catalog(&one_by_one, &catalog(&Database::migrated().await.owner).await);
}

/// Splits at semicolons that end a line outside `$tag$` quotes, as SQL editors do.
fn split_statements(text: &str) -> Vec<String> {
    let mut statements = Vec::new();
    let mut statement = String::new();
    let mut open_tag: Option<&str> = None;
    for line in text.lines() {
        let code = if open_tag.is_none() {
            line.split("--").next().unwrap_or("")
        } else {
            line
        };
        for tag in ["$function$", "$$"] {
            for _ in 0..code.matches(tag).count() {
                open_tag = match open_tag {
                    None => Some(tag),
                    Some(open) if open == tag => None,
                    other => other,
                };
            }
        }
        statement.push_str(line);
        statement.push('\n');
        if open_tag.is_none() && code.trim_end().ends_with(';') {
            statements.push(std::mem::take(&mut statement));
        }
    }
    statements
}

#[tokio::test]
async fn databases_of_one_cluster_can_be_migrated_at_the_same_time() {
    let (one, two, three) = tokio::join!(Database::empty(), Database::empty(), Database::empty());
    let (first, second, third) = tokio::join!(
        one.owner.batch_execute(SCHEMA),
        two.owner.batch_execute(SCHEMA),
        three.owner.batch_execute(SCHEMA)
    );
    first.and(second).and(third).unwrap();
}

#[tokio::test]
async fn two_sessions_can_migrate_one_database_at_the_same_time() {
    let database = Database::empty().await;
    let other = database.connect().await;
    let (first, second) = tokio::join!(database.owner.batch_execute(SCHEMA), other.batch_execute(SCHEMA));
    first.and(second).unwrap();
}

/// The owner's tables and rows on a platform that is there already.
async fn deployed() -> Database {
    let database = Database::migrated().await; // Brings the roles and the platform's stand-ins …
    database
        .owner
        .batch_execute(
            "drop schema brightrun cascade; drop schema public cascade; create schema public; -- … and nothing else stays.
             grant usage on schema public to public;
             delete from storage.buckets;",
        )
        .await
        .unwrap();
    database.owner.batch_execute(OWNER_MIGRATION).await.unwrap();
    database
}

/// Every row of the owner's tables without the columns that a migration may add.
async fn owner_rows(client: &Client) -> Value {
    let query = "
        select jsonb_build_object(
          'datasets', (select jsonb_agg(to_jsonb(t) - 'error_message' order by id) from datasets t),
          'training_jobs', (select jsonb_agg(to_jsonb(t) order by id) from training_jobs t),
          'metrics_points', (select jsonb_agg(to_jsonb(t) order by id) from metrics_points t),
          'model_artifacts', (select jsonb_agg(to_jsonb(t) order by id) from model_artifacts t),
          'cost_records', (select jsonb_agg(to_jsonb(t) order by id) from cost_records t),
          'notifications', (select jsonb_agg(to_jsonb(t) order by id) from notifications t))";
    client.query_one(query, &[]).await.unwrap().get(0)
}

#[tokio::test]
async fn over_the_owners_tables_no_row_changes() {
    let database = deployed().await;
    let before = owner_rows(&database.owner).await;
    for _ in 0..3 {
        database.owner.batch_execute(SCHEMA).await.unwrap();
        assert_eq!(owner_rows(&database.owner).await, before);
    }
}

#[tokio::test]
async fn over_the_owners_tables_only_what_is_missing_is_added() {
    let database = deployed().await;
    let old = catalog(&database.owner).await;
    database.owner.batch_execute(SCHEMA).await.unwrap();
    let new = catalog(&database.owner).await;
    let added = |part: &str| -> Vec<String> {
        let had = old[part].as_array().unwrap();
        let ours = |text: &&str| {
            ["brightrun", "training_file", "dataset_issues", "job_events"]
                .iter()
                .all(|name| !text.contains(name))
        };
        new[part]
            .as_array()
            .unwrap()
            .iter()
            .filter(|item| !had.contains(item))
            .filter_map(Value::as_str)
            .filter(ours)
            .map(str::to_owned)
            .collect()
    };
    assert_eq!(added("columns"), ["public datasets error_message text YES"]);
    assert_eq!(added("constraints"), Vec::<String>::new());
    assert_eq!(
        added("indexes"),
        ["CREATE INDEX idx_cost_records_job_id ON public.cost_records USING btree (job_id)"],
        "an index that exists under another name is not made twice"
    );
    assert_eq!(
        added("triggers"),
        Vec::<String>::new(),
        "updated_at is kept by the owner's own triggers"
    );
    let foreign_keys = values(
        &database.owner,
        "select conname::text from pg_constraint where contype = 'f' and conrelid = 'training_jobs'::regclass
            and confrelid = 'datasets'::regclass",
    )
    .await;
    assert_eq!(foreign_keys.len(), 1, "PostgREST refuses an ambiguous embed");
}

#[tokio::test]
async fn rows_that_waited_before_the_migration_are_enqueued_once() {
    let database = deployed().await;
    for _ in 0..2 {
        database.owner.batch_execute(SCHEMA).await.unwrap();
        let jobs = values(
            &database.owner,
            "select kind || ' ' || state from brightrun.jobs() order by 1",
        )
        .await;
        assert_eq!(jobs, ["train ready", "validate_dataset ready"]);
    }
    let payload = database.json("select payload from brightrun.jobs('train')", &[]).await;
    assert_eq!(payload["job_id"], json!("00000000-0000-4000-8000-000000000003"));
    assert_eq!(payload["dataset"]["storage_path"], json!("old/anywhere/set.jsonl"));
}

#[tokio::test]
async fn a_dangling_artifact_does_not_stop_the_migration() {
    let database = deployed().await;
    database
        .owner
        .batch_execute(
            "alter table training_jobs drop constraint fk_training_jobs_artifact;
             update training_jobs set artifact_id = gen_random_uuid() where status = 'failed';",
        )
        .await
        .unwrap();
    database.owner.batch_execute(SCHEMA).await.unwrap();
    let refused = database
        .owner
        .execute(
            "update training_jobs set artifact_id = gen_random_uuid() where status = 'completed'",
            &[],
        )
        .await
        .unwrap_err();
    assert_eq!(sqlstate(&refused), "23503", "new rows are held to it");
}

/// A project as the platform hands it over: its role is no superuser and owns nothing outside `public`.
async fn project(default_grants: bool) -> (Database, Client) {
    let _roles = Database::migrated().await;
    let database = Database::empty().await;
    let role = format!("project_{}", Uuid::new_v4().simple());
    database.owner.batch_execute(SUPABASE_PLATFORM).await.unwrap();
    database
        .owner
        .batch_execute(&format!(
            "create role {role} login createdb createrole bypassrls;
             do $$ begin execute format('grant create on database %I to {role}', current_database()); end $$;
             grant all on schema public to {role}; alter schema public owner to {role};"
        ))
        .await
        .unwrap();
    let project = database.connect_as(&role).await;
    if default_grants {
        project
            .batch_execute(
                "alter default privileges in schema public grant all on tables to anon, authenticated, service_role",
            )
            .await
            .unwrap();
    }
    (database, project)
}

#[tokio::test]
async fn a_supabase_project_needs_no_superuser_and_keeps_what_is_the_platforms() {
    for default_grants in [false, true] {
        let (database, project) = project(default_grants).await;
        let foreign = "select jsonb_build_object(
            'functions', (select jsonb_agg(pg_get_functiondef(oid) order by oid) from pg_proc
                           where pronamespace::regnamespace::text in ('auth', 'storage')),
            'columns', (select jsonb_agg(concat_ws(' ', table_name, column_name, data_type, column_default)
                                          order by table_name, column_name)
                          from information_schema.columns where table_schema in ('auth', 'storage')),
            'triggers', (select count(*) from pg_trigger join pg_class c on c.oid = tgrelid
                          where c.relnamespace::regnamespace::text in ('auth', 'storage') and not tgisinternal),
            'hand-made bucket', (select to_jsonb(b) from storage.buckets b where id = 'lora-models'))";
        let before = database.json(foreign, &[]).await;
        for _ in 0..2 {
            project.batch_execute(SCHEMA).await.unwrap();
        }
        assert_eq!(database.json(foreign, &[]).await, before);
        let buckets = values(&database.owner, "select id from storage.buckets order by id").await;
        assert_eq!(
            buckets,
            ["conversation-files", "lora-datasets", "lora-models", "training-files"]
        );
    }
}

#[tokio::test]
async fn old_and_new_default_grants_end_in_the_same_rights() {
    let rights = "select concat_ws(' ', table_name, grantee, privilege_type) from information_schema.role_table_grants
                   where table_schema = 'public' and grantee in ('anon', 'authenticated') order by 1";
    let mut found = Vec::new();
    for default_grants in [false, true] {
        let (database, project) = project(default_grants).await;
        project.batch_execute(SCHEMA).await.unwrap();
        found.push(values(&database.owner, rights).await);
    }
    assert_eq!(found[0], found[1]);
    assert!(found[0].contains(&"training_jobs authenticated UPDATE".to_owned()));
}

#[tokio::test]
async fn on_a_supabase_project_the_triggers_work_for_a_signed_in_user() {
    let (database, project) = project(false).await;
    project.batch_execute(SCHEMA).await.unwrap();
    let user = database.user().await;
    let dataset = database.ready_dataset(user).await;
    let mut app = database.signed_in(user).await;
    let job = app.insert_job(dataset).await.unwrap();
    assert_eq!(database.engine_state(job).await.as_deref(), Some("ready"));
    assert_eq!(app.cancel_job(job, 0.0).await.unwrap(), 1);
    assert_eq!(database.engine_state(job).await.as_deref(), Some("cancelled"));
}

#[tokio::test]
async fn a_plain_cluster_needs_no_superuser_either() {
    let server = PrivateServer::start(&Options::default()).unwrap();
    let connect = async |role: &str, database: &str| {
        let mut config: tokio_postgres::Config = server.url(database).parse().unwrap();
        let (client, connection) = config.user(role).connect(tokio_postgres::NoTls).await.unwrap();
        tokio::spawn(connection);
        client
    };
    let superuser = connect("postgres", "postgres").await;
    superuser
        .batch_execute("create role project login createdb createrole")
        .await
        .unwrap();
    connect("project", "postgres")
        .await
        .batch_execute("create database app")
        .await
        .unwrap();
    let project = connect("project", "app").await;
    for _ in 0..2 {
        project.batch_execute(SCHEMA).await.unwrap();
    }
    let roles = "select rolname::text from pg_roles where rolname in
                 ('anon', 'authenticated', 'service_role', 'authenticator', 'brightrun_worker') order by 1";
    assert_eq!(
        values(&project, roles).await,
        [
            "anon",
            "authenticated",
            "authenticator",
            "brightrun_worker",
            "service_role"
        ]
    );
    server.stop().unwrap();
}

#[tokio::test]
async fn the_stand_ins_behave_as_the_platforms_functions() {
    let database = Database::migrated().await;
    let row = database
        .owner
        .query_one(
            "select storage.foldername('a/b/c.tar.gz'), storage.filename('a/b/c.tar.gz'), storage.extension('a/b/c.tar.gz'),
                    storage.foldername('c.txt'), auth.uid(), auth.role()",
            &[],
        )
        .await
        .unwrap();
    assert_eq!(row.get::<_, Vec<String>>(0), ["a", "b"]);
    assert_eq!(row.get::<_, String>(1), "c.tar.gz");
    assert_eq!(row.get::<_, String>(2), "gz");
    assert_eq!(row.get::<_, Vec<String>>(3), Vec::<String>::new());
    assert_eq!(row.get::<_, Option<Uuid>>(4), None);
    assert_eq!(row.get::<_, Option<String>>(5), None);

    let user = Uuid::new_v4();
    let mut api = database.signed_in(user).await;
    let row = api
        .query("select auth.uid(), auth.role(), auth.jwt() ->> 'sub'", &[])
        .await
        .unwrap();
    assert_eq!(row[0].get::<_, Uuid>(0), user);
    assert_eq!(row[0].get::<_, String>(1), "authenticated");
    assert_eq!(row[0].get::<_, String>(2), user.to_string());
    let older = database
        .owner
        .query_one(
            "select set_config('request.jwt.claim.sub', $1, false), auth.uid()",
            &[&user.to_string()],
        )
        .await
        .unwrap();
    assert_eq!(
        older.get::<_, Uuid>(1),
        user,
        "older PostgREST sets one setting per claim"
    );
}

#[tokio::test]
async fn object_rows_cannot_be_deleted_by_sql() {
    let database = Database::migrated().await;
    database
        .owner
        .execute(
            "insert into storage.objects (bucket_id, name) values ('lora-datasets', 'someone/file.jsonl')",
            &[],
        )
        .await
        .unwrap();
    let refused = database
        .owner
        .execute("delete from storage.objects", &[])
        .await
        .unwrap_err();
    assert_eq!(sqlstate(&refused), "42501");
}

/// What the platform's webhooks are: a trigger on a table, whose function posts this. The real one posts by pg_net.
const WEBHOOKS: &str = "
    create schema supabase_functions;
    create table supabase_functions.posted (seq serial, url text, method text, headers jsonb, body jsonb);
    grant usage on schema supabase_functions to public; grant all on all tables in schema supabase_functions to public;
    grant all on all sequences in schema supabase_functions to public;
    create function supabase_functions.http_request() returns trigger language plpgsql security definer set search_path = '' as $$
    begin
      insert into supabase_functions.posted (url, method, headers, body) values (tg_argv[0], tg_argv[1], tg_argv[2]::jsonb,
        jsonb_build_object('type', tg_op, 'table', tg_table_name, 'schema', tg_table_schema,
                           'record', to_jsonb(new), 'old_record', to_jsonb(old)));
      return new;
    end $$;
    create trigger told_outside after insert or update on public.training_jobs for each row execute function
      supabase_functions.http_request('https://example.org/hook', 'POST', '{\"content-type\": \"application/json\"}', '{}', '5000');";

/// A webhook made in the dashboard outlives the migration, and is told of every change of the app's rows, whoever made it.
#[tokio::test]
async fn a_projects_own_webhooks_stay_and_hear_of_what_the_engine_does() {
    let (database, project) = project(false).await;
    project.batch_execute(SCHEMA).await.unwrap();
    database.owner.batch_execute(WEBHOOKS).await.unwrap();
    project.batch_execute(SCHEMA).await.unwrap();
    let user = database.user().await;
    let dataset = database.ready_dataset(user).await;
    let job = database.signed_in(user).await.insert_job(dataset).await.unwrap();
    let run = database::Run::claim(&database, "train").await;
    run.fail(json!({ "code": "DATA_EMPTY", "blame": "user", "message": "No lines." }))
        .await;
    let posted = values(
        &database.owner,
        "select concat_ws(' ', body ->> 'type', body ->> 'schema', body ->> 'table', body -> 'old_record' ->> 'status', '→',
                          body -> 'record' ->> 'status') from supabase_functions.posted order by seq",
    )
    .await;
    assert_eq!(posted.first().unwrap(), "INSERT public training_jobs → queued");
    for step in ["queued → initializing", "initializing → failed"] {
        let step = format!("UPDATE public training_jobs {step}");
        assert!(posted.contains(&step), "{step} is not in {posted:?}");
    }
    let last = database
        .json(
            "select body from supabase_functions.posted order by seq desc limit 1",
            &[],
        )
        .await;
    assert_eq!(last["record"]["id"], json!(job));
    let keys: Vec<&String> = last.as_object().unwrap().keys().collect();
    assert_eq!(keys.len(), 5, "type, table, schema, record, old_record: {keys:?}");
}
