//! Training and validation examples, apart by conversation.

use std::collections::HashMap;

use super::message::{Example, digest_of};

/// Indices into the examples that were split, each part in ascending order.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Split {
    /// What is learnt.
    pub train: Vec<usize>,
    /// What is held out.
    pub validation: Vec<usize>,
}

/// Holds out `share` of the conversations (0–0.5), at least one when `share` is above 0 and there
/// are two or more.
///
/// Two examples belong to one conversation when they have the same `conversation_id`, or when one
/// of them is a prefix (or a copy) of the other: nested histories must not leak across. Which
/// conversations are held out depends only on `seed` and on their content, not on their order in the file.
pub fn split(examples: &[Example], share: f32, seed: u64) -> Split {
    let groups = conversations(examples);
    let held_out = held_out_count(groups.len(), share);
    let mut ranked: Vec<(u64, &Vec<usize>)> = groups
        .iter()
        .map(|group| (rank(examples, group, seed), group))
        .collect();
    ranked.sort();
    let mut parts = Split::default();
    for (position, (_, group)) in ranked.into_iter().enumerate() {
        let part = if position < held_out {
            &mut parts.validation
        } else {
            &mut parts.train
        };
        part.extend(group);
    }
    parts.train.sort_unstable();
    parts.validation.sort_unstable();
    parts
}

/// How many of `count` conversations are held out.
fn held_out_count(count: usize, share: f32) -> usize {
    if count < 2 || share.is_nan() || share <= 0.0 {
        return 0;
    }
    let wanted = (count as f64 * f64::from(share)).round() as usize;
    wanted.clamp(1, count - 1)
}

/// A conversation's place in the seeded order: the smallest keyed digest of its examples.
fn rank(examples: &[Example], group: &[usize], seed: u64) -> u64 {
    group
        .iter()
        .filter_map(|index| examples.get(*index))
        .map(|example| digest_of(&[&seed.to_le_bytes(), &example.fingerprint().to_le_bytes()]))
        .min()
        .unwrap_or(u64::MAX)
}

/// Examples grouped by conversation: a union-find over shared ids and shared prefixes.
fn conversations(examples: &[Example]) -> Vec<Vec<usize>> {
    let mut parent: Vec<usize> = (0..examples.len()).collect();
    let mut owner_of_id: HashMap<&str, usize> = HashMap::new();
    let mut owner_of_whole: HashMap<u64, usize> = HashMap::new();
    let prefixes: Vec<Vec<u64>> = examples.iter().map(Example::prefix_fingerprints).collect();
    for (index, example) in examples.iter().enumerate() {
        if let Some(id) = &example.conversation_id {
            let owner = *owner_of_id.entry(id).or_insert(index);
            join(&mut parent, owner, index);
        }
        if let Some(whole) = prefixes.get(index).and_then(|list| list.last()) {
            let owner = *owner_of_whole.entry(*whole).or_insert(index);
            join(&mut parent, owner, index);
        }
    }
    for (index, list) in prefixes.iter().enumerate() {
        for prefix in list {
            if let Some(owner) = owner_of_whole.get(prefix) {
                join(&mut parent, *owner, index);
            }
        }
    }
    let mut groups: HashMap<usize, Vec<usize>> = HashMap::new();
    for index in 0..examples.len() {
        groups.entry(root(&mut parent, index)).or_default().push(index);
    }
    groups.into_values().collect()
}

/// The representative of `index`; halves the path on its way.
fn root(parent: &mut [usize], mut index: usize) -> usize {
    while let Some(&above) = parent.get(index) {
        if above == index {
            break;
        }
        let grand = parent.get(above).copied().unwrap_or(above);
        if let Some(slot) = parent.get_mut(index) {
            *slot = grand;
        }
        index = grand;
    }
    index
}

/// Puts two examples in one group.
fn join(parent: &mut [usize], one: usize, other: usize) {
    let (one, other) = (root(parent, one), root(parent, other));
    if let Some(slot) = parent.get_mut(one.max(other)) {
        *slot = one.min(other);
    }
}
