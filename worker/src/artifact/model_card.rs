//! `README.md`: the adapter explained to people and to model hubs.

use std::fmt::Write;

use super::adapter_config::AdapterConfig;
use super::input::{ArtifactInput, ProofSplit};

/// Dropped lines listed in the card; the manifest has all of them.
const LISTED_DROPS: usize = 20;

/// Writes the card. Text from outside (names, reasons) is escaped, so that it stays text.
pub(super) fn model_card(input: &ArtifactInput<'_>, config: &AdapterConfig) -> String {
    let mut card = String::new();
    // Writing to a String cannot fail.
    let _infallible = write_card(&mut card, input, config);
    card
}

fn write_card(card: &mut String, input: &ArtifactInput<'_>, config: &AdapterConfig) -> std::fmt::Result {
    front_matter(card, input)?;
    introduction(card, input, config)?;
    data(card, input)?;
    results(card, input)?;
    usage(card, input, config)?;
    limits(card, input)
}

/// A JSON string is a YAML string, whatever it holds.
fn quoted(text: &str) -> String {
    serde_json::Value::from(text).to_string()
}

/// Text for a Markdown line or table cell.
fn plain(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for letter in text.chars() {
        match letter {
            letter if letter.is_control() => escaped.push(' '),
            '|' | '`' | '*' | '_' | '[' | ']' | '<' | '>' | '#' | '\\' => escaped.extend(['\\', letter]),
            letter => escaped.push(letter),
        }
    }
    escaped
}

fn number(value: Option<f64>) -> String {
    match value.filter(|value| value.is_finite()) {
        Some(value) => format!("{value:.4}"),
        None => "not measured".to_owned(),
    }
}

fn front_matter(card: &mut String, input: &ArtifactInput<'_>) -> std::fmt::Result {
    writeln!(card, "---")?;
    writeln!(card, "base_model: {}", quoted(&input.base.id))?;
    writeln!(card, "library_name: peft")?;
    writeln!(card, "pipeline_tag: text-generation")?;
    writeln!(card, "tags:\n- lora\n- peft\n- brightrun")?;
    writeln!(card, "---\n")
}

fn introduction(card: &mut String, input: &ArtifactInput<'_>, config: &AdapterConfig) -> std::fmt::Result {
    let base = plain(&input.base.id);
    writeln!(card, "# LoRA adapter for {base}: {}\n", plain(&input.data.name))?;
    writeln!(
        card,
        "This adapter changes how {base} answers; it is of no use on any other model or revision. It learnt the \
         assistant's answers of the data set \"{}\": {} examples, {} optimizer steps.\n",
        plain(&input.data.name),
        input.data.training_examples,
        input.metrics.steps,
    )?;
    let targets: Vec<&str> = config.target_modules.iter().map(String::as_str).collect();
    writeln!(card, "| | |\n|---|---|")?;
    writeln!(
        card,
        "| Base revision | {} |",
        plain(input.base.revision.as_deref().unwrap_or("not recorded"))
    )?;
    writeln!(card, "| Base config SHA-256 | {} |", plain(&input.base.config_sha256))?;
    writeln!(
        card,
        "| Base weights fingerprint | {} |",
        plain(&input.base.checkpoint_fingerprint)
    )?;
    writeln!(card, "| Rank, alpha | {}, {} |", config.r, config.lora_alpha)?;
    writeln!(card, "| Adapted modules | {} |", plain(&targets.join(", ")))?;
    if let Some(parameters) = &config.target_parameters {
        writeln!(card, "| Adapted parameters | {} |", plain(&parameters.join(", ")))?;
    }
    let training_dtype = format!("{:?}", input.spec.base_dtype).to_lowercase();
    writeln!(card, "| Base weights during training | {training_dtype} |")?;
    writeln!(
        card,
        "| Learning rate, epochs, batch | {}, {}, {} |",
        input.spec.learning_rate, input.metrics.epochs, input.spec.batch_size
    )?;
    writeln!(card, "| Seed | {} |", input.spec.seed)?;
    let revision = input.program.git_revision.as_deref().unwrap_or("unknown revision");
    writeln!(
        card,
        "| Trained by | brightrun {} ({}), {} backend |\n",
        plain(&input.program.version),
        plain(revision),
        plain(&input.program.backend)
    )
}

fn data(card: &mut String, input: &ArtifactInput<'_>) -> std::fmt::Result {
    let data = &input.data;
    writeln!(card, "## Data\n\n| | |\n|---|---|")?;
    writeln!(card, "| SHA-256 | {} |", plain(&data.sha256))?;
    writeln!(card, "| Size | {} bytes, {} lines |", data.bytes, data.lines)?;
    writeln!(card, "| Trained on | {} examples |", data.training_examples)?;
    writeln!(card, "| Held out | {} examples |", data.validation_examples)?;
    writeln!(
        card,
        "| Shortened to the length limit | {} examples |",
        data.trimmed_examples
    )?;
    writeln!(card, "| Chat template SHA-256 | {} |", plain(&input.template_sha256))?;
    writeln!(card, "| Not used | {} lines |\n", data.dropped.len())?;
    for dropped in data.dropped.iter().take(LISTED_DROPS) {
        writeln!(
            card,
            "- line {}: {} [{}]",
            dropped.line,
            plain(&dropped.reason),
            plain(&dropped.code)
        )?;
    }
    match data.dropped.len().saturating_sub(LISTED_DROPS) {
        0 if data.dropped.is_empty() => Ok(()),
        0 => writeln!(card),
        more => writeln!(card, "- and {more} more, all in `manifest.json`\n"),
    }
}

fn results(card: &mut String, input: &ArtifactInput<'_>) -> std::fmt::Result {
    let metrics = &input.metrics;
    writeln!(card, "## Results\n\nLosses are means per supervised token, in nats.\n")?;
    writeln!(card, "| | first | last |\n|---|---|---|")?;
    writeln!(
        card,
        "| Training loss | {} | {} |",
        number(metrics.first_training_loss),
        number(metrics.last_training_loss)
    )?;
    writeln!(
        card,
        "| Held-out loss | {} | {} |\n",
        number(metrics.first_validation_loss),
        number(metrics.last_validation_loss)
    )?;
    writeln!(
        card,
        "{} tokens ({} supervised) in {:.0} s: {:.0} tokens/s, peak memory {:.2} GB.\n",
        metrics.tokens,
        metrics.supervised_tokens,
        metrics.seconds,
        metrics.tokens_per_second,
        metrics.peak_memory_bytes as f64 / 1e9,
    )?;
    if let Some(routing) = &metrics.routing {
        writeln!(
            card,
            "Routing over {} layers: entropy {:.3} of even shares, the busiest expert {:.1} times the mean, {:.1} % of experts \
             without a token.\n",
            routing.layers,
            routing.entropy,
            routing.max_over_mean,
            100.0 * routing.idle_share,
        )?;
    }
    let examples = match input.proof.split {
        ProofSplit::HeldOut => "held-out",
        ProofSplit::Training => "training",
    };
    writeln!(
        card,
        "The saved files were to be loaded again and to reproduce a loss of {:.6} on {} {examples} examples; \
         `manifest.json` records what was found.\n",
        input.proof.loss, input.proof.examples,
    )
}

fn usage(card: &mut String, input: &ArtifactInput<'_>, config: &AdapterConfig) -> std::fmt::Result {
    let base = quoted(&input.base.id);
    let revision = input
        .base
        .revision
        .as_deref()
        .map(|revision| format!(", revision={}", quoted(revision)));
    let revision = revision.unwrap_or_default();
    writeln!(card, "## Use\n\nWith PEFT:\n\n```python")?;
    writeln!(
        card,
        "from peft import PeftModel\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n"
    )?;
    writeln!(card, "tokenizer = AutoTokenizer.from_pretrained(\"ADAPTER_FOLDER\")")?;
    writeln!(
        card,
        "model = AutoModelForCausalLM.from_pretrained({base}{revision}, dtype=\"auto\")"
    )?;
    writeln!(
        card,
        "model = PeftModel.from_pretrained(model, \"ADAPTER_FOLDER\")\n```\n\nWith vLLM:\n\n```sh"
    )?;
    writeln!(
        card,
        "vllm serve {} --enable-lora --max-lora-rank {} --lora-modules adapter=ADAPTER_FOLDER\n```\n",
        shell_quoted(&input.base.id),
        vllm_rank(config.r),
    )?;
    if config.target_parameters.is_some() {
        writeln!(
            card,
            "The routed experts are adapted in PEFT's layout; not every server reads it.\n"
        )?;
    }
    Ok(())
}

/// vLLM accepts only certain maxima.
fn vllm_rank(rank: usize) -> usize {
    [8, 16, 32, 64, 128, 256, 320, 512]
        .into_iter()
        .find(|accepted| *accepted >= rank)
        .unwrap_or(rank)
}

fn shell_quoted(text: &str) -> String {
    format!("'{}'", text.replace('\'', r"'\''"))
}

fn limits(card: &mut String, input: &ArtifactInput<'_>) -> std::fmt::Result {
    writeln!(card, "## Limits\n")?;
    writeln!(
        card,
        "- It repeats what its data holds, mistakes and biases included; answers need the usual care."
    )?;
    writeln!(
        card,
        "- It was trained with the chat template named above; another template gives other answers."
    )?;
    if input.proof.split == ProofSplit::Training {
        writeln!(
            card,
            "- No examples were held out, so nothing here says how it does on new questions."
        )?;
    }
    if input.warnings.is_empty() {
        return Ok(());
    }
    writeln!(card, "\n## Warnings\n")?;
    input
        .warnings
        .iter()
        .try_for_each(|warning| writeln!(card, "- {}", plain(warning)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_from_outside_stay_text() {
        assert_eq!(plain("a|b\n# <b>"), "a\\|b \\# \\<b\\>");
        assert_eq!(quoted("x: \"y\"\n- z"), r#""x: \"y\"\n- z""#);
        assert_eq!(shell_quoted("a'b"), r"'a'\''b'");
    }

    #[test]
    fn the_rank_named_to_vllm_is_one_it_accepts() {
        assert_eq!([1, 8, 9, 200].map(vllm_rank), [8, 8, 16, 256]);
    }
}
