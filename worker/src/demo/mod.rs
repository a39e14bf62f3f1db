//! The main job on one machine: a private Postgres, a folder as storage, a miniature model.

pub mod miniature;
