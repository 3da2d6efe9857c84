use store::{Error, S3Options, open, open_with};

#[test]
fn addresses_lead_to_stores() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("x").display().to_string();
    assert_eq!(open("mem:").unwrap().url(), "mem:");
    for url in [path.clone(), format!("file:{path}"), format!("file://{path}")] {
        assert_eq!(open(&url).unwrap().url(), format!("file:{path}"));
    }
}

#[test]
fn addresses_that_mean_nothing_are_refused() {
    let options = S3Options {
        endpoint: "http://127.0.0.1:1".to_string(),
        access_key: "a".to_string(),
        secret_key: "do-not-show".to_string(),
        ..S3Options::default()
    };
    assert!(!format!("{options:?}").contains("do-not-show"), "Debug shows the secret key");
    for (url, why) in [
        ("", "the path is empty"),
        ("file:", "the path is empty"),
        ("gs://bucket/x", "only mem:"),
        ("http://host/x", "only mem:"),
        ("s3://", "a bucket has 3 to 63"),
        ("s3://UPPER/x", "a bucket has 3 to 63"),
        ("s3://../x", "a bucket has 3 to 63"),
        ("s3://bucket/../x", "a part begins with a dot"),
        ("s3://bucket/a//b", "a part between slashes is empty"),
        ("s3://bucket/x", "plain http, which has to be allowed"),
    ] {
        let error = open_with(url, &options).unwrap_err();
        assert!(
            matches!(error, Error::Address { .. }) && error.to_string().contains(why),
            "{url:?}: {error}"
        );
    }
    let error = open("s3://bucket/x").unwrap_err().to_string();
    assert!(error.contains("needs an access key and a secret key"), "{error}");
    let endpoint = "ftp://host".to_string();
    let error = open_with("s3://bucket/x", &S3Options { endpoint, ..options }).unwrap_err().to_string();
    assert!(error.contains("does not begin with http:// or https://"), "{error}");
}
