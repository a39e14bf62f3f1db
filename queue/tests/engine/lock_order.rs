//! Lock order: an app's transaction never waits for a worker, and nobody deadlocks.

use std::time::Duration;

use brightrun_queue::{CancelReply, JobState};
use serde_json::json;

use crate::support::{Database, LONG, database, eventually};

/// How many sessions of this database wait for a lock while calling `function`.
async fn waiting_in(db: &Database, function: &str) -> Option<()> {
    let row = db
        .client()
        .await
        .query_one(
            "select count(*) from pg_stat_activity
             where datname = current_database() and wait_event_type = 'Lock' and query like '%brightrun.' || $1 || '(%'",
            &[&function],
        )
        .await
        .unwrap();
    (row.get::<_, i64>(0) > 0).then_some(())
}

/// The classic deadlock: the app locks its row and asks for a cancel, while the worker holds the
/// lease and wants the app's row.
#[tokio::test(flavor = "multi_thread")]
async fn the_apps_cancel_wins_against_a_completion_that_waits_for_the_apps_row() {
    let db = database().await;
    db.with_projector("work").await;
    let lease = db.running("work").await;
    let mut app = db.client().await;
    app.execute("insert into public.app values ($1, 'running')", &[&lease.job_id])
        .await
        .unwrap();

    let transaction = app.transaction().await.unwrap();
    transaction
        .execute(
            "update public.app set status = 'cancelled' where id = $1",
            &[&lease.job_id],
        )
        .await
        .unwrap();
    let queue = db.queue.clone();
    let completing = tokio::spawn(async move { queue.complete(&lease, &json!({})).await });
    eventually("the completion waits for the app's row", || waiting_in(&db, "complete")).await;
    // The worker holds the lease row now. The app must get through without waiting for it.
    let cancel = async {
        transaction
            .query_one("select brightrun.cancel($1, 'by the app')", &[&lease.job_id])
            .await
    };
    let told: String = tokio::time::timeout(Duration::from_secs(20), cancel)
        .await
        .unwrap()
        .unwrap()
        .get(0);
    assert_eq!(told, "cancel_requested");
    transaction.commit().await.unwrap();

    assert_eq!(completing.await.unwrap().unwrap(), JobState::Cancelled);
    assert_eq!(db.told_names(lease.job_id).await.last().unwrap(), "cancelled");
    let row = app.query_one("select status from public.app", &[]).await.unwrap();
    assert_eq!(row.get::<_, &str>(0), "cancelled");
    db.assert_whole().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cancel_that_meets_a_claim_in_flight_is_delivered_to_it() {
    let db = database().await;
    db.with_projector("work").await;
    let id = db.enqueue("work").await;
    let mut app = db.client().await;
    app.execute("insert into public.app values ($1, 'queued')", &[&id])
        .await
        .unwrap();
    let transaction = app.transaction().await.unwrap();
    transaction
        .execute("update public.app set status = 'cancelled' where id = $1", &[&id])
        .await
        .unwrap();
    let queue = db.queue.clone();
    let claiming = tokio::spawn(async move { queue.claim_job("w", id, LONG).await });
    eventually("the claim waits for the app's row", || waiting_in(&db, "claim_job")).await;
    let told: String = transaction
        .query_one("select brightrun.cancel($1)", &[&id])
        .await
        .unwrap()
        .get(0);
    transaction.commit().await.unwrap();
    assert!(["cancelled", "cancel_requested"].contains(&told.as_str()));
    // The claim either saw the request after the wait or stepped aside when its patience ended.
    assert_eq!(claiming.await.unwrap().unwrap(), None);
    let again = db.queue.cancel(id, None).await.unwrap();
    assert!(
        matches!(
            again,
            CancelReply::Cancelled | CancelReply::AlreadyEnded(JobState::Cancelled)
        ),
        "{again:?}"
    );
    assert_eq!(db.state(id).await, "cancelled");
    db.assert_whole().await;
}

/// The app updates many rows at once, in an order of its own, against workers that claim and end.
#[tokio::test(flavor = "multi_thread")]
async fn an_apps_bulk_cancel_is_never_a_deadlocks_victim() {
    let db = database().await;
    db.with_projector("work").await;
    let app = db.client().await;
    app.batch_execute(
        "create function public.follow() returns trigger language plpgsql as $$
         begin
             if new.status = 'cancelled' and old.status is distinct from 'cancelled' then
                 perform brightrun.cancel(new.id, 'by the app');
             end if;
             return null;
         end $$;
         create trigger follow after update on public.app for each row execute function public.follow();
         insert into public.app select brightrun.enqueue('work'), 'queued' from generate_series(1, 60);",
    )
    .await
    .unwrap();
    let mut workers = tokio::task::JoinSet::new();
    for number in 0..3 {
        let queue = db.queue.clone();
        workers.spawn(async move {
            let mut request = crate::support::request(&format!("w{number}"), &["work"], 4);
            request.lease = LONG;
            for _ in 0..30 {
                for job in queue.claim(&request).await.unwrap() {
                    queue.complete(&job.lease, &json!({})).await.unwrap();
                }
            }
        });
    }
    let mut cancels = tokio::task::JoinSet::new();
    for order in ["asc", "desc"] {
        let client = db.client().await;
        cancels.spawn(async move {
            // Both orders, but each transaction takes rows one by one: only workers can get in its way.
            for _ in 0..5 {
                client
                    .batch_execute(&format!(
                        "do $$ declare r record; begin
                             for r in select id from public.app where status in ('queued', 'claimed') order by id {order} limit 5 loop
                                 update public.app set status = 'cancelled' where id = r.id and status in ('queued', 'claimed');
                                 exit when random() < 0.2;
                             end loop;
                         end $$"
                    ))
                    .await
                    .unwrap();
            }
        });
        // One after the other: two bulk updates in opposite orders are the app's own deadlock.
        while let Some(done) = cancels.join_next().await {
            done.unwrap();
        }
    }
    workers.join_all().await;
    let row = app
        .query_one(
            "select count(*) from public.app join brightrun.job using (id)
             where (app.status = 'cancelled') is distinct from (job.outcome is not distinct from 'cancelled' or job.cancel_requested_at is not null)",
            &[],
        )
        .await
        .unwrap();
    assert_eq!(row.get::<_, i64>(0), 0, "app and engine agree about every cancel");
    db.assert_whole().await;
}
