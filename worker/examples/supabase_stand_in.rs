//! Serves the tests' stand-in for Supabase Storage until its standard input ends, so that other clients
//! can be tried against it. Prints the project URL; the key is its first argument.

use std::io::Read;

#[allow(clippy::unwrap_used, reason = "shared with the tests, which use all of it")]
#[path = "../../tests/support/supabase_storage.rs"]
mod supabase_storage;

#[tokio::main]
async fn main() -> std::io::Result<()> {
    let key = std::env::args().nth(1).unwrap_or_else(|| "sb_secret_fake".to_owned());
    let server = supabase_storage::SupabaseStandIn::start(&[&key]).await;
    println!("{}", server.url);
    tokio::task::spawn_blocking(|| std::io::stdin().read_to_end(&mut Vec::new())).await??;
    Ok(())
}
