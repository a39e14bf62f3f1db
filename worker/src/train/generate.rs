//! Tokens from a prompt, greedy or sampled.

use brightrun_kernels::Backend;

use crate::error::{Failure, Result};
use crate::model::random::CounterRandom;
use crate::model::{Decoder, LoraSet, Model};

/// How tokens are chosen, and when to stop.
#[derive(Clone, Debug, PartialEq)]
pub struct GenerateSettings {
    /// Tokens to generate at most.
    pub max_new_tokens: usize,
    /// 0 takes the most likely token each time; above 0 logits are divided by it and a token is drawn.
    pub temperature: f32,
    /// Draws only from the most likely tokens that together have this probability, 0 < x ≤ 1.
    pub top_p: f32,
    /// Seed of the draws.
    pub seed: u64,
    /// Tokens that end the text; they are not part of the result.
    pub stop_ids: Vec<i32>,
}

impl Default for GenerateSettings {
    fn default() -> Self {
        Self {
            max_new_tokens: 256,
            temperature: 0.0,
            top_p: 1.0,
            seed: 42,
            stop_ids: Vec::new(),
        }
    }
}

/// Continues `prompt`, at least one token, and gives the new tokens. `on_token` sees each as it is chosen and may end it.
///
/// # Errors
/// `GENERATE_SETTINGS` for an empty prompt or settings out of range, `MODEL_TOO_LONG`, `GENERATE_NON_FINITE`; the backend's own.
pub fn generate<B: Backend>(
    model: &Model<B>,
    lora: Option<&LoraSet<B>>,
    prompt: &[i32],
    settings: &GenerateSettings,
    on_token: &mut dyn FnMut(i32) -> bool,
) -> Result<Vec<i32>> {
    check(prompt, settings)?;
    let room = model.config().max_positions.saturating_sub(prompt.len());
    let limit = settings.max_new_tokens.min(room);
    let mut decoder = Decoder::new(model, lora, prompt.len() + limit)?;
    let random = CounterRandom::new(settings.seed, "generate");
    let mut logits = decoder.read(prompt)?;
    let mut generated = Vec::new();
    while generated.len() < limit {
        let token = choose(&logits, settings, random.unit(generated.len() as u64))?;
        if settings.stop_ids.contains(&token) {
            break;
        }
        generated.push(token);
        if !on_token(token) || generated.len() == limit {
            break;
        }
        logits = decoder.read(&[token])?;
    }
    Ok(generated)
}

fn check(prompt: &[i32], settings: &GenerateSettings) -> Result<()> {
    let rules = [
        (!prompt.is_empty(), "the prompt must have at least one token"),
        (
            settings.temperature >= 0.0 && settings.temperature.is_finite(),
            "temperature must be 0 or more",
        ),
        (
            settings.top_p > 0.0 && settings.top_p <= 1.0,
            "top_p must be above 0 and at most 1",
        ),
    ];
    match rules.into_iter().find(|(holds, _)| !holds) {
        None => Ok(()),
        Some((_, rule)) => Err(Failure::user(
            "GENERATE_SETTINGS",
            format!("Nothing can be generated: {rule}"),
        )),
    }
}

/// `draw` is uniform in `[0, 1)`.
fn choose(logits: &[f32], settings: &GenerateSettings, draw: f32) -> Result<i32> {
    let best = logits
        .iter()
        .enumerate()
        .max_by(|left, right| left.1.total_cmp(right.1).then(right.0.cmp(&left.0)));
    let (best, highest) = match best {
        Some((place, logit)) if logits.iter().all(|logit| logit.is_finite()) => (place, *logit),
        _ => {
            return Err(
                Failure::system("GENERATE_NON_FINITE", "The model's logits are not finite")
                    .hint("The adapter or the model is broken"),
            );
        }
    };
    if settings.temperature == 0.0 {
        return Ok(best as i32);
    }
    let weight = |logit: f32| f64::from((logit - highest) / settings.temperature).exp();
    let mut ranked: Vec<(f64, usize)> = logits
        .iter()
        .enumerate()
        .map(|(id, logit)| (weight(*logit), id))
        .collect();
    ranked.sort_by(|left, right| right.0.total_cmp(&left.0).then(left.1.cmp(&right.1)));
    let nucleus = ranked.iter().map(|(weight, _)| weight).sum::<f64>() * f64::from(settings.top_p);
    let mut covered = 0.0;
    ranked.retain(|(weight, _)| {
        let is_inside = covered < nucleus;
        covered += weight;
        is_inside
    });
    let mut remaining = f64::from(draw) * ranked.iter().map(|(weight, _)| weight).sum::<f64>();
    let drawn = ranked.iter().find(|(weight, _)| {
        remaining -= weight;
        remaining < 0.0
    });
    Ok(drawn.map_or(best, |(_, id)| *id) as i32)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn sampled(temperature: f32, top_p: f32) -> GenerateSettings {
        GenerateSettings {
            temperature,
            top_p,
            ..GenerateSettings::default()
        }
    }

    #[test]
    fn greedy_takes_the_highest_logit_and_the_lower_id_of_equals() {
        assert_eq!(choose(&[0.0, 3.0, 3.0, 1.0], &sampled(0.0, 1.0), 0.9).unwrap(), 1);
    }

    #[test]
    fn draws_follow_the_probabilities() {
        // Probabilities 1/2, 1/4, 1/4.
        let logits = [2f32.ln(), 0.0, 0.0];
        for (draw, token) in [(0.0, 0), (0.49, 0), (0.51, 1), (0.74, 1), (0.76, 2), (0.99, 2)] {
            assert_eq!(choose(&logits, &sampled(1.0, 1.0), draw).unwrap(), token, "{draw}");
        }
    }

    #[test]
    fn the_nucleus_leaves_out_the_tail() {
        let logits = [2f32.ln(), 0.0, 0.0];
        assert_eq!(choose(&logits, &sampled(1.0, 0.5), 0.99).unwrap(), 0);
        assert_eq!(choose(&logits, &sampled(1.0, 0.6), 0.99).unwrap(), 1);
    }

    #[test]
    fn logits_that_are_not_finite_are_an_error() {
        assert_eq!(
            choose(&[0.0, f32::NAN], &sampled(0.0, 1.0), 0.0).unwrap_err().code,
            "GENERATE_NON_FINITE"
        );
    }
}
