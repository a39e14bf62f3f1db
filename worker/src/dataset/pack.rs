//! Packing: examples into micro-batches of packed tokens, without padding.

/// How examples are put together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Packing {
    /// First-fit decreasing: few micro-batches, at most 11/9 of the optimum + 1 (Johnson 1973).
    Tight,
    /// Neighbours only, so that the order of the file is kept.
    InOrder,
}

/// Groups `lengths` (tokens of each example) into micro-batches of at most `max_tokens`.
///
/// Returns indices into `lengths`. Each index appears exactly once; an example longer than
/// `max_tokens` goes alone. The same input gives the same packing. Micro-batches are ordered by
/// their first example in [`Packing::InOrder`], by decreasing first length in [`Packing::Tight`],
/// so that the most memory is needed first.
pub fn pack(lengths: &[usize], max_tokens: usize, packing: Packing) -> Vec<Vec<usize>> {
    match packing {
        Packing::Tight => pack_tight(lengths, max_tokens),
        Packing::InOrder => pack_in_order(lengths, max_tokens),
    }
}

fn pack_tight(lengths: &[usize], max_tokens: usize) -> Vec<Vec<usize>> {
    let mut longest_first: Vec<(usize, usize)> = lengths.iter().copied().enumerate().collect();
    longest_first.sort_by_key(|(index, length)| (std::cmp::Reverse(*length), *index));
    let mut batches: Vec<(usize, Vec<usize>)> = Vec::new();
    for (index, length) in longest_first {
        match batches
            .iter_mut()
            .find(|(used, _)| used.saturating_add(length) <= max_tokens)
        {
            Some((used, members)) => {
                *used += length;
                members.push(index);
            }
            None => batches.push((length, vec![index])),
        }
    }
    batches.into_iter().map(|(_, members)| members).collect()
}

fn pack_in_order(lengths: &[usize], max_tokens: usize) -> Vec<Vec<usize>> {
    let mut batches: Vec<Vec<usize>> = Vec::new();
    let mut used = 0usize;
    for (index, length) in lengths.iter().enumerate() {
        match batches.last_mut() {
            Some(members) if used.saturating_add(*length) <= max_tokens => members.push(index),
            _ => {
                batches.push(vec![index]);
                used = 0;
            }
        }
        used += length;
    }
    batches
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tight_packing_fills_gaps_and_is_ordered_by_need() {
        let batches = pack(&[300, 700, 200, 800, 5000], 1000, Packing::Tight);
        assert_eq!(batches, vec![vec![4], vec![3, 2], vec![1, 0]]);
    }

    #[test]
    fn packing_in_order_never_reorders() {
        let batches = pack(&[300, 700, 200, 800, 5000, 1], 1000, Packing::InOrder);
        assert_eq!(batches, vec![vec![0, 1], vec![2, 3], vec![4], vec![5]]);
    }

    #[test]
    fn nothing_packs_into_nothing() {
        assert!(pack(&[], 10, Packing::Tight).is_empty());
        assert!(pack(&[], 10, Packing::InOrder).is_empty());
    }
}
