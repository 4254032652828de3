//! Which nodes a pool refuses that is strict about packages.
#![allow(clippy::unwrap_used, clippy::indexing_slicing)]

use std::collections::BTreeMap;

use skyward_lite::client::packages::unfit;
use skyward_lite::wire::{AgentHello, read_hello};

fn packages(of: &[(&str, &str)]) -> BTreeMap<String, String> {
    of.iter().map(|(name, version)| ((*name).to_owned(), (*version).to_owned())).collect()
}

/// Versions are equal but for local labels and zeros at the end of the release.
#[test]
fn equal_versions_are_no_difference() {
    for (here, there) in
        [("1.2", "1.2"), ("1.2", "1.2.0"), ("1", "1.0.0"), ("2.3.0", "2.3.0+cpu"), ("1.0rc1", "1.0.0rc1"), ("0", "0.0")]
    {
        assert_eq!(unfit(&packages(&[("a", here)]), &packages(&[("a", there)])), None, "{here} {there}");
    }
    for (here, there) in [("1.2", "1.20"), ("1.2", "1.2.1"), ("1.2", "1.2rc1"), ("1.2", ""), ("10", "1")] {
        let why = unfit(&packages(&[("a", here)]), &packages(&[("a", there)])).unwrap();
        assert_eq!(why, format!("a is {there} there and {here} here. It needs Image(pip=[\"a=={here}\"])"));
    }
}

/// What a node lacks is named with the line that mends it. What only the node has does not count.
#[test]
fn a_missing_package_is_a_difference() {
    let there = packages(&[("c", "1"), ("b", "2")]);
    assert_eq!(unfit(&packages(&[]), &there), None);
    let why = unfit(&packages(&[("a", "1"), ("b", "1"), ("c", "1")]), &there).unwrap();
    assert_eq!(why, "a is not installed there, b is 2 there and 1 here. It needs Image(pip=[\"a==1\", \"b==1\"])");
    let why = unfit(&packages(&[("a", "1")]), &packages(&[])).unwrap();
    assert!(why.contains("does not tell"), "{why}");
}

/// Of what a node tells, names that cannot be distributions' are dropped, and versions are bounded and harmless.
#[test]
fn absurd_packages_are_made_harmless() {
    let long = "x".repeat(50_000);
    let body = serde_json::json!({
        "version": "0", "python": "3.11", "epoch": "1", "cores": 1, "pid": 1,
        "packages": {"good-1": "1.0", "": "1", "\u{1b}[31m": "1", "UPPER": "1", &long: "1", "odd": "\u{1b}[2J\n1", "long": long},
    });
    let hello: AgentHello = read_hello(body.to_string().as_bytes()).unwrap();
    assert_eq!(hello.packages.keys().collect::<Vec<_>>(), ["good-1", "long", "odd"]);
    assert_eq!(hello.packages["odd"], "\\x1b[2J\\n1");
    assert!(hello.packages["long"].len() <= 256);
    for packages in [serde_json::json!(["a"]), serde_json::json!({"a": 1}), serde_json::json!(null)] {
        let mut body = body.clone();
        body["packages"] = packages;
        assert!(read_hello::<AgentHello>(body.to_string().as_bytes()).is_err());
    }
}
