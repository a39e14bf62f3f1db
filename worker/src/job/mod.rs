//! The life of one job: from a claimed row to the final transaction.
//!
//! [`run`] is the story; [`input`] reads the row, [`compute`] trains and proves, [`projection`] is everything that is told to
//! the database, [`reporter`] carries progress from the training thread to a [`link`], [`services`] is what jobs share,
//! [`validate`] checks data sets, [`serverless`] is the door for jobs that RunPod hands out.

pub mod chart;
pub mod compute;
pub mod input;
pub mod link;
pub mod projection;
pub mod reporter;
pub mod run;
pub mod serverless;
pub mod services;
pub mod validate;
