//! Commands that compute: `train`, `eval`, `generate`, `estimate`, `inspect`.

use std::io::{IsTerminal, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;

use brightrun_kernels::counting::Habits;
use brightrun_kernels::{Backend, DType};
use indicatif::{ProgressBar, ProgressStyle};
use serde_json::json;
use uuid::Uuid;

use super::device::{Chosen, on_device};
use super::output::{self, print_json, print_line};
use super::{EstimateArguments, EvalArguments, GenerateArguments, InspectArguments, TrainArguments};
use crate::artifact::AdapterDtype;
use crate::config::Config;
use crate::dataset::{self, Example, Message};
use crate::error::{Failure, Result};
use crate::model::{LoadOptions, LoadSettings, LoadSource, LoraSet, ModelConfig, ModelRoots};
use crate::plan;
use crate::recipe::{self, Base, Checkpoints, Labels, Prepared};
use crate::spec::{BaseDtype, Supervise, TrainSpec};
use crate::template::{self, ChatTemplate};
use crate::train::data_order::DataOrder;
use crate::train::{
    self, Control, EncodedExample, EvaluationReport, GenerateSettings, Outcome, StepReport, TrainEvents,
};

/// Tokens per micro-batch when only losses are wanted.
const EVAL_MICRO_BATCH_TOKENS: usize = 4096;

/// The checkpoint's folder, from the flag or the settings.
pub(super) fn model_folder(flag: Option<&PathBuf>, config: &Config) -> Result<PathBuf> {
    let path = flag.or(config.model.path.as_ref());
    ModelRoots::of_environment().locate(path.map(PathBuf::as_path), &config.model.base_model)
}

/// Loads a model with a progress bar on standard error.
fn load<B: Backend>(device: &B, config: &Config, folder: &Path, dtype: BaseDtype) -> Result<Base<B>> {
    load_with(device, folder, dtype, &config.model.load_settings())
}

/// As [`load`] with settings of its own.
pub(super) fn load_with<B: Backend>(
    device: &B,
    folder: &Path,
    dtype: BaseDtype,
    settings: &LoadSettings,
) -> Result<Base<B>> {
    let bar = byte_bar("loading");
    let base = Base::load_with(device, folder, dtype, settings, &mut |progress| {
        bar.set_length(progress.bytes_total);
        bar.set_position(progress.bytes);
        if progress.source == LoadSource::Snapshot {
            bar.set_message("snapshot");
        }
    });
    bar.finish_and_clear();
    base
}

/// A bar of bytes with their rate and the time left.
pub(super) fn byte_bar(verb: &'static str) -> ProgressBar {
    let template = format!("{verb} {{msg}} {{wide_bar}} {{bytes}} of {{total_bytes}}  {{bytes_per_sec}}  {{eta}} left");
    ProgressBar::new(0).with_style(style(&template))
}

fn style(template: &str) -> ProgressStyle {
    ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar())
}

/// `brightrun train`.
pub fn train(config: &Config, arguments: &TrainArguments) -> Result<()> {
    on_device!(config, |device| train_on(&device, config, arguments))
}

fn train_on<B: Backend>(device: &B, config: &Config, arguments: &TrainArguments) -> Result<()> {
    let folder = model_folder(arguments.model.as_ref(), config)?;
    // Without a queue there is nobody to answer for a held-out set nobody asked for.
    let mut spec = TrainSpec {
        validation_share: 0.0,
        ..config.train.clone()
    };
    arguments.train.apply(&mut spec);
    spec.check()?;
    let template = ChatTemplate::load(&folder)?;
    let data = recipe::prepare(&arguments.dataset, &template, &spec)?;
    say_what_was_left_out(&data);
    let base = load(device, config, &folder, spec.base_dtype)?;
    let checkpoints = arguments
        .checkpoints
        .clone()
        .unwrap_or_else(|| with_suffix(&arguments.out, ".checkpoints"));
    let mut events = StepPrinter::new(arguments.output.json);
    let place = Checkpoints {
        folder: &checkpoints,
        resume: true,
    };
    let learnt = recipe::learn(&base, &data, &spec, Some(place), &mut events)?;
    events.bar.finish_and_clear();
    if let Outcome::Stopped(_) = learnt.summary.outcome {
        return Err(
            Failure::system("TRAIN_INTERRUPTED", "The run was interrupted; its checkpoint is kept")
                .at(checkpoints.display().to_string())
                .hint("Run the same command again to continue"),
        );
    }
    let labels = Labels {
        template: &template,
        job_id: Uuid::new_v5(&Uuid::NAMESPACE_OID, data.report.sha256.as_bytes()),
        base_model: base_model_name(&folder, config, arguments.model.is_some()),
        dataset_name: file_name(&arguments.dataset),
        adapter_dtype: if arguments.bf16_adapter {
            AdapterDtype::Bf16
        } else {
            AdapterDtype::F32
        },
        warnings: Vec::new(),
    };
    let delivery = recipe::deliver(&base, &data, &spec, &learnt, &labels, &arguments.out)?;
    remove_checkpoints(&checkpoints);
    let proof = delivery.verification.recomputed_loss;
    if arguments.output.json {
        return print_json(&json!({
            "adapter": arguments.out, "metrics": delivery.metrics, "verification": delivery.verification,
            "base_loss": learnt.base_loss, "trainable_parameters": learnt.summary.trainable_parameters,
        }));
    }
    let before = learnt
        .base_loss
        .map_or(String::new(), |loss| format!(" (base model {loss:.4})"));
    print_line(&format!(
        "Adapter written to {} and proven: loss {proof:.4}{before}.",
        arguments.out.display()
    ))
}

/// The name recorded as base model: the settings' name for the settings' folder, the folder itself for any other.
fn base_model_name(folder: &Path, config: &Config, is_given: bool) -> String {
    if is_given {
        folder.display().to_string()
    } else {
        config.model.base_model.clone()
    }
}

fn file_name(path: &Path) -> String {
    path.file_name().unwrap_or_default().to_string_lossy().into_owned()
}

fn with_suffix(path: &Path, suffix: &str) -> PathBuf {
    let mut name = path.file_name().unwrap_or_default().to_os_string();
    name.push(suffix);
    path.with_file_name(name)
}

fn remove_checkpoints(folder: &Path) {
    if let Err(error) = std::fs::remove_dir_all(folder)
        && error.kind() != std::io::ErrorKind::NotFound
    {
        tracing::warn!(%error, folder = %folder.display(), "finished checkpoints could not be removed");
    }
}

fn say_what_was_left_out(data: &Prepared) {
    if data.trimmed_examples > 0 {
        tracing::warn!(
            "{} examples lost their oldest turns to the length limit",
            data.trimmed_examples
        );
    }
    if !data.dropped.is_empty() {
        tracing::warn!(
            "{} lines were not used; the artifact's manifest names each with its reason",
            data.dropped.len()
        );
    }
}

/// One JSON line per step, or a progress bar.
struct StepPrinter {
    json: bool,
    bar: ProgressBar,
    interrupted: std::sync::Arc<std::sync::atomic::AtomicBool>,
}

impl StepPrinter {
    fn new(json: bool) -> Self {
        let bar = if json {
            ProgressBar::hidden()
        } else {
            ProgressBar::new(0)
        };
        bar.set_style(style("step {pos}/{len} {wide_bar} {msg}"));
        bar.enable_steady_tick(Duration::from_millis(500));
        Self {
            json,
            bar,
            interrupted: interruption(),
        }
    }
}

/// Set by the first Ctrl-C or SIGTERM: the run then writes a checkpoint and stops.
fn interruption() -> std::sync::Arc<std::sync::atomic::AtomicBool> {
    let flag = std::sync::Arc::new(std::sync::atomic::AtomicBool::new(false));
    let shared = flag.clone();
    tokio::spawn(async move {
        super::service::terminated().await;
        shared.store(true, std::sync::atomic::Ordering::Relaxed);
    });
    flag
}

impl TrainEvents for StepPrinter {
    fn control(&mut self) -> Control {
        if self.interrupted.load(std::sync::atomic::Ordering::Relaxed) {
            return Control::Stop(train::StopReason::Shutdown);
        }
        Control::Continue
    }

    fn on_step(&mut self, report: &StepReport) -> Control {
        if self.json {
            let line = json!({
                "step": report.step, "total_steps": report.total_steps, "epoch": report.epoch, "loss": report.loss,
                "learning_rate": report.learning_rate, "gradient_norm": report.gradient_norm,
                "tokens_per_second": report.tokens_per_second, "tokens": report.tokens,
                "seconds": report.tokens as f64 / report.tokens_per_second.max(f64::MIN_POSITIVE),
            });
            if print_json(&line).is_err() {
                // Nobody reads any more: the run is stopped like one that was interrupted.
                return Control::Stop(train::StopReason::Shutdown);
            }
        }
        self.bar.set_length(report.total_steps as u64);
        self.bar.set_position(report.step as u64);
        self.bar.set_message(format!(
            "loss {:.4}  {:.0} tokens/s  {} left",
            report.loss,
            report.tokens_per_second,
            output::duration(report.eta_seconds)
        ));
        self.control()
    }

    fn on_evaluate(&mut self, report: &EvaluationReport) {
        if !self.json {
            self.bar.println(format!(
                "step {}: held-out loss {:.4}",
                report.step, report.evaluation.loss
            ));
        }
    }
}

/// `brightrun eval`.
pub fn eval(config: &Config, arguments: &EvalArguments) -> Result<()> {
    on_device!(config, |device| eval_on(&device, config, arguments))
}

fn eval_on<B: Backend>(device: &B, config: &Config, arguments: &EvalArguments) -> Result<()> {
    let folder = model_folder(arguments.model.as_ref(), config)?;
    let template = ChatTemplate::load(&folder)?;
    let (mut examples, report) = dataset::load(&arguments.dataset)?;
    report.failure().map_or(Ok(()), Err)?;
    examples.truncate(arguments.limit.unwrap_or(usize::MAX));
    let supervise = arguments.supervise.map_or(config.train.supervise, Supervise::from);
    let max_length = arguments.max_length.unwrap_or(config.train.max_length);
    let (encoded, left_out) = encode_all(&template, &examples, supervise, max_length)?;
    let base = load(device, config, &folder, arguments.base_dtype.into())?;
    let lora = arguments
        .adapter
        .as_deref()
        .map(|adapter| load_adapter(&base, adapter))
        .transpose()?;
    let evaluation = train::evaluate(
        &base.model,
        lora.as_ref(),
        &encoded,
        EVAL_MICRO_BATCH_TOKENS,
        &mut || true,
    )?
    .ok_or_else(|| Failure::system("EVAL_INTERRUPTED", "The evaluation was interrupted"))?;
    if arguments.output.json {
        return print_json(&json!({
            "loss": evaluation.loss, "supervised_tokens": evaluation.supervised_tokens, "examples": encoded.len(),
            "left_out": left_out, "lines": evaluation.examples,
        }));
    }
    for example in &evaluation.examples {
        print_line(&format!(
            "line {:>6}  loss {:8.5}  {:>6} tokens",
            example.line, example.loss, example.supervised_tokens
        ))?;
    }
    if left_out > 0 {
        print_line(&format!(
            "{left_out} examples are longer than {max_length} tokens and were left out"
        ))?;
    }
    print_line(&format!(
        "total       loss {:8.5}  {:>6} tokens in {} examples",
        evaluation.loss,
        evaluation.supervised_tokens,
        encoded.len()
    ))
}

fn load_adapter<B: Backend>(base: &Base<B>, folder: &Path) -> Result<LoraSet<B>> {
    LoraSet::load(base.model.device(), folder, base.model.modules())
}

fn encode_all(
    template: &ChatTemplate,
    examples: &[Example],
    supervise: Supervise,
    max_length: usize,
) -> Result<(Vec<EncodedExample>, usize)> {
    let mut encoded = Vec::with_capacity(examples.len());
    let mut left_out = 0;
    for example in examples {
        match template.encode(example, supervise, max_length)? {
            template::Outcome::Used(used) => encoded.push(EncodedExample {
                ids: used.ids,
                supervised: used.supervised,
                line: used.line,
            }),
            template::Outcome::LeftOut(_) => left_out += 1,
        }
    }
    Ok((encoded, left_out))
}

/// `brightrun generate`.
pub fn generate(config: &Config, arguments: &GenerateArguments) -> Result<()> {
    on_device!(config, |device| generate_on(&device, config, arguments))
}

fn generate_on<B: Backend>(device: &B, config: &Config, arguments: &GenerateArguments) -> Result<()> {
    let folder = model_folder(arguments.model.as_ref(), config)?;
    let template = ChatTemplate::load(&folder)?;
    let prompt = if arguments.raw {
        template.encode_plain(&arguments.prompt)?
    } else {
        let mut messages: Vec<Message> = arguments.system.iter().map(Message::system).collect();
        messages.push(Message::user(&arguments.prompt));
        template.encode_prompt(&messages, None, None)?
    };
    let base = load(device, config, &folder, arguments.base_dtype.into())?;
    let lora = arguments
        .adapter
        .as_deref()
        .map(|adapter| load_adapter(&base, adapter))
        .transpose()?;
    let settings = GenerateSettings {
        max_new_tokens: arguments.max_new_tokens,
        temperature: arguments.temperature,
        top_p: arguments.top_p,
        seed: arguments.seed,
        stop_ids: template.stop_ids(),
    };
    let live = !arguments.output.json && std::io::stdout().is_terminal();
    let mut shown = String::new();
    let mut ids = Vec::new();
    let generated = train::generate(&base.model, lora.as_ref(), &prompt, &settings, &mut |id| {
        ids.push(id);
        if live && let Ok(text) = template.decode(&ids, true) {
            show_growth(&mut shown, text);
        }
        true
    })?;
    let text = template.decode(&generated, true)?;
    if arguments.output.json {
        return print_json(&json!({
            "text": text, "tokens": generated, "prompt_tokens": prompt.len(), "generated_tokens": generated.len(),
            "adapter": arguments.adapter,
        }));
    }
    if live {
        show_growth(&mut shown, text);
        return print_line("");
    }
    print_line(&text)
}

/// Prints what `text` has more than was shown. A character that several tokens make up is shown once it is whole.
fn show_growth(shown: &mut String, text: String) {
    if text.ends_with('\u{FFFD}') {
        return;
    }
    if let Some(growth) = text.strip_prefix(shown.as_str()) {
        let mut output = std::io::stdout().lock();
        // A closed terminal ends the command when the final text is printed.
        let _ = output.write_all(growth.as_bytes()).and_then(|()| output.flush());
        *shown = text;
    }
}

/// `brightrun inspect`.
pub fn inspect(config: &Config, arguments: &InspectArguments) -> Result<()> {
    let folder = model_folder(arguments.model.as_ref(), config)?;
    let template = ChatTemplate::load(&folder)?;
    let (examples, report) = dataset::load(&arguments.file)?;
    let Some(example) = examples.iter().find(|example| example.line == arguments.line) else {
        let issue = report.issues.iter().find(|issue| issue.line == arguments.line);
        let why = issue.map_or("it is no training example".to_owned(), |issue| {
            format!("{} [{}]", issue.message, issue.code)
        });
        return Err(Failure::user(
            "INSPECT_NO_EXAMPLE",
            format!("Line {} gives nothing to learn: {why}", arguments.line),
        )
        .at(arguments.file.display().to_string())
        .hint("`brightrun validate` lists every problem of the file"));
    };
    let supervise = arguments.supervise.map_or(config.train.supervise, Supervise::from);
    let max_length = arguments.max_length.unwrap_or(config.train.max_length);
    match template.encode(example, supervise, max_length)? {
        template::Outcome::Used(encoded) => show_tokens(&encoded, arguments.output.json),
        template::Outcome::LeftOut(left_out) => Err(Failure::user(
            "INSPECT_TOO_LONG",
            format!(
                "The example needs at least {} tokens and max_length is {max_length}",
                left_out.tokens
            ),
        )
        .at(format!("line {}", arguments.line))
        .hint("Raise --max-length")),
    }
}

fn show_tokens(encoded: &template::Encoded, as_json: bool) -> Result<()> {
    let spans = template::inspect(encoded);
    let supervised = encoded.supervised_tokens();
    if as_json {
        let tokens: Vec<_> = spans
            .iter()
            .map(|span| json!({ "id": span.id, "text": span.text, "supervised": span.supervised }))
            .collect();
        return print_json(&json!({
            "line": encoded.line, "text": encoded.text, "tokens": tokens, "supervised_tokens": supervised,
            "trimmed_turns": encoded.trimmed_turns,
        }));
    }
    let learnt = anstyle::AnsiColor::Green.on_default().bold();
    let context = anstyle::Style::new().dimmed();
    let mut text = String::new();
    for span in &spans {
        let style = if span.supervised { learnt } else { context };
        text.push_str(&format!("{style}{}{style:#}", span.text));
    }
    print_line(&text)?;
    print_line("")?;
    let ids: Vec<String> = spans
        .iter()
        .map(|span| {
            let style = if span.supervised { learnt } else { context };
            format!("{style}{}{style:#}", span.id)
        })
        .collect();
    print_line(&ids.join(" "))?;
    print_line("")?;
    print_line(&format!(
        "{} tokens, {learnt}{supervised} learnt{learnt:#}, {} oldest turns left out",
        spans.len(),
        encoded.trimmed_turns
    ))
}

/// `brightrun estimate`.
pub fn estimate(config: &Config, arguments: &EstimateArguments) -> Result<()> {
    let folder = model_folder(arguments.model.as_ref(), config)?;
    let mut spec = config.train.clone();
    arguments.train.apply(&mut spec);
    spec.check()?;
    let template = ChatTemplate::load(&folder)?;
    let data = recipe::prepare(&arguments.dataset, &template, &spec)?;
    let lengths: Vec<usize> = data.train.iter().map(|example| example.ids.len()).collect();
    let order = DataOrder::new(&spec, data.train.len());
    let epochs = order.epochs_after(order.total_steps());
    let tokens = (lengths.iter().sum::<usize>() as f64 * epochs) as u64;
    let speed = match arguments.tokens_per_second {
        Some(speed) if speed > 0.0 => speed,
        Some(_) => return Err(Failure::user("ESTIMATE_SPEED", "--tokens-per-second must be above 0")),
        None => on_device!(config, |device| measure_speed(&device, config, &folder, &spec, &data))?,
    };
    let seconds = tokens as f64 / speed;
    let memory_bytes = planned_memory(config, &folder, &spec, &lengths)?;
    let price = arguments.price_per_hour.unwrap_or(0.0);
    let estimate = json!({
        "examples": data.train.len(), "held_out": data.validation.len(), "left_out": data.dropped.len(),
        "trimmed": data.trimmed_examples, "steps": order.total_steps(), "tokens": tokens,
        "longest_tokens": lengths.iter().max(), "median_tokens": median(lengths.clone()),
        "memory_bytes": memory_bytes, "tokens_per_second": speed, "seconds": seconds, "cost": seconds / 3600.0 * price, "settings": spec,
    });
    if arguments.output.json {
        return print_json(&estimate);
    }
    print_line(&format!(
        "examples  {} to learn from, {} held out, {} not usable",
        data.train.len(),
        data.validation.len(),
        data.dropped.len()
    ))?;
    print_line(&format!(
        "lengths   median {} tokens, longest {}",
        median(lengths.clone()),
        lengths.iter().max().unwrap_or(&0)
    ))?;
    print_line(&format!(
        "steps     {} of {} examples",
        order.total_steps(),
        spec.batch_size
    ))?;
    print_line(&format!("tokens    {}", output::thousands(tokens)))?;
    print_line(&format!("memory    {}", output::bytes(memory_bytes)))?;
    print_line(&format!(
        "time      {} at {speed:.0} tokens/s",
        output::duration(seconds)
    ))?;
    print_line(&format!("cost      ${:.2}", seconds / 3600.0 * price))
}

/// Bytes of the longest micro-batch's step on this machine, as [`plan`](crate::plan) counts them.
fn planned_memory(config: &Config, folder: &Path, spec: &TrainSpec, lengths: &[usize]) -> Result<u64> {
    let options = LoadOptions::from(spec.base_dtype);
    let longest = lengths.iter().copied().max().unwrap_or(1);
    // Short examples share a micro-batch; a long one goes alone.
    let tokens = lengths.iter().sum::<usize>().min(spec.micro_batch_tokens).max(longest);
    let shape = plan::Shape {
        sequences: tokens.div_ceil(longest).min(spec.batch_size),
        length: longest,
    };
    let habits = match Chosen::by(config)? {
        Chosen::Cpu(device) => Habits::cpu(device.factors(options.precision)),
        Chosen::Cuda(_) | Chosen::Emulated(_) => Habits::gpu(),
    };
    let model = ModelConfig::load(folder)?;
    Ok(plan::footprint(&model, DType::BF16, spec, habits, shape)?.bytes.total())
}

fn median(mut lengths: Vec<usize>) -> usize {
    lengths.sort_unstable();
    lengths.get(lengths.len() / 2).copied().unwrap_or(0)
}

/// Tokens per second of two real steps on examples of typical length, on this machine.
fn measure_speed<B: Backend>(
    device: &B,
    config: &Config,
    folder: &Path,
    spec: &TrainSpec,
    data: &Prepared,
) -> Result<f64> {
    struct Last(f64);
    impl TrainEvents for Last {
        fn on_step(&mut self, report: &StepReport) -> Control {
            self.0 = report.tokens_per_second;
            Control::Continue
        }
    }
    let mut typical: Vec<&EncodedExample> = data.train.iter().collect();
    typical.sort_by_key(|example| example.ids.len());
    let middle = typical.len() / 2;
    let sample: Vec<EncodedExample> = typical.into_iter().skip(middle).take(1).cloned().collect();
    let base = load(device, config, folder, spec.base_dtype)?;
    let probe = TrainSpec {
        max_steps: Some(2),
        batch_size: 1,
        ..spec.clone()
    };
    let lora_config = crate::model::LoraConfig {
        rank: spec.rank,
        alpha: spec.lora_alpha(),
        targets: spec.targets.clone(),
    };
    let mut lora = LoraSet::initialise(base.model.device(), lora_config, base.model.modules(), spec.seed)?;
    let mut last = Last(0.0);
    train::run(
        train::TrainRequest {
            model: &base.model,
            lora: &mut lora,
            spec: &probe,
            train: &sample,
            validation: &[],
            checkpoint_dir: None,
            resume: false,
        },
        &mut last,
    )?;
    Ok(last.0.max(f64::MIN_POSITIVE))
}
