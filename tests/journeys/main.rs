//! What a user lives through, from the row in the database to the adapter in storage: real Postgres, real files, the real
//! handlers or the real binary, and a model so small that a job takes a second.

#![allow(clippy::unwrap_used, clippy::panic, missing_docs)]

#[path = "../support/database.rs"]
#[allow(dead_code)]
mod database;
#[path = "../support/fake_runpod.rs"]
mod fake_runpod;
#[path = "../support/supabase_storage.rs"]
mod supabase_storage;
mod world;

mod cancel;
mod cli;
mod crash_resume;
mod datasets;
mod faults;
mod first_adapter;
mod full_disk;
mod push;
mod push_from_database;
mod race;
mod runpod;
mod secrets;
mod trouble;
mod webhooks;
