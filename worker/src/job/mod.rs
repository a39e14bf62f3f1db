//! The life of one job: from a claimed row to the final transaction.

pub mod chart;
pub mod input;
pub mod projection;
