//! `brightrun deploy --dry-run`: shows the calls that create a RunPod endpoint.

use serde_json::json;

use super::DeployArguments;
use super::output::{print_json, print_line};
use crate::error::{Failure, Result};
use crate::runpod::deploy::{Deployment, calls};

/// Prints the calls.
pub fn deploy(arguments: &DeployArguments) -> Result<()> {
    if !arguments.dry_run {
        return Err(
            Failure::user("DEPLOY_ONLY_SHOWN", "This program shows the calls and sends none")
                .at("the command line")
                .hint("Give --dry-run, check what is printed, and send it with your own key"),
        );
    }
    let text = std::fs::read_to_string(&arguments.file).map_err(|error| {
        Failure::user(
            "DEPLOY_FILE_INVALID",
            format!("The project file cannot be read: {error}"),
        )
        .at(arguments.file.display().to_string())
    })?;
    let deployment = Deployment {
        image: &arguments.image,
        volume: arguments.volume.as_deref(),
    };
    let calls = calls(&text, &deployment)?;
    if arguments.output.json {
        let calls: Vec<_> = calls
            .iter()
            .map(|call| json!({"method": call.method, "url": call.url, "body": call.body}))
            .collect();
        return print_json(&json!(calls));
    }
    for call in calls {
        print_line(&format!("{} {}", call.method, call.url))?;
        print_line("Authorization: Bearer $RUNPOD_API_KEY")?;
        print_line(&format!("{:#}\n", call.body))?;
    }
    Ok(())
}
