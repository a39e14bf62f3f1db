//! `brightrun queue limit|rate|budget`: who may have how much of the machines.

use std::time::Duration;

use brightrun_queue::{OwnerBudget, Period, Queue, Rate, RateScope, Scope};
use clap::{Args, Subcommand, ValueEnum};
use serde_json::json;
use uuid::Uuid;

use super::queue::Told;
use crate::error::{Failure, Result};

/// What is bounded.
#[derive(Debug, Subcommand)]
pub enum Limits {
    /// How many jobs of an owner or of a concurrency key may run at once
    Limit {
        /// Of what
        #[command(flatten)]
        whose: Whose,
        /// So many; without it, any number
        #[arg(long)]
        at_most: Option<i32>,
        /// An owner's weight when turns are taken
        #[arg(long, default_value_t = 1.0)]
        weight: f64,
    },
    /// How many jobs of an owner, of a concurrency key or of a queue may start in a stretch of time
    Rate {
        /// Of what
        #[command(flatten)]
        whose: Whose,
        /// Of a queue
        #[arg(long, conflicts_with_all = ["owner", "key"])]
        queue: Option<String>,
        /// So many; without it, any number
        #[arg(long, value_parser = clap::value_parser!(i32).range(1..))]
        starts: Option<i32>,
        /// In so many seconds
        #[arg(long, default_value_t = 60, value_parser = clap::value_parser!(u64).range(1..))]
        seconds: u64,
    },
    /// What all jobs of an owner may cost; without an amount, what they have cost
    Budget {
        /// Whose
        owner: Uuid,
        /// So much
        #[arg(long)]
        amount: Option<f64>,
        /// In each
        #[arg(long, value_enum, default_value = "month")]
        period: Each,
        /// As much as they like
        #[arg(long, conflicts_with = "amount")]
        unlimited: bool,
    },
}

/// An owner or a key.
#[derive(Debug, Args)]
pub struct Whose {
    /// Of an owner
    #[arg(long, conflicts_with = "key")]
    pub owner: Option<Uuid>,
    /// Of a concurrency key
    #[arg(long)]
    pub key: Option<String>,
}

/// A budget's period.
#[derive(Clone, Copy, Debug, ValueEnum)]
pub enum Each {
    /// For good
    Ever,
    /// Day of UTC
    Day,
    /// Week of UTC
    Week,
    /// Month of UTC
    Month,
}

fn nobody_named() -> Failure {
    Failure::user("QUEUE_LIMIT_OF_NOBODY", "Say of what: --owner, --key or --queue.")
}

pub(super) async fn run(queue: &Queue, limits: &Limits, told: Told) -> Result<()> {
    match limits {
        Limits::Limit { whose, at_most, weight } => {
            let scope = match (whose.owner, whose.key.as_deref()) {
                (Some(owner), _) => Scope::Owner(owner),
                (_, Some(key)) => Scope::Key(key),
                _ => return Err(nobody_named()),
            };
            queue.set_limit(scope, *at_most, *weight).await?;
            let words = at_most.map_or_else(|| "any number".to_owned(), |most| most.to_string());
            told.one(
                &json!({ "at_most": at_most, "weight": weight }),
                &format!("From now on {words} of them may run at once."),
            )
        }
        Limits::Rate {
            whose,
            queue: named,
            starts,
            seconds,
        } => {
            let scope = match (whose.owner, whose.key.as_deref(), named.as_deref()) {
                (Some(owner), _, _) => RateScope::Owner(owner),
                (_, Some(key), _) => RateScope::Key(key),
                (_, _, Some(named)) => RateScope::Queue(named),
                _ => return Err(nobody_named()),
            };
            let per = Duration::from_secs(*seconds);
            let rate = starts.map(|starts| Rate { starts, per });
            queue.set_rate(scope, rate).await?;
            let words = starts.map_or_else(
                || "any number of them may start".to_owned(),
                |starts| format!("{starts} of them may start in {seconds} s"),
            );
            told.one(
                &json!({ "starts": starts, "seconds": seconds }),
                &format!("From now on {words}."),
            )
        }
        Limits::Budget {
            owner,
            amount,
            period,
            unlimited,
        } => {
            if amount.is_some() || *unlimited {
                queue.set_budget(*owner, *amount, span(*period)).await?;
            }
            let budget = queue.budget(*owner).await?;
            told.one(&json!({ "budget": budget }), &in_words(budget))
        }
    }
}

fn span(each: Each) -> Period {
    match each {
        Each::Ever => Period::Ever,
        Each::Day => Period::Day,
        Each::Week => Period::Week,
        Each::Month => Period::Month,
    }
}

fn in_words(budget: Option<OwnerBudget>) -> String {
    let Some(budget) = budget else {
        return "They may cost as much as they like.".to_owned();
    };
    let since = budget
        .since
        .map_or_else(String::new, |since| format!(" since {}", since.to_rfc3339()));
    format!("{:.2} of {:.2} are spent{since}.", budget.spent, budget.budget)
}
