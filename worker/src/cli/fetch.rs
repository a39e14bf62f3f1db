//! `brightrun fetch`: a model from a hub to the volume.

use std::path::PathBuf;
use std::time::Instant;

use clap::Args;
use serde_json::json;

use super::OutputArguments;
use super::model::byte_bar;
use super::output::{self, print_json, print_line};
use crate::error::Result;
use crate::hub::{self, FetchRequest, Hub, System};
use crate::model::ModelConfig;
use crate::model::checkpoint::Checkpoint;
use crate::model::locate::ModelRoots;

/// `fetch`.
#[derive(Debug, Args)]
pub struct FetchArguments {
    /// The model, as Organisation/Name
    pub model: String,
    /// Branch, tag or commit
    #[arg(long, default_value = "main")]
    pub revision: String,
    /// Its folder [default: models/Organisation/Name on the mounted volume]
    #[arg(long, value_name = "DIR")]
    pub to: Option<PathBuf>,
    /// Hash again what is there already
    #[arg(long)]
    pub verify: bool,
    /// Use no network: only say whether everything is there
    #[arg(long, env = "HF_HUB_OFFLINE", value_parser = clap::builder::BoolishValueParser::new())]
    pub offline: bool,
    /// Output form.
    #[command(flatten)]
    pub output: OutputArguments,
}

/// `brightrun fetch`.
pub async fn fetch(arguments: &FetchArguments) -> Result<()> {
    let volumes = ModelRoots::of_environment().volumes;
    let folder = match &arguments.to {
        Some(folder) => folder.clone(),
        None => hub::default_folder(&arguments.model, &volumes, &System)?,
    };
    if arguments.offline {
        let record = hub::offline(&arguments.model, &folder)?;
        return match arguments.output.json {
            true => print_json(&json!({"folder": folder, "revision": record.revision, "files": record.files.len()})),
            false => print_line(&format!("{} is complete at {}", record.model, folder.display())),
        };
    }
    let hub = Hub::from_variables(|name| std::env::var(name).ok())?;
    let request = FetchRequest {
        model: &arguments.model,
        revision: &arguments.revision,
        folder: &folder,
        volumes: &volumes,
        verify: arguments.verify,
    };
    let bar = byte_bar("fetching");
    let began = Instant::now();
    let fetched = hub::fetch(&hub, &request, &System, &mut |progress| {
        bar.set_length(progress.bytes_total);
        bar.set_position(progress.bytes);
    })
    .await;
    bar.finish_and_clear();
    let fetched = fetched?;
    // What the files say of themselves: every shard there, every header and length right.
    let config = ModelConfig::load(&folder)?;
    let checkpoint = Checkpoint::open(&folder)?.with_fp8_blocks(config.fp8_block)?;
    checkpoint.check(&config.tensors_with(checkpoint.expert_storage()))?;
    let seconds = began.elapsed().as_secs_f64();
    if arguments.output.json {
        return print_json(&json!({"folder": folder, "fetched": fetched, "seconds": seconds}));
    }
    print_line(&format!(
        "{} files, {}, at {}; {} came over the network in {}",
        fetched.files,
        output::bytes(fetched.bytes),
        folder.display(),
        output::bytes(fetched.downloaded),
        output::duration(seconds)
    ))
}
