//! What a download asks of the machine's disks.

use std::os::unix::fs::MetadataExt;
use std::path::Path;

/// Mounts and room.
pub trait Disk {
    /// Whether something is mounted at a folder.
    fn is_mounted(&self, volume: &Path) -> bool;

    /// Bytes that may still be written below a folder; `None` where nobody knows.
    fn free_bytes(&self, folder: &Path) -> Option<u64>;
}

/// The machine's own disks.
#[derive(Clone, Copy, Debug)]
pub struct System;

impl Disk for System {
    /// A mount point is on another device than the folder it lies in.
    fn is_mounted(&self, volume: &Path) -> bool {
        let device = |path: &Path| std::fs::metadata(path).ok().map(|facts| facts.dev());
        match (device(volume), volume.parent().and_then(device)) {
            (Some(own), Some(parent)) => own != parent,
            _ => false,
        }
    }

    fn free_bytes(&self, folder: &Path) -> Option<u64> {
        crate::model::load::snapshot::folder::free_bytes(folder)
    }
}
