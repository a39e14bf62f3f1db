//! Which examples an optimizer step sees: a pure function of the seed and the step, so that the data cursor of a run is its
//! step number and nothing else.

use crate::model::random::CounterRandom;
use crate::spec::{Order, TrainSpec};

/// The order in which examples are visited.
#[derive(Clone, Debug)]
pub struct DataOrder {
    order: Order,
    seed: u64,
    examples: usize,
    batch_size: usize,
    total_steps: usize,
    /// The epoch whose permutation is held, and the permutation.
    held: Option<(usize, Vec<usize>)>,
}

impl DataOrder {
    /// The order of a run over `examples` examples.
    pub fn new(spec: &TrainSpec, examples: usize) -> Self {
        let batch_size = spec.batch_size.max(1);
        let steps_per_epoch = examples.div_ceil(batch_size);
        Self {
            order: spec.order,
            seed: spec.seed,
            examples,
            batch_size,
            total_steps: spec.max_steps.unwrap_or(steps_per_epoch * spec.epochs),
            held: None,
        }
    }

    /// Optimizer steps of the run.
    pub fn total_steps(&self) -> usize {
        self.total_steps
    }

    /// Steps that visit every example once; an epoch's last step may see fewer examples than the others.
    pub fn steps_per_epoch(&self) -> usize {
        self.examples.div_ceil(self.batch_size).max(1)
    }

    /// Passes over the data after `step` steps: 1.5 is half-way through the second.
    pub fn epochs_after(&self, step: usize) -> f64 {
        step as f64 / self.steps_per_epoch() as f64
    }

    /// Indices of the examples of a step, counted from 0.
    pub fn examples_of(&mut self, step: usize) -> Vec<usize> {
        let epoch = step / self.steps_per_epoch();
        if self.held.as_ref().is_none_or(|(held, _)| *held != epoch) {
            self.held = Some((epoch, self.permutation(epoch)));
        }
        let first = step % self.steps_per_epoch() * self.batch_size;
        let permutation = self.held.iter().flat_map(|(_, permutation)| permutation);
        permutation.skip(first).take(self.batch_size).copied().collect()
    }

    fn permutation(&self, epoch: usize) -> Vec<usize> {
        match self.order {
            Order::File => (0..self.examples).collect(),
            Order::Shuffled => CounterRandom::new(self.seed, &format!("order {epoch}")).permutation(self.examples),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn order(order: Order, examples: usize) -> DataOrder {
        let spec = TrainSpec {
            order,
            batch_size: 4,
            epochs: 3,
            ..TrainSpec::default()
        };
        DataOrder::new(&spec, examples)
    }

    #[test]
    fn every_epoch_visits_every_example_once() {
        let mut order = order(Order::Shuffled, 10);
        assert_eq!((order.steps_per_epoch(), order.total_steps()), (3, 9));
        let mut seen = Vec::new();
        for epoch in 0..3 {
            let visited: Vec<usize> = (0..3).flat_map(|step| order.examples_of(epoch * 3 + step)).collect();
            let mut sorted = visited.clone();
            sorted.sort_unstable();
            assert_eq!(sorted, (0..10).collect::<Vec<_>>());
            seen.push(visited);
        }
        assert_ne!(seen[0], seen[1]);
    }

    #[test]
    fn a_step_sees_the_same_examples_whatever_was_asked_before() {
        let mut forward = order(Order::Shuffled, 10);
        let visited: Vec<_> = (0..9).map(|step| forward.examples_of(step)).collect();
        for step in (0..9).rev() {
            assert_eq!(order(Order::Shuffled, 10).examples_of(step), visited[step]);
            assert_eq!(forward.examples_of(step), visited[step]);
        }
    }

    #[test]
    fn file_order_is_the_files_and_its_last_step_may_be_short() {
        let mut order = order(Order::File, 10);
        assert_eq!(order.examples_of(0), [0, 1, 2, 3]);
        assert_eq!(order.examples_of(2), [8, 9]);
        assert_eq!(order.examples_of(3), [0, 1, 2, 3]);
    }
}
