//! What `/metrics` says, in the text format that Prometheus reads.

use std::net::SocketAddr;

use anyhow::Result;

use crate::http;

/// All samples of one scrape.
#[derive(Clone, Debug)]
pub struct Metrics {
    text: String,
}

/// Scrapes.
pub fn scrape(addr: SocketAddr) -> Result<Metrics> {
    Ok(Metrics { text: http::get(addr, "/metrics")? })
}

impl Metrics {
    /// The sum of all samples of `name` that have these labels; 0 when there is none.
    pub fn sum(&self, name: &str, labels: &[(&str, &str)]) -> f64 {
        // Not `sum`: that of nothing is -0.
        self.text.lines().filter_map(|line| sample(line, name, labels)).fold(0.0, |sum, value| sum + value)
    }
}

fn sample(line: &str, name: &str, labels: &[(&str, &str)]) -> Option<f64> {
    let rest = line.strip_prefix(name)?;
    let (have, value) = match rest.strip_prefix('{') {
        Some(rest) => rest.rsplit_once("} ")?,
        None => ("", rest.strip_prefix(' ')?),
    };
    let has = |(key, value): &(&str, &str)| format!(",{have},").contains(&format!(",{key}=\"{value}\","));
    if labels.iter().all(has) { value.trim().parse().ok() } else { None }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn samples_are_found_by_name_and_labels() {
        let text = "# HELP a_total A.\na_total{x=\"1\",y=\"2\"} 3\na_total{x=\"1\"} 4\na_total_b{x=\"1\"} 9\nplain 7\n";
        let metrics = Metrics { text: text.into() };
        for (name, labels, expected) in [
            ("a_total", &[][..], 7.0),
            ("a_total", &[("x", "1")], 7.0),
            ("a_total", &[("y", "2")], 3.0),
            ("a_total", &[("x", "2")], 0.0),
            ("plain", &[], 7.0),
            ("absent", &[], 0.0),
        ] {
            assert_eq!(metrics.sum(name, labels).to_string(), f64::to_string(&expected), "{name} {labels:?}");
        }
    }
}
