//! From when until when a certificate is valid: read from its DER (RFC 5280, section 4.1), to refuse at the start what every
//! client would refuse later.

/// Seconds since 1970.
#[derive(Debug, PartialEq)]
pub(super) struct Validity {
    from: i64,
    until: i64,
}

const SEQUENCE: u8 = 0x30;
const VERSION: u8 = 0xa0;
const UTC_TIME: u8 = 0x17;
const GENERALIZED_TIME: u8 = 0x18;

impl Validity {
    /// `None` for what is not laid out as a certificate is: whoever uses it will say so.
    pub(super) fn of(der: &[u8]) -> Option<Validity> {
        let (certificate, _) = inside(der, SEQUENCE)?;
        let (mut fields, _) = inside(certificate, SEQUENCE)?;
        if fields.first() == Some(&VERSION) {
            fields = next(fields)?.2;
        }
        // Serial number, algorithm, issuer.
        for _ in 0..3 {
            fields = next(fields)?.2;
        }
        let (times, _) = inside(fields, SEQUENCE)?;
        let (tag, from, rest) = next(times)?;
        let (until_tag, until, _) = next(rest)?;
        Some(Validity { from: seconds(tag, from)?, until: seconds(until_tag, until)? })
    }

    /// What is wrong with it at this time.
    pub(super) fn wrong_at(&self, now_unix_s: u64) -> Option<String> {
        let now = now_unix_s as i64;
        let days = |seconds: i64| seconds.div_euclid(86_400);
        match () {
            () if now > self.until => Some(format!("expired {} days ago", days(now - self.until))),
            () if now < self.from => Some(format!("is valid only {} days from now", days(self.from - now))),
            () => None,
        }
    }
}

/// Tag, content and what follows of the first value.
fn next(der: &[u8]) -> Option<(u8, &[u8], &[u8])> {
    let (tag, rest) = der.split_first()?;
    let (len, rest) = rest.split_first()?;
    let (len, rest) = match *len {
        short @ ..0x80 => (usize::from(short), rest),
        // So many bytes of a length follow.
        long => {
            let n = usize::from(long & 0x7f);
            if n == 0 || n > 4 || rest.len() < n {
                return None;
            }
            let (len, rest) = rest.split_at(n);
            (len.iter().fold(0, |len, byte| len << 8 | usize::from(*byte)), rest)
        }
    };
    let (content, rest) = rest.split_at_checked(len)?;
    Some((*tag, content, rest))
}

fn inside(der: &[u8], expected: u8) -> Option<(&[u8], &[u8])> {
    let (tag, content, rest) = next(der)?;
    (tag == expected).then_some((content, rest))
}

/// `YYMMDDhhmmssZ` or `YYYYMMDDhhmmssZ`.
fn seconds(tag: u8, text: &[u8]) -> Option<i64> {
    let digits = text.strip_suffix(b"Z")?;
    if !digits.iter().all(u8::is_ascii_digit) {
        return None;
    }
    let number = |range: std::ops::Range<usize>| {
        let digits = digits.get(range)?;
        Some(digits.iter().fold(0i64, |n, digit| 10 * n + i64::from(digit - b'0')))
    };
    let (year, at) = match tag {
        UTC_TIME => {
            let year = number(0..2)?;
            (if year < 50 { 2000 + year } else { 1900 + year }, 2)
        }
        GENERALIZED_TIME => (number(0..4)?, 4),
        _ => return None,
    };
    let [month, day, hour, minute, second] =
        [0, 1, 2, 3, 4].map(|i| number(at + 2 * i..at + 2 * i + 2).unwrap_or(-1));
    if !(1..=12).contains(&month) || !(1..=31).contains(&day) || hour < 0 || minute < 0 || second < 0 {
        return None;
    }
    Some(days(year, month, day) * 86_400 + hour * 3600 + minute * 60 + second)
}

/// Days from 1970-01-01. Years begin in March here, so that leap days come last.
fn days(year: i64, month: i64, day: i64) -> i64 {
    let (year, month) = if month > 2 { (year, month - 3) } else { (year - 1, month + 9) };
    let of_years = 365 * year + year.div_euclid(4) - year.div_euclid(100) + year.div_euclid(400);
    let of_months = (153 * month + 2) / 5;
    // 1970-01-01 is day 719,468 from March of the year 0.
    of_years + of_months + day - 1 - 719_468
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_read() {
        for (tag, text, expected) in [
            (UTC_TIME, "700101000000Z", Some(0)),
            (UTC_TIME, "000229120000Z", Some(951_825_600)),
            (UTC_TIME, "491231235959Z", Some(2_524_607_999)),
            (GENERALIZED_TIME, "20501231000000Z", Some(2_556_057_600)),
            (GENERALIZED_TIME, "99991231235959Z", Some(253_402_300_799)),
            (UTC_TIME, "7001010000Z", None),
            (UTC_TIME, "701301000000Z", None),
            (UTC_TIME, "7001010000zzZ", None),
            (UTC_TIME, "", None),
            (4, "700101000000Z", None),
        ] {
            assert_eq!(seconds(tag, text.as_bytes()), expected, "{text}");
        }
    }

    #[test]
    fn noise_is_no_certificate() {
        for noise in [&[][..], &[0x30], &[0x30, 0x80], &[0x30, 0x84, 255, 255, 255, 255], &[0x30, 2, 0x30, 9]]
        {
            assert_eq!(Validity::of(noise), None, "{noise:?}");
        }
    }

    #[test]
    fn dates_are_compared() {
        let validity = Validity { from: 100 * 86_400, until: 200 * 86_400 };
        assert_eq!(validity.wrong_at(150 * 86_400), None);
        assert_eq!(validity.wrong_at(203 * 86_400).as_deref(), Some("expired 3 days ago"));
        assert_eq!(validity.wrong_at(99 * 86_400).as_deref(), Some("is valid only 1 days from now"));
    }
}
