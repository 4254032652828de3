//! Whether a node has the packages that a pool's tasks have named, for a pool that uses no node without them. Pure.

use std::collections::BTreeMap;

/// Distributions: normalized name → version.
pub type Packages = BTreeMap<String, String>;

/// Return why a node that told of the distributions `there` is of no use to a pool whose tasks need those in `here`, in the
/// same versions; `None` if it is of use.
#[must_use]
pub fn unfit(here: &Packages, there: &Packages) -> Option<String> {
    if here.is_empty() {
        return None;
    }
    if there.is_empty() {
        return Some("it does not tell which packages it has".to_owned());
    }
    let (mut differences, mut remedy) = (Vec::new(), Vec::new());
    for (name, version) in here {
        match there.get(name) {
            Some(other) if is_same(other, version) => continue,
            Some(other) => differences.push(format!("{name} is {other} there and {version} here")),
            None => differences.push(format!("{name} is not installed there")),
        }
        remedy.push(format!("\"{name}=={version}\""));
    }
    let list = || format!("{}. It needs Image(pip=[{}])", differences.join(", "), remedy.join(", "));
    (!differences.is_empty()).then(list)
}

/// Return whether two versions are the same: local labels do not count, nor zeros at the end of a release. A version that
/// is spelled in another way than the normal one is another.
fn is_same(one: &str, other: &str) -> bool {
    one == other || release(one) == release(other)
}

/// Return a version's numbers without the zeros at their end, and what stands behind them, without its local label.
fn release(version: &str) -> (Vec<&str>, &str) {
    let public = version.split('+').next().unwrap_or_default();
    let end = public.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(public.len());
    let (numbers, rest) = public.split_at_checked(end).unwrap_or((public, ""));
    let mut numbers: Vec<&str> = numbers.split('.').filter(|number| !number.is_empty()).collect();
    while numbers.last().is_some_and(|number| number.bytes().all(|byte| byte == b'0')) {
        numbers.pop();
    }
    (numbers, rest)
}
