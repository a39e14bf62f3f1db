//! The platform's address templates, filled in.
//!
//! A template's own query is kept byte for byte: `+` stays `+` and `%2B` stays `%2B`. `$ID` is the *worker* in the take address
//! and the *job* in the result and stream addresses.

use super::environment::Environment;

const TAKE: &str = "/job-take/";

/// Every address a worker calls.
#[derive(Clone, Debug)]
pub struct Routes {
    take: String,
    batch: Option<String>,
    stop: Option<String>,
    done: String,
    stream: Option<String>,
    ping: Option<String>,
    protocol_version: String,
}

impl Routes {
    /// Fills the worker's id into the templates. `protocol_version` is what heartbeats report.
    pub fn new(environment: &Environment, protocol_version: &str) -> Self {
        let fill = |template: &str| {
            let filled = template.replace("$RUNPOD_POD_ID", &environment.worker_id);
            match &environment.gpu_type_id {
                Some(gpu) => filled.replace("$RUNPOD_GPU_TYPE_ID", &path_segment(gpu)),
                None => filled,
            }
        };
        let take = fill(&environment.take).replace("$ID", &environment.worker_id);
        let derived = |name: &str| take.contains(TAKE).then(|| take.replace(TAKE, name));
        Self {
            batch: derived("/job-take-batch/"),
            stop: derived("/job-stop/"),
            take,
            done: fill(&environment.done),
            stream: environment.stream.as_deref().map(fill),
            ping: environment.ping.as_deref().map(fill),
            protocol_version: protocol_version.to_owned(),
        }
    }

    /// Whether the take address has the form that batch take and the stop channel are derived from.
    pub fn are_derivable(&self) -> bool {
        self.stop.is_some()
    }

    /// Where to ask for up to `count` jobs.
    pub fn take(&self, count: usize, is_busy: bool) -> String {
        let busy = format!("job_in_progress={}", u8::from(is_busy));
        match &self.batch {
            Some(batch) if count > 1 => with_parameter(&with_parameter(batch, &format!("batch_size={count}")), &busy),
            _ => with_parameter(&self.take, &busy),
        }
    }

    /// Where to ask which jobs are to be stopped.
    pub fn stop(&self) -> Option<&str> {
        self.stop.as_deref()
    }

    /// Where a job's result or progress goes.
    pub fn done(&self, job: &str, is_stream: bool) -> String {
        let url = self.done.replace("$ID", &path_segment(job));
        with_parameter(&url, &format!("isStream={is_stream}"))
    }

    /// Where a chunk of a job's stream goes.
    pub fn stream(&self, job: &str) -> Option<String> {
        let url = self.stream.as_ref()?.replace("$ID", &path_segment(job));
        Some(with_parameter(&url, "isStream=false"))
    }

    /// Where a heartbeat for these jobs goes.
    pub fn ping(&self, jobs: &[String]) -> Option<String> {
        let mut url = self.ping.clone()?;
        if !jobs.is_empty() {
            url = with_parameter(&url, &format!("job_id={}", path_segment(&jobs.join(","))));
        }
        Some(with_parameter(&url, &self.version()))
    }

    /// Where a worker that failed a check says so.
    pub fn unhealthy(&self, check: &str, reason: &str) -> Option<String> {
        let url = with_parameter(self.ping.as_ref()?, "status=unhealthy");
        let url = with_parameter(&url, &format!("check={}", path_segment(check)));
        let url = with_parameter(&url, &format!("reason={}", path_segment(reason)));
        Some(with_parameter(&url, &self.version()))
    }

    /// Host and port of the control plane, for the network check.
    pub fn control_plane(&self) -> Option<(String, u16)> {
        let url = url::Url::parse(&self.take).ok()?;
        Some((url.host_str()?.to_owned(), url.port_or_known_default()?))
    }

    fn version(&self) -> String {
        format!("runpod_version={}", path_segment(&self.protocol_version))
    }
}

/// `url` with one more query parameter; starts the query where there is none.
fn with_parameter(url: &str, parameter: &str) -> String {
    let separator = if !url.contains('?') {
        "?"
    } else if url.ends_with(['?', '&']) {
        ""
    } else {
        "&"
    };
    format!("{url}{separator}{parameter}")
}

/// `text` as one path segment or query value: everything but unreserved characters is percent-encoded.
pub(crate) fn path_segment(text: &str) -> String {
    let mut encoded = String::with_capacity(text.len());
    for byte in text.bytes() {
        if byte.is_ascii_alphanumeric() || b"-._~".contains(&byte) {
            encoded.push(char::from(byte));
        } else {
            encoded.push_str(&format!("%{byte:02X}"));
        }
    }
    encoded
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use std::collections::BTreeMap;

    fn routes(take: &str) -> Routes {
        let variables = BTreeMap::from([
            ("RUNPOD_WEBHOOK_GET_JOB".to_owned(), take.to_owned()),
            (
                "RUNPOD_WEBHOOK_POST_OUTPUT".to_owned(),
                "http://h/v2/ep/job-done/$RUNPOD_POD_ID/$ID?gpu=NVIDIA+L40S".to_owned(),
            ),
            (
                "RUNPOD_WEBHOOK_PING".to_owned(),
                "http://h/ping/$RUNPOD_POD_ID".to_owned(),
            ),
            ("RUNPOD_POD_ID".to_owned(), "pod1".to_owned()),
        ]);
        Routes::new(&Environment::read(&variables).unwrap(), "1.12.0")
    }

    #[test]
    fn t19_a_take_address_without_query_or_without_job_take() {
        let plain = routes("http://h/job-take/$ID");
        assert_eq!(plain.take(1, false), "http://h/job-take/pod1?job_in_progress=0");
        assert_eq!(
            plain.take(3, true),
            "http://h/job-take-batch/pod1?batch_size=3&job_in_progress=1"
        );
        let odd = routes("http://h/jobs/$ID?x=1");
        assert_eq!(
            odd.take(3, false),
            "http://h/jobs/pod1?x=1&job_in_progress=0",
            "batch is off"
        );
        assert!(odd.stop().is_none() && !odd.are_derivable());
    }

    #[test]
    fn t20_a_template_query_keeps_its_bytes() {
        let routes = routes("http://h/job-take/$ID?gpu=A+B%2BC&t=%20");
        assert_eq!(
            routes.take(1, false),
            "http://h/job-take/pod1?gpu=A+B%2BC&t=%20&job_in_progress=0"
        );
        assert_eq!(routes.stop().unwrap(), "http://h/job-stop/pod1?gpu=A+B%2BC&t=%20");
        let through_the_client = url::Url::parse(&routes.take(1, false)).unwrap();
        assert_eq!(
            through_the_client.as_str(),
            routes.take(1, false),
            "the HTTP client does not re-encode it"
        );
    }

    #[test]
    fn a_job_id_is_one_path_segment() {
        assert_eq!(
            routes("http://h/job-take/$ID").done("a/b?c", false),
            "http://h/v2/ep/job-done/pod1/a%2Fb%3Fc?gpu=NVIDIA+L40S&isStream=false"
        );
    }

    #[test]
    fn the_unhealthy_report_has_its_four_parameters_in_order() {
        assert_eq!(
            routes("http://h/job-take/$ID").unhealthy("disk", "Full: 1 %").unwrap(),
            "http://h/ping/pod1?status=unhealthy&check=disk&reason=Full%3A%201%20%25&runpod_version=1.12.0"
        );
    }
}
