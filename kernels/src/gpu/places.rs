//! Where in one block of memory tensors lie: a plan of offsets, made by the sequence of requests alone.
//!
//! The plan knows no limit. Its [`reach`](Places::reach) after a step says how large a block that step needs; in a block of that
//! size the same step finds the same offsets again, whatever ran in between, because what is decided depends on nothing but the
//! requests and the gaps they left. A launch recorded with these addresses can therefore be repeated.

use std::collections::BTreeMap;

/// Offsets in a block that may grow without bound.
#[derive(Debug, Default)]
pub(super) struct Places {
    /// Gaps below `end`: their lengths by their beginnings. No two touch, and none touches `end`.
    gaps: BTreeMap<usize, usize>,
    /// Beyond this nothing is in use.
    end: usize,
    reach: usize,
}

impl Places {
    /// The beginning of `bytes` bytes, which are not 0: the smallest gap that has room for them, of equal ones the lowest, or
    /// else the end.
    pub(super) fn take(&mut self, bytes: usize) -> usize {
        let fitting = self.gaps.iter().filter(|(_, length)| **length >= bytes);
        let Some((first, length)) = fitting.min_by_key(|(_, length)| **length).map(|(a, b)| (*a, *b)) else {
            let first = self.end;
            self.end += bytes;
            self.reach = self.reach.max(self.end);
            return first;
        };
        self.gaps.remove(&first);
        if length > bytes {
            self.gaps.insert(first + bytes, length - bytes);
        }
        first
    }

    /// Gives back what [`Places::take`] gave.
    pub(super) fn put_back(&mut self, mut first: usize, bytes: usize) {
        let mut end = first + bytes;
        if let Some((before, length)) = self.gaps.range(..first).next_back().map(|(a, b)| (*a, *b))
            && before + length == first
        {
            self.gaps.remove(&before);
            first = before;
        }
        if let Some(length) = self.gaps.remove(&end) {
            end += length;
        }
        if end == self.end {
            self.end = first;
        } else {
            self.gaps.insert(first, end - first);
        }
    }

    /// Undoes a [`Places::take`] that nothing came of, also its part in the reach, which was `reach` before.
    pub(super) fn withdraw(&mut self, first: usize, bytes: usize, reach: usize) {
        self.put_back(first, bytes);
        self.reach = reach;
    }

    /// Whether nothing is in use.
    pub(super) fn is_empty(&self) -> bool {
        self.end == 0
    }

    /// The size of a block that would have had room for everything so far.
    pub(super) fn reach(&self) -> usize {
        self.reach
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::Random;

    #[test]
    fn neighbours_in_use_never_overlap_and_everything_given_back_leaves_nothing() {
        let (mut places, mut random) = (Places::default(), Random::new(7));
        let mut used: Vec<(usize, usize)> = Vec::new();
        let (mut live, mut peak) = (0, 0);
        for _ in 0..4000 {
            if used.is_empty() || random.below(5) < 3 && used.len() < 60 {
                let bytes = 1 + random.below(1000);
                used.push((places.take(bytes), bytes));
                live += bytes;
                peak = peak.max(live);
            } else {
                let (first, bytes) = used.swap_remove(random.below(used.len()));
                places.put_back(first, bytes);
                live -= bytes;
            }
            let mut sorted = used.clone();
            sorted.sort_unstable();
            assert!(
                sorted.windows(2).all(|pair| pair[0].0 + pair[0].1 <= pair[1].0),
                "{sorted:?}"
            );
        }
        assert!(places.reach() >= peak);
        for (first, bytes) in used {
            places.put_back(first, bytes);
        }
        assert!(places.is_empty() && places.gaps.is_empty());
    }

    #[test]
    fn the_same_requests_get_the_same_places_after_any_others() {
        let step = |places: &mut Places| {
            let [a, b] = [100, 30].map(|bytes| places.take(bytes));
            places.put_back(a, 100);
            let c = places.take(50);
            let d = places.take(60);
            for (first, bytes) in [(d, 60), (b, 30), (c, 50)] {
                places.put_back(first, bytes);
            }
            [a, b, c, d]
        };
        let mut places = Places::default();
        let first = step(&mut places);
        assert_eq!((first, places.reach()), ([0, 100, 0, 130], 190));
        let other = places.take(5);
        places.put_back(other, 5);
        assert_eq!(step(&mut places), first);
        assert_eq!(places.reach(), 190);
    }
}
