//! Kubernetes as this program meets it: the file that says how jobs run there, and being in a pod oneself.

mod agent;
mod group;

use std::path::Path;

use anyhow::{Context, Result, ensure};
use control::KubernetesOptions;

pub(crate) use group::{Group, Machines, shell};

/// Where Kubernetes puts what a pod's service account has.
const ACCOUNT: &str = "/var/run/secrets/kubernetes.io/serviceaccount";

/// The options of a file; what it leaves out is that of the pod that we are in.
pub(crate) fn options(path: &Path) -> Result<KubernetesOptions> {
    let text = std::fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
    let mut options: KubernetesOptions =
        toml::from_str(&text).with_context(|| format!("cannot read {}", path.display()))?;
    let own = |name: &str| Path::new(ACCOUNT).join(name);
    if options.server.is_empty() {
        let variable = |name| std::env::var(name).ok().filter(|value: &String| !value.is_empty());
        let host = variable("KUBERNETES_SERVICE_HOST");
        let host = host.with_context(|| format!("{} names no server, and this is no pod", path.display()))?;
        // An address of version 6 stands in brackets.
        let host = if host.contains(':') { format!("[{host}]") } else { host };
        let port = variable("KUBERNETES_SERVICE_PORT").unwrap_or_else(|| "443".to_owned());
        options.server = format!("https://{host}:{port}");
        options.token_file.get_or_insert_with(|| own("token"));
        options.ca_file.get_or_insert_with(|| own("ca.crt"));
    }
    if options.namespace.is_empty() {
        let found = std::fs::read_to_string(own("namespace"));
        options.namespace = found
            .with_context(|| format!("{} names no namespace, and this is no pod", path.display()))?
            .trim()
            .to_owned();
    }
    Ok(options)
}

/// What others reach this pod by, if it is one that we started.
pub(crate) fn address() -> Option<String> {
    let found = std::env::var("LOQUAT_ADDRESS").ok().filter(|address| !address.is_empty())?;
    Some(if found.contains(':') { format!("[{found}]") } else { found })
}

/// Refuses to be one of several pods that nothing connects: each would train the same run.
pub(crate) fn check_connected(n_ranks: usize) -> Result<()> {
    let n_pods = std::env::var("LOQUAT_PODS").ok().and_then(|text| text.parse().ok()).unwrap_or(1);
    ensure!(
        n_pods <= 1 || n_ranks > 1,
        "this is one of {n_pods} pods of a job, and it does not say which: that needs LOQUAT_POD_GROUP, \
         JOB_COMPLETION_INDEX and LOQUAT_ADDRESS (docs/decisions/0028)"
    );
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_are_checked() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("kubernetes.toml");
        let read = |text: &str| {
            std::fs::write(&path, text).unwrap();
            options(&path)
        };
        let good = "image = \"i\"\nnamespace = \"n\"\nserver = \"https://h:6443\"\npod = {nodeSelector = {pool = \"gpu\"}}\n";
        let found = read(good).unwrap();
        assert_eq!((found.program.as_str(), found.accelerator.as_str()), ("loquat", "nvidia.com/gpu"));
        assert_eq!(found.pod["nodeSelector"]["pool"], "gpu");
        for (bad, words) in [
            (good.replace("image = \"i\"\n", ""), "image"),
            (format!("color = 1\n{good}"), "color"),
            (good.replace("namespace = \"n\"\n", ""), "names no namespace"),
            (good.replace("server = \"https://h:6443\"\n", ""), "names no server"),
        ] {
            let error = format!("{:#}", read(&bad).unwrap_err());
            assert!(error.contains(words) && error.contains("kubernetes.toml"), "{error}");
        }
    }
}
