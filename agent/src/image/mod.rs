//! An image before it is shipped: section 4 of the benchmark, judged on the image itself or on its Dockerfile. Nothing of it
//! is ever run.
//!
//! `archive` reads what `docker save` writes, `dockerfile` reads instructions; here both become what the checks judge by: a
//! container of this image that was made and not started.

pub mod archive;
pub mod dockerfile;

use std::sync::Arc;

use serde_json::json;
use sidewarden_proto::finding::Finding;
use sidewarden_proto::time::Timestamp;

use crate::cis::{self, Case, Declared, History};
use crate::facts::engine::{Engine, Host, Image, Info, Inspect, Told};
use crate::facts::{Facts, Hidden, Seen};

/// The findings of section 4 about an image, called `name`.
pub fn judge(image: Image, name: &str, declared: &Declared, now: Timestamp) -> Result<Vec<Finding>, String> {
    let facts = facts(image, name)?;
    let history = History::default();
    Ok(cis::judge_image(&Case { facts: &facts, declared, history: &history, now }))
}

fn facts(image: Image, name: &str) -> Result<Facts, String> {
    let inspect = Arc::new(made(&image, name)?);
    let source = || "the image".to_owned();
    let none = |what: &str| Hidden::unclear(what, "an image alone is judged");
    let info = json!({"MemTotal": 0, "NCPU": 0, "SecurityOptions": [], "Swarm": {"LocalNodeState": "unknown"}});
    let host = Host {
        info: serde_json::from_value::<Info>(info).map_err(|error| error.to_string())?,
        networks: Seen::Hidden(none("networks")),
        secrets: Seen::Hidden(none("secrets")),
        listeners: Seen::Hidden(none("listeners")),
        pid_max: Seen::Hidden(none("pid_max")),
        selinux_enforcing: Seen::Hidden(none("SELinux")),
    };
    let told = Told {
        network: Seen::Known(inspect.clone(), source()),
        pid: Seen::Known(inspect.clone(), source()),
        ipc: Seen::Known(inspect.clone(), source()),
        image: Seen::Known(Arc::new(image), source()),
        inspect,
    };
    let engine = Engine { host: Arc::new(host), container: Some(told) };
    Ok(Facts { engine: Seen::Known(engine, source()), ..crate::facts::host::unseen("a running container") })
}

/// A container of it, as `docker create` makes one.
fn made(image: &Image, name: &str) -> Result<Inspect, String> {
    let config = &image.inspect.config;
    let mut labels = serde_json::Map::new();
    labels.extend(config.labels.iter().map(|(name, value)| (name.clone(), json!(value))));
    let made = json!({
        "Id": "", "Name": "", "Image": image.inspect.id,
        "State": {"Status": "created", "Pid": 0, "StartedAt": ""},
        "AppArmorProfile": "", "ProcessLabel": "", "Mounts": [],
        "HostConfig": {
            "NetworkMode": "default", "PidMode": "", "IpcMode": "", "UTSMode": "", "UsernsMode": "", "Privileged": false,
            "ReadonlyRootfs": false, "PublishAllPorts": false, "PortBindings": {},
            "RestartPolicy": {"Name": "", "MaximumRetryCount": 0}, "CapAdd": [], "CapDrop": [], "SecurityOpt": [],
            "Memory": 0, "CpuShares": 0, "NanoCpus": 0, "CpuQuota": 0, "CpuPeriod": 0, "PidsLimit": null, "Ulimits": [],
            "Devices": [], "DeviceCgroupRules": [], "CgroupParent": "",
        },
        "Config": {"User": config.user, "Env": [], "Image": name, "Labels": labels},
        "NetworkSettings": {"Networks": {}},
    });
    serde_json::from_value(made).map_err(|error| error.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::facts::engine::{ImageFiles, ImageInspect, Layer};

    const NOW: Timestamp = crate::cis::sample::NOW;

    fn image(user: &str, files: Seen<ImageFiles>) -> Image {
        let config = json!({"User": user, "Env": ["PATH=/bin", "DB_PASSWORD=hunter2"]});
        let inspect = ImageInspect {
            id: "sha256:aa".into(),
            repo_digests: vec![],
            repo_tags: vec!["x:1".into()],
            created: String::new(),
            config: serde_json::from_value(config).unwrap(),
        };
        Image { inspect, history: vec![Layer { created_by: "COPY x / # buildkit".into(), size: 1 }], files }
    }

    fn verdicts(image: Image) -> Vec<(String, &'static str)> {
        let findings = judge(image, "x:1", &Declared::default(), NOW).unwrap();
        findings.into_iter().map(|f| (f.ids.v1_3_1, f.verdict.word())).collect()
    }

    #[test]
    fn section_four_is_judged_and_nothing_else() {
        let hidden = Seen::Hidden(Hidden::unclear("files", "not looked at"));
        let verdicts = verdicts(image("", hidden));
        let ids: Vec<&str> = verdicts.iter().map(|(id, _)| id.as_str()).collect();
        assert_eq!(ids, ["4.1", "4.2", "4.3", "4.4", "4.5", "4.6", "4.7", "4.8", "4.9", "4.10", "4.11", "4.12"]);
        let of = |id: &str| verdicts.iter().find(|(other, _)| other == id).unwrap().1;
        assert_eq!([of("4.1"), of("4.6"), of("4.10")], ["fail"; 3]);
        assert_eq!([of("4.3"), of("4.8")], ["unknown"; 2]);
    }

    #[test]
    fn the_name_of_a_user_is_looked_up_in_the_image() {
        let files = |roots: &[&str]| {
            let roots = roots.iter().map(|name| (*name).to_owned()).collect();
            Seen::Known(ImageFiles { roots, setuid: Some(vec![]), ..ImageFiles::default() }, "layers".into())
        };
        for (user, roots, expected) in [
            ("app", &["root"][..], "pass"),
            ("toor", &["root", "toor"], "fail"),
            ("10001", &[], "pass"),
            ("0:5", &["root"], "fail"),
            ("app", &[], "unknown"),
        ] {
            assert_eq!(verdicts(image(user, files(roots)))[0].1, expected, "{user} {roots:?}");
        }
    }
}
