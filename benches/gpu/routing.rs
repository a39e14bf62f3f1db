//! Which experts tokens go to: the same rows on both sides, from a histogram that is stored beside this file.

/// The stored histogram: any number of rows for each of 512 experts.
const STORED: &str = include_str!("routing.json");

/// Neighbouring slots belong to tokens this far apart. It is a prime that no number of tokens is a multiple of here, so the tokens of an
/// expert are all different, and each token has as many slots as any other.
const STRIDE: usize = 1031;

/// Rows of each expert: the histogram's, brought to `tokens * top` rows, or as even as can be. `peers.py` has the same in Python.
pub fn counts(tokens: usize, experts: usize, top: usize, skewed: bool) -> Vec<usize> {
    let stored = stored();
    let shares: Vec<usize> = match skewed {
        true => stored.into_iter().cycle().take(experts).collect(),
        false => vec![1; experts],
    };
    let (total, sum) = (tokens * top, shares.iter().sum::<usize>().max(1));
    let mut counts: Vec<usize> = shares.iter().map(|share| (total * share / sum).min(tokens)).collect();
    let mut left = total - counts.iter().sum::<usize>();
    // What rounding has left goes to experts in their order; those that the histogram gives nothing come last.
    for may_be_empty in [false, true] {
        let mut given = true;
        while left > 0 && given {
            given = false;
            for (count, share) in counts.iter_mut().zip(&shares) {
                if left > 0 && *count < tokens && (*share > 0 || may_be_empty) {
                    *count += 1;
                    left -= 1;
                    given = true;
                }
            }
        }
    }
    counts
}

fn stored() -> Vec<usize> {
    let parsed: serde_json::Value = serde_json::from_str(STORED).unwrap();
    let counts = parsed["counts"].as_array().unwrap().iter();
    counts.map(|count| count.as_u64().unwrap() as usize).collect()
}

/// The experts of each token, `[tokens, top]`.
pub fn chosen(tokens: usize, experts: usize, top: usize, skewed: bool) -> Vec<Vec<usize>> {
    assert!(!tokens.is_multiple_of(STRIDE), "tokens of an expert would repeat");
    let mut chosen = vec![Vec::with_capacity(top); tokens];
    let counts = counts(tokens, experts, top, skewed);
    let slots = counts
        .into_iter()
        .enumerate()
        .flat_map(|(expert, count)| std::iter::repeat_n(expert, count));
    for (slot, expert) in slots.enumerate() {
        chosen[slot * STRIDE % tokens].push(expert);
    }
    chosen
}
