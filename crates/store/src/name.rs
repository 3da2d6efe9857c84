use std::borrow::Borrow;
use std::fmt;
use std::str::FromStr;

use crate::{Error, Result};

const NAME_BYTES_MAX: usize = 1024;
/// What file systems allow for one path component.
const PART_BYTES_MAX: usize = 255;

/// The name of an object: relative, `/`-separated, at most 1,024 bytes, parts of `[A-Za-z0-9._=@:+-]`, at most 255
/// bytes each.
///
/// A part is not empty and does not begin with a dot. That rules out `.` and `..`, and leaves dotted names to the
/// implementations for what is not an object (temporary files, probes).
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ObjectName(String);

impl ObjectName {
    /// Parses a name. Nothing is normalized: a name is right or refused.
    pub fn parse(name: &str) -> Result<ObjectName> {
        match refusal(name) {
            None => Ok(ObjectName(name.to_string())),
            // A hostile name may be megabytes long: the message shows its beginning.
            Some(reason) => Err(Error::Name { name: name.chars().take(100).collect(), reason }),
        }
    }

    /// This name with `/` and `rest` after it.
    pub fn join(&self, rest: &str) -> Result<ObjectName> {
        ObjectName::parse(&format!("{}/{rest}", self.0))
    }

    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The part after the last `/`.
    pub fn file_name(&self) -> &str {
        self.0.rsplit('/').next().unwrap_or(&self.0)
    }
}

fn refusal(name: &str) -> Option<&'static str> {
    if name.is_empty() {
        return Some("it is empty");
    }
    if name.len() > NAME_BYTES_MAX {
        return Some("it is longer than 1024 bytes");
    }
    name.split('/').find_map(part_refusal)
}

fn part_refusal(part: &str) -> Option<&'static str> {
    let allowed = |b: u8| b.is_ascii_alphanumeric() || b"._=@:+-".contains(&b);
    if part.is_empty() {
        Some("a part between slashes is empty")
    } else if part.starts_with('.') {
        Some("a part begins with a dot")
    } else if part.len() > PART_BYTES_MAX {
        Some("a part is longer than 255 bytes")
    } else if !part.bytes().all(allowed) {
        Some("only letters, digits and ._=@:+- are allowed between slashes")
    } else {
        None
    }
}

impl fmt::Display for ObjectName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Lets an ordered map of names be searched by a beginning that is itself no name.
impl Borrow<str> for ObjectName {
    fn borrow(&self) -> &str {
        &self.0
    }
}

impl FromStr for ObjectName {
    type Err = Error;

    fn from_str(name: &str) -> Result<ObjectName> {
        ObjectName::parse(name)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn good_names_are_kept_as_they_are() {
        for name in ["a", "runs/a/step-000100", "datasets/x=1/a.b", "user@host:8080/a+b_c", &"x".repeat(255)]
        {
            assert_eq!(ObjectName::parse(name).unwrap().as_str(), name);
        }
    }

    #[test]
    fn hostile_names_are_refused() {
        let long_part = "x".repeat(256);
        let long = "ab/".repeat(400) + "c";
        for name in [
            "",
            "/",
            "/etc/passwd",
            "a/",
            "a//b",
            ".",
            "..",
            "../x",
            "a/../b",
            "a/./b",
            ".tmp/x",
            "a/.hidden",
            "a b",
            "a\0b",
            "a\nb",
            "a\\b",
            "ä",
            "C:\\x",
            "a?b",
            "a%2e%2e",
            "a*",
            "~",
            &long_part,
            &long,
        ] {
            assert!(ObjectName::parse(name).is_err(), "{name:?} was taken");
        }
        let error = ObjectName::parse(&"é".repeat(1_000_000)).unwrap_err().to_string();
        assert!(error.len() < 1000, "the message carries the whole name");
    }
}
