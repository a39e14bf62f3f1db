//! The command line: what each command is called and takes.
//!
//! One file per group of commands. Every command that a script may read has `--json`: one JSON object on standard output
//! (one per step for `train`), nothing else there. Human text goes to standard output, progress bars and logs to standard error.
//! Exit codes: 0 success, 1 the user's input is at fault, 2 wrong usage, 3 this machine or a service is at fault.

mod bench;
mod deploy;
pub(crate) mod device;
mod doctor;
pub mod export;
mod fetch;
mod kernels;
mod model;
pub mod output;
pub mod plan;
mod queue;
mod queue_limits;
mod serverless;
pub mod service;
mod snapshot;
mod synth;
mod validate;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Args, CommandFactory, Parser, Subcommand, ValueEnum};
use uuid::Uuid;

use crate::config::{Config, DeviceChoice};
use crate::error::{Failure, Result};
use crate::runpod::LocalFlags;
use crate::spec::{BaseDtype, OptimizerKind, Order, Schedule, Supervise, TrainSpec};

/// Trains LoRA adapters from rows of a Postgres table.
#[derive(Debug, Parser)]
#[command(name = "brightrun", version, about, propagate_version = true)]
pub struct Cli {
    /// Configuration file (TOML); default `./brightrun.toml` if it exists
    #[arg(long, global = true, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// What computes [setting: worker.device]
    #[arg(long, global = true, value_enum)]
    pub device: Option<DeviceFlag>,
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// Every command.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Run the main job here: private Postgres, local folder, miniature model
    Demo(DemoArguments),
    /// Create or update the database schema (`DATABASE_URL`)
    Migrate,
    /// Validate datasets, push jobs to RunPod endpoints, rescue abandoned jobs
    Orchestrate(OrchestrateArguments),
    /// Train jobs: from the queue, from RunPod where it has started this process, or from a local API
    Worker(WorkerArguments),
    /// Upload a dataset file and queue a training job for it
    Enqueue(EnqueueArguments),
    /// Show a job
    Status(JobArguments),
    /// Follow a job: progress bar, loss, tokens/s, time left
    Watch(JobArguments),
    /// Cancel a job
    Cancel(JobArguments),
    /// Check a dataset file and report every problem
    Validate(ValidateArguments),
    /// Show one dataset line as text, tokens and loss mask
    Inspect(InspectArguments),
    /// Tokens, steps, memory, time and cost of a training run on this machine
    Estimate(EstimateArguments),
    /// Parameters, memory, speed and cost of a training run, from a model's configuration alone
    Plan(plan::PlanArguments),
    /// Measure whole training steps on this machine, without a checkpoint
    Bench(bench::BenchArguments),
    /// Train an adapter from files, without a database
    Train(TrainArguments),
    /// Mean loss per supervised token of a dataset, with or without an adapter
    Eval(EvalArguments),
    /// Continue a prompt, with or without an adapter
    Generate(GenerateArguments),
    /// Rewrite a finished adapter for another reader: vLLM's per-expert layout, bfloat16
    Export(export::ExportArguments),
    /// Download a model from a hub: room checked first, resumed, verified
    Fetch(fetch::FetchArguments),
    /// Write a checkpoint of seeded random numbers, of any size
    Synth(synth::SynthArguments),
    /// Snapshots of quantised weights: make, list, verify, remove
    Snapshot(snapshot::SnapshotArguments),
    /// Check that everything this machine needs is in place
    Doctor(DoctorArguments),
    /// Look at the queue and operate it
    Queue(queue::QueueArguments),
    /// Show the calls that create a RunPod endpoint from `runpod.toml`
    Deploy(DeployArguments),
    /// Print every setting with its value
    Config,
    /// The GPU's kernels: list them, compile them ahead of time, see which devices there are
    #[command(subcommand)]
    Kernels(KernelsCommand),
}

/// `kernels`.
#[derive(Debug, Subcommand)]
pub enum KernelsCommand {
    /// Every kernel by its source
    List(OutputArguments),
    /// The NVIDIA devices here, or why there are none
    Devices(OutputArguments),
    /// Compile every kernel to machine code; needs NVRTC, but no GPU
    Build(KernelsBuildArguments),
}

/// `kernels build`.
#[derive(Debug, Args)]
pub struct KernelsBuildArguments {
    /// Architectures, as sm_80,sm_90a [default: every one the compiler knows, from sm_80 on]
    #[arg(long, value_name = "SM,…", value_delimiter = ',')]
    pub arch: Option<Vec<String>>,
    /// Folder for the compiled kernels; BRIGHTRUN_KERNELS names it when running
    #[arg(long, value_name = "DIR")]
    pub out: PathBuf,
    /// Output form.
    #[command(flatten)]
    pub output: OutputArguments,
}

/// Output form.
#[derive(Clone, Copy, Debug, Default, Args)]
pub struct OutputArguments {
    /// Print JSON instead of text
    #[arg(long)]
    pub json: bool,
}

/// `demo`.
#[derive(Debug, Args)]
pub struct DemoArguments {
    /// Folder for the model, the storage and the database [default: .brightrun/demo]
    #[arg(long, value_name = "DIR")]
    pub dir: Option<PathBuf>,
    /// Checkpoint to train instead of the miniature one
    #[arg(long, value_name = "DIR")]
    pub model: Option<PathBuf>,
    /// Dataset to train on instead of the built-in sample
    #[arg(long, value_name = "FILE")]
    pub dataset: Option<PathBuf>,
    /// Passes over the dataset [default: 5 for the miniature model, 1 for another]
    #[arg(long)]
    pub epochs: Option<usize>,
    /// Output form.
    #[command(flatten)]
    pub output: OutputArguments,
}

/// `orchestrate`.
#[derive(Debug, Args)]
pub struct OrchestrateArguments {
    /// Leave when nothing is left to do
    #[arg(long)]
    pub until_idle: bool,
}

/// `worker`.
#[derive(Debug, Args)]
pub struct WorkerArguments {
    /// Checkpoint to train [setting: model.path]
    #[arg(long, value_name = "DIR")]
    pub model: Option<PathBuf>,
    /// Jobs at a time [setting: worker.slots]
    #[arg(long)]
    pub slots: Option<usize>,
    /// Leave when the queue is empty
    #[arg(long)]
    pub until_idle: bool,
    /// Serve RunPod's API on this machine instead; RunPod's own clients drive it
    #[arg(long)]
    pub serve: bool,
    /// Port of that API
    #[arg(long, default_value_t = 8000, value_name = "P")]
    pub port: u16,
    /// The flags of RunPod's SDK (`--rp_serve_api`, `--rp_api_port`, `--test_input`, …), which are read before these.
    #[arg(skip)]
    pub runpod: LocalFlags,
}

/// `deploy`.
#[derive(Debug, Args)]
pub struct DeployArguments {
    /// Show the calls; nothing is sent
    #[arg(long)]
    pub dry_run: bool,
    /// Project file
    #[arg(long, value_name = "FILE", default_value = "runpod.toml")]
    pub file: PathBuf,
    /// The image, with its digest
    #[arg(long, value_name = "IMAGE")]
    pub image: String,
    /// Network volume, by RunPod's id
    #[arg(long, value_name = "ID")]
    pub volume: Option<String>,
    /// Output form.
    #[command(flatten)]
    pub output: OutputArguments,
}

/// `doctor`.
#[derive(Clone, Copy, Debug, Args)]
pub struct DoctorArguments {
    /// Only what this machine alone can tell: neither storage nor database is asked
    #[arg(long)]
    pub quick: bool,
    /// Only what is no burden every few minutes: the volume and the work folder
    #[arg(long, conflicts_with = "quick")]
    pub live: bool,
    /// Output form.
    #[command(flatten)]
    pub output: OutputArguments,
}

/// `enqueue`.
#[derive(Debug, Args)]
pub struct EnqueueArguments {
    /// Dataset file
    #[arg(long, value_name = "FILE")]
    pub dataset: PathBuf,
    /// Whose job it is (`auth.users.id`)
    #[arg(long, value_name = "UUID")]
    pub user: Uuid,
    /// Name shown in the app [default: the file's name]
    #[arg(long)]
    pub name: Option<String>,
    /// Settings of the run.
    #[command(flatten)]
    pub train: TrainFlags,
    /// Output form.
    #[command(flatten)]
    pub output: OutputArguments,
}

/// `status`, `watch`, `cancel`.
#[derive(Debug, Args)]
pub struct JobArguments {
    /// The job's id (`training_jobs.id`)
    pub job: Uuid,
    /// Output form.
    #[command(flatten)]
    pub output: OutputArguments,
}

/// `validate`.
#[derive(Debug, Args)]
pub struct ValidateArguments {
    /// Dataset file
    pub file: PathBuf,
    /// Most problems to list; the totals count all
    #[arg(long, default_value_t = 100)]
    pub max_issues: usize,
    /// Output form.
    #[command(flatten)]
    pub output: OutputArguments,
}

/// `inspect`.
#[derive(Debug, Args)]
pub struct InspectArguments {
    /// Dataset file
    pub file: PathBuf,
    /// Line of the file, counted from 1
    pub line: u64,
    /// Checkpoint whose tokenizer and template are used [setting: model.path]
    #[arg(long, value_name = "DIR")]
    pub model: Option<PathBuf>,
    /// Longest example in tokens
    #[arg(long)]
    pub max_length: Option<usize>,
    /// Which tokens are learnt: `final-answer` or `all-answers`
    #[arg(long)]
    pub supervise: Option<SuperviseChoice>,
    /// Output form.
    #[command(flatten)]
    pub output: OutputArguments,
}

/// `estimate`.
#[derive(Debug, Args)]
pub struct EstimateArguments {
    /// Checkpoint [setting: model.path]
    #[arg(long, value_name = "DIR")]
    pub model: Option<PathBuf>,
    /// Dataset file
    #[arg(long, value_name = "FILE")]
    pub dataset: PathBuf,
    /// Trained tokens per second to assume; measured on this machine when absent
    #[arg(long, value_name = "X")]
    pub tokens_per_second: Option<f64>,
    /// Price of an hour in dollars
    #[arg(long, value_name = "X")]
    pub price_per_hour: Option<f64>,
    /// Settings of the run.
    #[command(flatten)]
    pub train: TrainFlags,
    /// Output form.
    #[command(flatten)]
    pub output: OutputArguments,
}

/// `train`.
#[derive(Debug, Args)]
pub struct TrainArguments {
    /// Checkpoint [setting: model.path]
    #[arg(long, value_name = "DIR")]
    pub model: Option<PathBuf>,
    /// Dataset file
    #[arg(long, value_name = "FILE")]
    pub dataset: PathBuf,
    /// Folder for the adapter; replaced when it holds one
    #[arg(long, value_name = "DIR")]
    pub out: PathBuf,
    /// Folder for checkpoints; a run that finds its own continues from it [default: OUT.checkpoints]
    #[arg(long, value_name = "DIR")]
    pub checkpoints: Option<PathBuf>,
    /// Export the adapter in bfloat16 instead of float32
    #[arg(long)]
    pub bf16_adapter: bool,
    /// Settings of the run.
    #[command(flatten)]
    pub train: TrainFlags,
    /// Output form.
    #[command(flatten)]
    pub output: OutputArguments,
}

/// `eval`.
#[derive(Debug, Args)]
pub struct EvalArguments {
    /// Checkpoint [setting: model.path]
    #[arg(long, value_name = "DIR")]
    pub model: Option<PathBuf>,
    /// Dataset file
    #[arg(long, value_name = "FILE")]
    pub dataset: PathBuf,
    /// Adapter folder
    #[arg(long, value_name = "DIR")]
    pub adapter: Option<PathBuf>,
    /// Only the first N examples
    #[arg(long, value_name = "N")]
    pub limit: Option<usize>,
    /// How the frozen weights are kept; float32 arithmetic on the checkpoint's values by default
    #[arg(long, value_enum, default_value_t = BaseDtypeChoice::F32)]
    pub base_dtype: BaseDtypeChoice,
    /// Longest example in tokens
    #[arg(long)]
    pub max_length: Option<usize>,
    /// Which tokens count: `final-answer` or `all-answers`
    #[arg(long)]
    pub supervise: Option<SuperviseChoice>,
    /// Output form.
    #[command(flatten)]
    pub output: OutputArguments,
}

/// `generate`.
#[derive(Debug, Args)]
pub struct GenerateArguments {
    /// Checkpoint [setting: model.path]
    #[arg(long, value_name = "DIR")]
    pub model: Option<PathBuf>,
    /// Adapter folder
    #[arg(long, value_name = "DIR")]
    pub adapter: Option<PathBuf>,
    /// The user's message
    #[arg(long, value_name = "TEXT")]
    pub prompt: String,
    /// System message
    #[arg(long, value_name = "TEXT")]
    pub system: Option<String>,
    /// Most tokens to generate
    #[arg(long, default_value_t = 256)]
    pub max_new_tokens: usize,
    /// 0 takes the most likely token each time; above 0 samples
    #[arg(long, default_value_t = 0.0)]
    pub temperature: f32,
    /// Sample only from the most likely tokens that together have this probability
    #[arg(long, default_value_t = 1.0)]
    pub top_p: f32,
    /// Seed of the sampling
    #[arg(long, default_value_t = 42)]
    pub seed: u64,
    /// How the frozen weights are kept
    #[arg(long, value_enum, default_value_t = BaseDtypeChoice::F32)]
    pub base_dtype: BaseDtypeChoice,
    /// Use the prompt as it is, without the chat template
    #[arg(long)]
    pub raw: bool,
    /// Output form.
    #[command(flatten)]
    pub output: OutputArguments,
}

/// Settings of a run; each overrides the configuration's `train` section.
#[derive(Clone, Debug, Default, Args)]
pub struct TrainFlags {
    /// Optimizer steps; overrides --epochs
    #[arg(long, value_name = "N")]
    pub steps: Option<usize>,
    /// Passes over the examples
    #[arg(long, value_name = "N")]
    pub epochs: Option<usize>,
    /// Peak learning rate
    #[arg(long, value_name = "X")]
    pub learning_rate: Option<f32>,
    /// LoRA rank
    #[arg(long, value_name = "R")]
    pub rank: Option<usize>,
    /// LoRA alpha [default: twice the rank]
    #[arg(long, value_name = "A")]
    pub alpha: Option<f32>,
    /// Adapted projections and presets (default, attention, all-linear, shared-expert, experts), separated by commas
    #[arg(long, value_name = "a,b,…", value_delimiter = ',')]
    pub targets: Option<Vec<String>>,
    /// Examples per optimizer step
    #[arg(long, value_name = "N")]
    pub batch_size: Option<usize>,
    /// Tokens per micro-batch at most
    #[arg(long, value_name = "N")]
    pub micro_batch_tokens: Option<usize>,
    /// Longest example in tokens
    #[arg(long, value_name = "N")]
    pub max_length: Option<usize>,
    /// How the frozen weights are kept
    #[arg(long, value_enum)]
    pub base_dtype: Option<BaseDtypeChoice>,
    /// Order of the examples
    #[arg(long, value_enum)]
    pub order: Option<OrderChoice>,
    /// Which tokens are learnt
    #[arg(long, value_enum)]
    pub supervise: Option<SuperviseChoice>,
    /// Learning-rate schedule
    #[arg(long, value_enum)]
    pub schedule: Option<ScheduleChoice>,
    /// Warm-up steps
    #[arg(long, value_name = "N")]
    pub warmup_steps: Option<usize>,
    /// How AdamW keeps its moments
    #[arg(long, value_enum)]
    pub optimizer: Option<OptimizerChoice>,
    /// The most bytes the adapter, its gradients and its moments may take
    #[arg(long, value_name = "BYTES")]
    pub adapter_budget_bytes: Option<u64>,
    /// Decoupled weight decay
    #[arg(long, value_name = "X")]
    pub weight_decay: Option<f32>,
    /// Gradient clipping by global norm; 0 switches it off
    #[arg(long, value_name = "X")]
    pub max_gradient_norm: Option<f32>,
    /// Share of conversations held out
    #[arg(long, value_name = "X")]
    pub validation_share: Option<f32>,
    /// Steps between checkpoints; 0 writes one only on interruption
    #[arg(long, value_name = "N")]
    pub checkpoint_every: Option<usize>,
    /// Seed of the adapter, the order and the split
    #[arg(long, value_name = "S")]
    pub seed: Option<u64>,
}

impl TrainFlags {
    /// Lays the flags that were given over `spec`.
    pub fn apply(&self, spec: &mut TrainSpec) {
        fn put<T: Clone>(target: &mut T, flag: Option<&T>) {
            if let Some(value) = flag {
                target.clone_from(value);
            }
        }
        put(&mut spec.epochs, self.epochs.as_ref());
        put(&mut spec.learning_rate, self.learning_rate.as_ref());
        put(&mut spec.rank, self.rank.as_ref());
        put(&mut spec.targets, self.targets.as_ref());
        put(&mut spec.batch_size, self.batch_size.as_ref());
        put(&mut spec.micro_batch_tokens, self.micro_batch_tokens.as_ref());
        put(&mut spec.max_length, self.max_length.as_ref());
        put(&mut spec.weight_decay, self.weight_decay.as_ref());
        put(&mut spec.max_gradient_norm, self.max_gradient_norm.as_ref());
        put(&mut spec.validation_share, self.validation_share.as_ref());
        put(&mut spec.checkpoint_every, self.checkpoint_every.as_ref());
        put(&mut spec.seed, self.seed.as_ref());
        put(&mut spec.base_dtype, self.base_dtype.map(Into::into).as_ref());
        put(&mut spec.optimizer, self.optimizer.map(Into::into).as_ref());
        put(&mut spec.adapter_budget_bytes, self.adapter_budget_bytes.as_ref());
        put(&mut spec.order, self.order.map(Into::into).as_ref());
        put(&mut spec.supervise, self.supervise.map(Into::into).as_ref());
        put(&mut spec.schedule, self.schedule.map(Into::into).as_ref());
        spec.alpha = self.alpha.or(if self.rank.is_some() { None } else { spec.alpha });
        spec.max_steps = self.steps.or(spec.max_steps);
        spec.warmup_steps = self.warmup_steps.or(spec.warmup_steps);
    }
}

/// Declares a command-line twin of a setting's enum, so that the setting itself does not depend on clap.
macro_rules! choice {
    ($(#[$doc:meta])* $name:ident => $target:ty { $($(#[$variant_doc:meta])* $variant:ident),+ $(,)? }) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
        pub enum $name { $($(#[$variant_doc])* $variant),+ }
        impl From<$name> for $target {
            fn from(choice: $name) -> Self {
                match choice { $($name::$variant => <$target>::$variant),+ }
            }
        }
    };
}

choice!(
    /// `--device`.
    DeviceFlag => DeviceChoice {
        /// The first NVIDIA GPU, where there is one that can train; otherwise the CPU
        Auto,
        /// The CPU
        Cpu,
        /// The first NVIDIA GPU
        Cuda,
        /// The GPU's kernels on the CPU: for tests, and very slow
        Emulated,
    }
);
choice!(
    /// `--base-dtype`.
    BaseDtypeChoice => BaseDtype {
        /// 4-bit NormalFloat, double-quantised
        Nf4,
        /// Routed experts in 4 bits, the rest in bfloat16
        Nf4Experts,
        /// bfloat16
        Bf16,
        /// The checkpoint's values, float32 arithmetic
        F32,
    }
);
choice!(
    /// `--optimizer`.
    OptimizerChoice => OptimizerKind {
        /// float32 moments
        Adamw,
        /// 8-bit moments in blocks of 256, as bitsandbytes has them
        #[value(name = "adamw-8bit")]
        Adamw8bit,
    }
);
choice!(
    /// `--order`.
    OrderChoice => Order {
        /// As the file has them
        File,
        /// A seeded permutation each epoch
        Shuffled,
    }
);
choice!(
    /// `--schedule`.
    ScheduleChoice => Schedule {
        /// Half a cosine, to zero
        Cosine,
        /// A straight line, to zero
        Linear,
        /// No decay
        Constant,
    }
);
choice!(
    /// `--supervise`.
    SuperviseChoice => Supervise {
        /// Only the last assistant message
        FinalAnswer,
        /// Every assistant message
        AllAnswers,
    }
);

/// Reads the command line; ends the program with a message where it is wrong. `worker` also takes the flags of RunPod's SDK.
pub fn parse() -> Cli {
    let is_worker = std::env::args_os().nth(1).is_some_and(|command| command == "worker");
    let texts: std::result::Result<Vec<String>, _> = std::env::args_os().map(std::ffi::OsString::into_string).collect();
    let (true, Ok(texts)) = (is_worker, texts) else {
        return Cli::parse();
    };
    let (flags, rest) = LocalFlags::parse(texts).unwrap_or_else(|failure| {
        Cli::command()
            .error(clap::error::ErrorKind::InvalidValue, failure)
            .exit()
    });
    let mut cli = Cli::parse_from(rest);
    if let Command::Worker(arguments) = &mut cli.command {
        arguments.runpod = flags;
    }
    cli
}

/// Runs one command to its exit code.
pub fn run(cli: Cli) -> ExitCode {
    crate::secret::forbid_core_dumps();
    if !serverless::init_logging(&cli.command) {
        init_logging();
    }
    crate::storage::http::install_crypto_provider();
    let json = wants_json(&cli.command);
    let result = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .map_err(|error| {
            Failure::system(
                "RUNTIME_UNAVAILABLE",
                format!("The asynchronous runtime cannot start: {error}"),
            )
        })
        .and_then(|runtime| runtime.block_on(dispatch(cli)));
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => output::report_failure(&failure, json),
    }
}

async fn dispatch(cli: Cli) -> Result<()> {
    if let Command::Plan(arguments) = &cli.command {
        // `plan --config` may also name a model's config.json.
        let (model, settings) = match &cli.config {
            Some(path) if plan::is_model_config(path) => (Some(path.as_path()), None),
            other => (None, other.as_deref()),
        };
        let config = Config::load(settings, std::env::vars())?;
        return plan::run(&config, model, arguments);
    }
    let mut config = Config::load(cli.config.as_deref(), std::env::vars())?;
    config.worker.device = cli.device.map_or(config.worker.device, DeviceChoice::from);
    // Computing commands hold their thread: block_in_place keeps signals and timers alive meanwhile.
    match &cli.command {
        Command::Demo(arguments) => crate::demo::run(config, arguments).await,
        Command::Migrate => service::migrate().await,
        Command::Orchestrate(arguments) => service::orchestrate(config, arguments).await,
        Command::Worker(arguments) => service::worker(config, arguments).await,
        Command::Enqueue(arguments) => service::enqueue(config, arguments).await,
        Command::Status(arguments) => service::status(arguments).await,
        Command::Watch(arguments) => service::watch(arguments).await,
        Command::Cancel(arguments) => service::cancel(arguments).await,
        Command::Validate(arguments) => validate::validate(arguments),
        Command::Inspect(arguments) => model::inspect(&config, arguments),
        Command::Estimate(arguments) => tokio::task::block_in_place(|| model::estimate(&config, arguments)),
        // Handled above, before the settings are read.
        Command::Plan(arguments) => plan::run(&config, None, arguments),
        Command::Train(arguments) => tokio::task::block_in_place(|| model::train(&config, arguments)),
        Command::Eval(arguments) => tokio::task::block_in_place(|| model::eval(&config, arguments)),
        Command::Generate(arguments) => tokio::task::block_in_place(|| model::generate(&config, arguments)),
        Command::Export(arguments) => tokio::task::block_in_place(|| export::run(&config, arguments)),
        Command::Fetch(arguments) => fetch::fetch(arguments).await,
        Command::Bench(arguments) => tokio::task::block_in_place(|| bench::run(&config, arguments)),
        Command::Synth(arguments) => tokio::task::block_in_place(|| synth::synth(arguments)),
        Command::Snapshot(arguments) => tokio::task::block_in_place(|| snapshot::snapshot(&config, arguments)),
        Command::Doctor(arguments) => doctor::doctor(&config, *arguments).await,
        Command::Queue(arguments) => queue::run(arguments).await,
        Command::Deploy(arguments) => deploy::deploy(arguments),
        Command::Config => print_config(&config),
        Command::Kernels(command) => tokio::task::block_in_place(|| kernels::kernels(command)),
    }
}

fn print_config(config: &Config) -> Result<()> {
    let text = toml::to_string_pretty(config)
        .map_err(|error| Failure::system("CONFIG_INTERNAL", format!("The settings cannot be printed: {error}")))?;
    output::print_line(text.trim_end())
}

fn wants_json(command: &Command) -> bool {
    match command {
        Command::Demo(DemoArguments { output, .. })
        | Command::Enqueue(EnqueueArguments { output, .. })
        | Command::Status(JobArguments { output, .. })
        | Command::Watch(JobArguments { output, .. })
        | Command::Cancel(JobArguments { output, .. })
        | Command::Validate(ValidateArguments { output, .. })
        | Command::Inspect(InspectArguments { output, .. })
        | Command::Estimate(EstimateArguments { output, .. })
        | Command::Plan(plan::PlanArguments { output, .. })
        | Command::Bench(bench::BenchArguments { output, .. })
        | Command::Train(TrainArguments { output, .. })
        | Command::Eval(EvalArguments { output, .. })
        | Command::Generate(GenerateArguments { output, .. })
        | Command::Export(export::ExportArguments { output, .. })
        | Command::Kernels(
            KernelsCommand::List(output)
            | KernelsCommand::Devices(output)
            | KernelsCommand::Build(KernelsBuildArguments { output, .. }),
        )
        | Command::Fetch(fetch::FetchArguments { output, .. })
        | Command::Synth(synth::SynthArguments { output, .. })
        | Command::Deploy(DeployArguments { output, .. })
        | Command::Doctor(DoctorArguments { output, .. }) => output.json,
        Command::Snapshot(arguments) => arguments.json,
        Command::Queue(arguments) => arguments.json,
        Command::Migrate | Command::Orchestrate(_) | Command::Worker(_) | Command::Config => false,
    }
}

/// Logs go to standard error; `RUST_LOG` chooses what (default: warnings, and information from this program's services).
fn init_logging() {
    use tracing_subscriber::EnvFilter;
    let filter = EnvFilter::try_from_default_env()
        // The pool repeats as a warning what the queue tells with its cause and address, also when a server is stopped on purpose.
        .unwrap_or_else(|_| EnvFilter::new("warn,deadpool=error,brightrun_worker=info,brightrun_queue=info"));
    // A second initialisation (tests in one process) keeps the first.
    let _ = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_target(false)
        .try_init();
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::panic)]
    use super::*;

    #[test]
    fn the_command_tree_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn the_scripted_form_of_train_is_understood() {
        let line = "brightrun train --model m --dataset d --out o --steps 5 --epochs 2 --learning-rate 1e-4 --rank 8 --alpha 16 \
                    --targets q_proj,v_proj --batch-size 1 --max-length 512 --base-dtype bf16 --order file --seed 3 --json";
        let Command::Train(arguments) = Cli::try_parse_from(line.split_whitespace()).unwrap().command else {
            panic!("not train")
        };
        let mut spec = TrainSpec::default();
        arguments.train.apply(&mut spec);
        assert_eq!(
            (spec.max_steps, spec.epochs, spec.rank, spec.lora_alpha()),
            (Some(5), 2, 8, 16.0)
        );
        assert_eq!((spec.batch_size, spec.max_length, spec.seed), (1, 512, 3));
        assert_eq!((spec.base_dtype, spec.order), (BaseDtype::Bf16, Order::File));
        assert_eq!(spec.targets, ["q_proj", "v_proj"]);
        assert!(arguments.output.json);
    }

    #[test]
    fn a_rank_without_an_alpha_brings_its_own() {
        let mut spec = TrainSpec {
            alpha: Some(5.0),
            ..TrainSpec::default()
        };
        TrainFlags {
            rank: Some(4),
            ..TrainFlags::default()
        }
        .apply(&mut spec);
        assert_eq!(spec.lora_alpha(), 8.0);
    }
}
