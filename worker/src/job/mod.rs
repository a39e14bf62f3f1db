//! The life of one job: from a claimed row to the final transaction.
//!
//! [`run`] is the story; [`input`] reads the row, [`projection`] is everything that is told to the database, [`reporter`]
//! carries progress from the training thread, [`services`] is what jobs share, [`validate`] checks data sets.

pub mod chart;
pub mod input;
pub mod projection;
pub mod reporter;
pub mod run;
pub mod services;
pub mod validate;
