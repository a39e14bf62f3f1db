//! Environment → [`StorageConfig`].

use std::path::PathBuf;

use url::Url;

use crate::error::{Failure, Result};
use crate::secret::Secret;

/// Which storage is used, and how it is opened.
#[derive(Clone, Debug)]
pub enum StorageConfig {
    /// A folder of this machine: `{root}/{bucket}/{path}`.
    Local {
        /// The folder; made when the first object is stored.
        root: PathBuf,
    },
    /// Supabase Storage over its REST interface.
    Supabase {
        /// The project's URL, with or without `/storage/v1`.
        url: Url,
        /// The service key: a legacy JWT or `sb_secret_…`.
        key: Secret,
    },
    /// Anything that speaks S3.
    S3(S3Config),
}

/// How an S3 service is opened.
#[derive(Clone, Debug)]
pub struct S3Config {
    /// The service's address; `None` means Amazon's.
    pub endpoint: Option<Url>,
    /// The region that requests are signed for.
    pub region: String,
    /// The key's public half.
    pub access_key_id: Secret,
    /// The key itself.
    pub secret_access_key: Secret,
    /// The token of a temporary key.
    pub session_token: Option<Secret>,
    /// The one S3 bucket that holds everything, each of our buckets being a folder in it.
    /// `None`: each of our buckets is an S3 bucket.
    pub bucket: Option<String>,
    /// A folder before all others within `bucket`.
    pub prefix: String,
}

/// The variable that chooses the storage.
pub const CHOICE: &str = "BRIGHTRUN_STORAGE";

const SUPABASE_URL: &[&str] = &["SUPABASE_URL", "NEXT_PUBLIC_SUPABASE_URL"];
const SUPABASE_KEY: &[&str] = &["SUPABASE_SERVICE_ROLE_KEY", "SUPABASE_SECRET_KEY"];
const S3_ENDPOINT: &[&str] = &["S3_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL"];
const S3_REGION: &[&str] = &["S3_REGION", "AWS_REGION", "AWS_DEFAULT_REGION"];
const S3_ID: &[&str] = &["S3_ACCESS_KEY_ID", "AWS_ACCESS_KEY_ID"];
const S3_KEY: &[&str] = &["S3_SECRET_ACCESS_KEY", "AWS_SECRET_ACCESS_KEY"];
const S3_TOKEN: &[&str] = &["S3_SESSION_TOKEN", "AWS_SESSION_TOKEN"];

impl StorageConfig {
    /// The configuration in the process's environment.
    pub fn from_env() -> Result<Self> {
        Self::from_variables(None, |name| std::env::var(name).ok())
    }

    /// `choice` (from a flag or a file) or else `BRIGHTRUN_STORAGE` decides: `local:/dir`, `supabase`,
    /// `s3` (each bucket an S3 bucket) or `s3://bucket/prefix` (one S3 bucket for all). Where neither is
    /// given, a complete pair of Supabase variables is choice enough. Credentials come from
    /// `variable` only. Every missing variable is named in one failure.
    pub fn from_variables(choice: Option<&str>, variable: impl Fn(&str) -> Option<String>) -> Result<Self> {
        let variables = Variables {
            variable,
            missing: Vec::new(),
        };
        let chosen = choice.map(str::to_owned).or_else(|| variables.get(&[CHOICE]));
        let chosen = match chosen {
            Some(chosen) => chosen.trim().to_owned(),
            None if variables.get(SUPABASE_URL).is_some() && variables.get(SUPABASE_KEY).is_some() => {
                "supabase".to_owned()
            }
            None => return Err(unset()),
        };
        match chosen.split_once(':').unwrap_or((&chosen, "")) {
            ("local", folder) if !folder.is_empty() => {
                let folder = folder.strip_prefix("//").unwrap_or(folder);
                Ok(Self::Local {
                    root: PathBuf::from(folder),
                })
            }
            ("supabase", "") => variables.supabase(),
            ("s3", rest) => variables.s3(rest),
            _ => Err(unknown()),
        }
    }
}

struct Variables<Lookup> {
    variable: Lookup,
    missing: Vec<&'static str>,
}

impl<Lookup: Fn(&str) -> Option<String>> Variables<Lookup> {
    /// The first of several names that is set and not blank.
    fn get(&self, names: &[&str]) -> Option<String> {
        names
            .iter()
            .filter_map(|name| (self.variable)(name))
            .map(|value| value.trim().to_owned())
            .find(|value| !value.is_empty())
    }

    /// The same; its absence is remembered under the first name.
    fn need(&mut self, names: &[&'static str]) -> String {
        self.get(names).unwrap_or_else(|| {
            self.missing.extend(names.first());
            String::new()
        })
    }

    fn supabase(mut self) -> Result<StorageConfig> {
        let url = self.need(SUPABASE_URL);
        let key = self.need(SUPABASE_KEY);
        self.all_present()?;
        Ok(StorageConfig::Supabase {
            url: parse_url(SUPABASE_URL, &url)?,
            key: printable(SUPABASE_KEY, key)?,
        })
    }

    /// `rest` is what follows `s3:`: nothing, or `//bucket` or `//bucket/prefix`.
    fn s3(mut self, rest: &str) -> Result<StorageConfig> {
        let location = rest.strip_prefix("//").unwrap_or(rest);
        let (bucket, prefix) = location.split_once('/').unwrap_or((location, ""));
        let access_key_id = self.need(S3_ID);
        let secret_access_key = self.need(S3_KEY);
        let (endpoint, region) = (self.get(S3_ENDPOINT), self.get(S3_REGION));
        if endpoint.is_none() && region.is_none() {
            self.missing.extend(["S3_ENDPOINT_URL"]);
        }
        self.all_present()?;
        Ok(StorageConfig::S3(S3Config {
            endpoint: endpoint.map(|url| parse_url(S3_ENDPOINT, &url)).transpose()?,
            region: region.unwrap_or_else(|| "us-east-1".to_owned()),
            access_key_id: printable(S3_ID, access_key_id)?,
            secret_access_key: printable(S3_KEY, secret_access_key)?,
            session_token: self.get(S3_TOKEN).map(|token| printable(S3_TOKEN, token)).transpose()?,
            bucket: Some(bucket.to_owned()).filter(|bucket| !bucket.is_empty()),
            prefix: prefix.trim_matches('/').to_owned(),
        }))
    }

    fn all_present(&self) -> Result<()> {
        if self.missing.is_empty() {
            return Ok(());
        }
        Err(Failure::system(
            "STORAGE_CONFIG_MISSING",
            format!(
                "The storage needs settings that are not set: {}",
                self.missing.join(", ")
            ),
        )
        .at("Environment")
        .hint("Set these variables and start again"))
    }
}

/// Accepts an `http` or `https` address without user, password or query. The value itself is never
/// repeated: people paste credentials into the wrong variable.
fn parse_url(names: &[&str], value: &str) -> Result<Url> {
    let plain = |url: &Url| {
        matches!(url.scheme(), "http" | "https")
            && url.has_host()
            && url.username().is_empty()
            && url.password().is_none()
            && url.query().is_none()
    };
    let url = Url::parse(value).ok().filter(plain).ok_or_else(|| {
        invalid(
            names,
            "is not an http or https address without user, password and query",
        )
    })?;
    Ok(url)
}

/// A key travels in a header, where only printable ASCII may stand.
fn printable(names: &[&str], value: String) -> Result<Secret> {
    if value.chars().all(|letter| letter.is_ascii_graphic()) {
        return Ok(Secret::new(value));
    }
    Err(invalid(names, "has spaces or other characters that no key has"))
}

fn invalid(names: &[&str], problem: &str) -> Failure {
    let name = names.first().copied().unwrap_or(CHOICE);
    Failure::system("STORAGE_CONFIG_INVALID", format!("The variable {name} {problem}")).at("Environment")
}

fn unknown() -> Failure {
    invalid(&[CHOICE], "names no storage").hint("Use `local:/folder`, `supabase`, `s3` or `s3://bucket/prefix`")
}

fn unset() -> Failure {
    Failure::system(
        "STORAGE_CONFIG_MISSING",
        format!("No storage is chosen: {CHOICE} is not set"),
    )
    .at("Environment")
    .hint("Set it to `local:/folder`, `supabase`, `s3` or `s3://bucket/prefix`")
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::panic)]
    use super::*;

    fn from(pairs: &[(&str, &str)]) -> Result<StorageConfig> {
        StorageConfig::from_variables(None, |name| {
            pairs
                .iter()
                .find(|(key, _)| *key == name)
                .map(|(_, value)| (*value).to_owned())
        })
    }

    #[test]
    fn missing_variables_are_named_all_at_once() {
        let failure = from(&[(CHOICE, "supabase")]).unwrap_err();
        assert_eq!(failure.code, "STORAGE_CONFIG_MISSING");
        assert!(
            failure.message.contains("SUPABASE_URL, SUPABASE_SERVICE_ROLE_KEY"),
            "{failure}"
        );
        let failure = from(&[(CHOICE, "s3://b"), ("S3_ACCESS_KEY_ID", "  ")]).unwrap_err();
        assert!(
            failure
                .message
                .contains("S3_ACCESS_KEY_ID, S3_SECRET_ACCESS_KEY, S3_ENDPOINT_URL"),
            "{failure}"
        );
        assert_eq!(from(&[]).unwrap_err().code, "STORAGE_CONFIG_MISSING");
    }

    #[test]
    fn each_form_of_the_choice_is_understood() {
        let Ok(StorageConfig::Local { root }) = from(&[(CHOICE, "local:/srv/files")]) else {
            panic!("a folder");
        };
        assert_eq!(root, PathBuf::from("/srv/files"));
        let pair = [
            ("SUPABASE_URL", "https://p.example"),
            ("SUPABASE_SERVICE_ROLE_KEY", "fake-key"),
        ];
        assert!(
            matches!(from(&pair), Ok(StorageConfig::Supabase { .. })),
            "the pair is choice enough"
        );
        let Ok(StorageConfig::S3(s3)) = from(&[
            (CHOICE, "s3://all/some/where/"),
            ("AWS_ACCESS_KEY_ID", "fake-id"),
            ("AWS_SECRET_ACCESS_KEY", "fake-key"),
            ("AWS_REGION", "eu-west-3"),
        ]) else {
            panic!("an S3 bucket");
        };
        assert_eq!(
            (s3.bucket.as_deref(), s3.prefix.as_str(), s3.region.as_str()),
            (Some("all"), "some/where", "eu-west-3")
        );
        for wrong in ["local:", "ftp://x", "supabase:x"] {
            assert_eq!(
                from(&[(CHOICE, wrong)]).unwrap_err().code,
                "STORAGE_CONFIG_INVALID",
                "{wrong}"
            );
        }
    }

    #[test]
    fn a_credential_in_the_wrong_variable_is_not_repeated() {
        for (url, key) in [
            ("fake-canary", "fake-key"),
            ("https://user:fake-canary@p.example", "fake-key"),
            ("https://p.example", "fake-canary with spaces"),
        ] {
            let failure = from(&[
                (CHOICE, "supabase"),
                ("SUPABASE_URL", url),
                ("SUPABASE_SERVICE_ROLE_KEY", key),
            ])
            .unwrap_err();
            assert_eq!(failure.code, "STORAGE_CONFIG_INVALID");
            assert!(!format!("{failure} {failure:?}").contains("canary"), "{failure}");
        }
        let wrong_choice = from(&[(CHOICE, "fake-canary")]).unwrap_err();
        assert!(!format!("{wrong_choice:?}").contains("canary"));
    }
}
