//! Which bucket and object names are accepted.
//!
//! Written names follow the narrow rule that every storage-api release enforces: ASCII letters,
//! digits and ``_ / ! - . * ' ( ) space & $ @ = ; : + , ?``. Read names may be wider, since the app
//! stores the name of the user's file unchanged and newer releases accept UTF-8. Both refuse
//! whatever could leave a folder.

use crate::error::{Failure, Result};

/// S3's limit on a key, which Supabase shares.
const MAX_PATH_BYTES: usize = 1024;
/// Bucket names are limited by S3 (63) and by Supabase's trigger (100).
const MAX_BUCKET_BYTES: usize = 100;
/// The punctuation that storage-api accepts beside letters, digits and the slash.
const PUNCTUATION: &str = "_!-.*'() &$@=;:+,?";

/// Accepts a bucket and a path to read from, or says `STORAGE_NAME_INVALID`.
pub fn check_readable(bucket: &str, path: &str) -> Result<()> {
    check(bucket, path, |letter| !letter.is_control() && letter != '\\')
}

/// Accepts a bucket and a path to write to, or says `STORAGE_NAME_INVALID`.
pub fn check_writable(bucket: &str, path: &str) -> Result<()> {
    check(bucket, path, |letter| letter == '/' || is_plain(letter))
}

/// A file name made acceptable: other characters become `_`, leading dots go.
///
/// ```
/// use brightrun_worker::storage::name::sanitized_file_name;
/// assert_eq!(sanitized_file_name("../Mon fichier é#1.jsonl"), "_Mon fichier __1.jsonl");
/// assert_eq!(sanitized_file_name(""), "file");
/// ```
pub fn sanitized_file_name(name: &str) -> String {
    let plain: String = name
        .trim_start_matches('.')
        .chars()
        .map(|letter| if is_plain(letter) { letter } else { '_' })
        .take(200)
        .collect();
    if plain.is_empty() { "file".to_owned() } else { plain }
}

fn is_plain(letter: char) -> bool {
    letter.is_ascii_alphanumeric() || PUNCTUATION.contains(letter)
}

fn check(bucket: &str, path: &str, accepts: impl Fn(char) -> bool) -> Result<()> {
    let bucket_is_plain = bucket.chars().all(|letter| is_plain(letter) && letter != '?');
    if bucket.is_empty() || bucket.len() > MAX_BUCKET_BYTES || !bucket_is_plain || is_dots(bucket) {
        return Err(refused(
            bucket,
            path,
            "the bucket's name is empty, too long or has other characters",
        ));
    }
    if path.is_empty() || path.len() > MAX_PATH_BYTES {
        return Err(refused(
            bucket,
            path,
            "the object's name is empty or longer than 1024 bytes",
        ));
    }
    if path.split('/').any(|segment| segment.is_empty() || is_dots(segment)) {
        return Err(refused(
            bucket,
            path,
            "the object's name has an empty, `.` or `..` part",
        ));
    }
    if !path.chars().all(accepts) {
        return Err(refused(
            bucket,
            path,
            "the object's name has characters that storages refuse",
        ));
    }
    Ok(())
}

fn is_dots(segment: &str) -> bool {
    segment == "." || segment == ".."
}

fn refused(bucket: &str, path: &str, reason: &str) -> Failure {
    let shown: String = path.chars().take(200).collect();
    Failure::user(
        "STORAGE_NAME_INVALID",
        format!("The storage path cannot be used: {reason}"),
    )
    .at(format!("Bucket {bucket:?}, object {shown:?}"))
    .hint("Store the file under `{user_id}/{id}/{file name}` with plain letters, digits, `-`, `_` and `.`")
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::panic)]
    use super::*;

    #[test]
    fn a_name_that_could_leave_its_folder_is_refused() {
        for path in [
            "../x",
            "a/../x",
            "/etc/passwd",
            "a//b",
            "a/./b",
            "",
            "a/",
            "a\\..\\b",
            "a\0b",
        ] {
            assert_eq!(
                check_readable("lora-models", path).unwrap_err().code,
                "STORAGE_NAME_INVALID",
                "{path:?}"
            );
        }
        for bucket in ["", "..", "a/b", "ü"] {
            assert_eq!(
                check_readable(bucket, "x").unwrap_err().code,
                "STORAGE_NAME_INVALID",
                "{bucket:?}"
            );
        }
    }

    #[test]
    fn a_users_file_name_can_be_read_but_only_plain_names_are_written() {
        let path = "u/d/données #1.jsonl";
        assert_eq!(check_readable("lora-datasets", path), Ok(()));
        assert!(check_writable("lora-datasets", path).is_err());
        assert_eq!(check_writable("lora-models", "u/a/adapter_model.safetensors"), Ok(()));
    }
}
