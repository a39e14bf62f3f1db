//! A worker whose disk is full: the job says so, nothing half-written is delivered, and elsewhere it succeeds.

use std::process::{Child, Command};

use crate::database::eventually;
use crate::world::World;

/// How a process gets a mount of its own here: as root, or as root of a user namespace. `None` where neither is allowed.
fn own_mounts() -> Option<&'static [&'static str]> {
    let ways: [&[&str]; 2] = [&["-m"], &["-r", "-m"]];
    ways.into_iter().find(|way| {
        let probe = "mount -t tmpfs -o size=64k tmpfs /mnt";
        let tried = Command::new("unshare").args(*way).args(["sh", "-c", probe]).output();
        tried.is_ok_and(|output| output.status.success())
    })
}

/// A worker that does not outlive the test, however that ends.
struct Confined(Child);

impl Drop for Confined {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Runs a job on a work folder of `size`, and then on one with room.
async fn a_disk_that_fills_up(size: &str) {
    let Some(way) = own_mounts() else {
        println!("full disk: absent (this system gives no mount of its own; nothing was tested)");
        return;
    };
    let mut world = World::new().await;
    let job = world.job(10, 2).await;
    let work = world.config.worker.work_dir.clone();
    std::fs::create_dir_all(&work).unwrap();
    let ordinary = world.brightrun(&["worker"]);
    let script = format!("mount -t tmpfs -o size={size} tmpfs {} && exec \"$@\"", work.display());
    let mut confined = Command::new("unshare");
    confined
        .args(way)
        .args(["sh", "-c", &script, "sh"])
        .arg(ordinary.get_program());
    confined.args(ordinary.get_args()).current_dir(world.folder.path());
    for (name, value) in ordinary.get_envs() {
        match value {
            Some(value) => confined.env(name, value),
            None => confined.env_remove(name),
        };
    }
    let log = std::fs::File::create(world.folder.path().join("confined.log")).unwrap();
    let worker = Confined(confined.stderr(log).spawn().unwrap());
    let failed = "brightrun.event where job_id = $1 and event = 'retry'";
    eventually("an attempt fails", || async {
        world.database.count(failed, &[&job]).await > 0
    })
    .await;
    drop(worker);
    let said = world
        .database
        .json(
            "select detail from brightrun.event where job_id = $1 and event = 'retry'",
            &[&job],
        )
        .await;
    assert!(said.to_string().contains("STORAGE_DISK_FULL"), "{said:#}");
    assert_eq!(world.database.count("model_artifacts", &[]).await, 0);
    assert!(!world.delivered(job, "adapter_model.safetensors").exists());

    world.config.worker.work_dir = world.folder.path().join("roomy");
    let worker = world.worker().await;
    let row = world.becomes(job, "completed").await;
    worker.stop().await;
    assert!(row["error_message"].is_null(), "{row:#}");
    assert!(!world.adapter(job).is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_disk_too_full_for_the_data_set_is_named_and_another_machine_finishes_the_job() {
    a_disk_that_fills_up("4k").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_disk_too_full_for_a_checkpoint_is_named_and_another_machine_finishes_the_job() {
    a_disk_that_fills_up("24k").await;
}
