//! Choosing experts, and grouping the rows by them.

use std::ops::Range;

use super::super::Cpu;
use super::super::view::{floats, floats_mut, integers, integers_mut};
use crate::contract::RoutingSizes;
use crate::error::{Error, Result};
use crate::ops::{RouteBackward, Routing, RowOrder};

/// A routing that has been checked: every index in it may be used without looking.
pub(super) struct Groups<'a> {
    slots: &'a [i32],
    rows: &'a [i32],
    offsets: &'a [i32],
    top: usize,
}

impl<'a> Groups<'a> {
    pub(super) fn new(op: &'static str, routing: &'a Routing<Cpu>, sizes: RoutingSizes) -> Result<Self> {
        let groups = Self {
            slots: integers(op, "routing.slots", &routing.slots)?,
            rows: integers(op, "routing.rows", &routing.rows)?,
            offsets: integers(op, "routing.offsets", &routing.offsets)?,
            top: sizes.top,
        };
        let count = sizes.slots();
        let rising = groups.offsets.windows(2).all(|pair| pair[0] <= pair[1]);
        let spans = groups.offsets.first() == Some(&0) && groups.offsets.last().copied() == i32::try_from(count).ok();
        let inverse = |(row, slot): (usize, &i32)| {
            let back = usize::try_from(*slot).ok().and_then(|slot| groups.rows.get(slot));
            back.copied() == i32::try_from(row).ok()
        };
        if rising && spans && groups.slots.iter().enumerate().all(inverse) {
            return Ok(groups);
        }
        Err(malformed(op))
    }

    /// The slot of a grouped row.
    pub(super) fn slot(&self, row: usize) -> usize {
        self.slots[row] as usize
    }

    /// The grouped row of a slot.
    pub(super) fn row(&self, slot: usize) -> usize {
        self.rows[slot] as usize
    }

    /// The row of an operand in `order` that grouped row `row` reads.
    pub(super) fn source(&self, row: usize, order: RowOrder) -> usize {
        match order {
            RowOrder::Token => self.slot(row) / self.top,
            RowOrder::Grouped => row,
        }
    }

    /// The grouped rows of every expert.
    pub(super) fn experts(&self) -> impl ExactSizeIterator<Item = Range<usize>> + '_ {
        self.offsets.windows(2).map(|pair| pair[0] as usize..pair[1] as usize)
    }
}

fn malformed(op: &'static str) -> Error {
    Error::Value {
        op,
        argument: "routing",
        problem: "is not one that `route` wrote".to_owned(),
    }
}

/// Writes `experts` and `weights`.
pub(super) fn choose(
    cpu: &Cpu,
    op: &'static str,
    logits: &[f32],
    sizes: RoutingSizes,
    renormalise: bool,
    routing: &mut Routing<Cpu>,
) -> Result<()> {
    let RoutingSizes { experts, top, .. } = sizes;
    let chosen = integers_mut(op, "routing.experts", &mut routing.experts)?;
    let weights = floats_mut(op, "routing.weights", &mut routing.weights)?;
    cpu.for_rows2((chosen, weights), (top, top), |first, chosen, weights| {
        let mut order: Vec<i32> = Vec::with_capacity(experts);
        let rows = chosen.chunks_exact_mut(top).zip(weights.chunks_exact_mut(top));
        for (row, (chosen, weights)) in rows.enumerate() {
            let logits = &logits[(first + row) * experts..][..experts];
            order.clear();
            order.extend(0..experts as i32);
            let larger_first = |a: &i32, b: &i32| {
                key(logits[*b as usize])
                    .total_cmp(&key(logits[*a as usize]))
                    .then(a.cmp(b))
            };
            if top < experts {
                order.select_nth_unstable_by(top - 1, larger_first);
            }
            order[..top].sort_unstable_by(larger_first);
            chosen.copy_from_slice(&order[..top]);
            probabilities(logits, chosen, renormalise, weights);
        }
    });
    Ok(())
}

/// Equal numbers compare equal and every NaN is the largest.
fn key(logit: f32) -> f32 {
    if logit.is_nan() { f32::NAN.abs() } else { logit + 0.0 }
}

/// The weights of the chosen experts, whose first has the largest logit of all.
fn probabilities(logits: &[f32], chosen: &[i32], renormalise: bool, weights: &mut [f32]) {
    let largest = logits[chosen[0] as usize];
    for (weight, expert) in weights.iter_mut().zip(chosen) {
        *weight = (logits[*expert as usize] - largest).exp();
    }
    let sum: f32 = match renormalise {
        true => weights.iter().sum(),
        false => logits.iter().map(|logit| (logit - largest).exp()).sum(),
    };
    weights.iter_mut().for_each(|weight| *weight /= sum);
}

/// Writes `slots`, `rows` and `offsets`: a stable counting sort of the slots by expert.
pub(super) fn group(op: &'static str, sizes: RoutingSizes, routing: &mut Routing<Cpu>) -> Result<()> {
    let experts = integers(op, "routing.experts", &routing.experts)?;
    let slots = integers_mut(op, "routing.slots", &mut routing.slots)?;
    let rows = integers_mut(op, "routing.rows", &mut routing.rows)?;
    let offsets = integers_mut(op, "routing.offsets", &mut routing.offsets)?;
    offsets.fill(0);
    for expert in experts {
        offsets[*expert as usize + 1] += 1;
    }
    for expert in 0..sizes.experts {
        offsets[expert + 1] += offsets[expert];
    }
    let mut next = offsets.to_vec();
    for (slot, (expert, row)) in experts.iter().zip(rows).enumerate() {
        let place = &mut next[*expert as usize];
        *row = *place;
        slots[*place as usize] = slot as i32;
        *place += 1;
    }
    Ok(())
}

/// Writes `dlogits`.
pub(super) fn backward(cpu: &Cpu, op: &'static str, sizes: RoutingSizes, call: RouteBackward<'_, Cpu>) -> Result<()> {
    let RoutingSizes { experts, top, .. } = sizes;
    let chosen = integers(op, "routing.experts", &call.routing.experts)?;
    let inside = |expert: &i32| usize::try_from(*expert).is_ok_and(|expert| expert < experts);
    if !chosen.iter().all(inside) {
        return Err(malformed(op));
    }
    let (logits, dweights) = (
        floats(op, "logits", call.logits)?,
        floats(op, "dweights", call.dweights)?,
    );
    let dlogits = floats_mut(op, "dlogits", call.dlogits)?;
    cpu.for_rows(dlogits, experts, |first, dlogits| {
        for (row, dlogits) in dlogits.chunks_exact_mut(experts).enumerate() {
            let at = (first + row) * top..(first + row + 1) * top;
            let logits = &logits[(first + row) * experts..][..experts];
            token_backward(logits, &chosen[at.clone()], &dweights[at], call.renormalise, dlogits);
        }
    });
    Ok(())
}

/// `dlogits` of one token. In f64, since a weight near 1 makes the differences cancel.
fn token_backward(logits: &[f32], chosen: &[i32], dweights: &[f32], renormalise: bool, dlogits: &mut [f32]) {
    let largest = f64::from(logits[chosen[0] as usize]);
    let power = |logit: f32| (f64::from(logit) - largest).exp();
    let powers: Vec<f64> = chosen.iter().map(|expert| power(logits[*expert as usize])).collect();
    let sum: f64 = match renormalise {
        true => powers.iter().sum(),
        false => logits.iter().map(|logit| power(*logit)).sum(),
    };
    let pull = powers
        .iter()
        .zip(dweights)
        .map(|(p, dw)| p * f64::from(*dw))
        .sum::<f64>()
        / sum;
    if renormalise {
        dlogits.fill(0.0);
    } else {
        for (dlogit, logit) in dlogits.iter_mut().zip(logits) {
            *dlogit = (power(*logit) / sum * -pull) as f32;
        }
    }
    for ((expert, power), dweight) in chosen.iter().zip(powers).zip(dweights) {
        dlogits[*expert as usize] = (power / sum * (f64::from(*dweight) - pull)) as f32;
    }
}
