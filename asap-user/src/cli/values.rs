//! How option values are read.

use std::time::Duration;

/// A length of time: "30s", "500ms", "2min", or a number of seconds.
pub fn duration(text: &str) -> Result<Duration, String> {
    if let Ok(seconds) = text.parse::<u32>() {
        return Ok(Duration::from_secs(seconds.into()));
    }
    let length = humantime::parse_duration(text).map_err(|error| format!("{error} (try 30s, 500ms, 2min)"))?;
    if length > Duration::from_secs(u32::MAX.into()) {
        return Err("that is more than a lifetime".to_owned());
    }
    Ok(length)
}

/// An address as `asap` prints it: hexadecimal with 0x, or decimal.
pub fn address(text: &str) -> Result<u64, String> {
    let number = match text.strip_prefix("0x").or_else(|| text.strip_prefix("0X")) {
        Some(digits) => u64::from_str_radix(digits, 16),
        None => text.parse(),
    };
    number.map_err(|error| format!("{error} (hexadecimal with 0x, or decimal)"))
}

/// Milliseconds, as requests carry them.
pub fn milliseconds(length: Duration) -> u64 {
    u64::try_from(length.as_millis()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lengths_of_time_are_read_with_and_without_unit() {
        let read = ["30s", "1m 5s", "250ms", "7", "0"].map(|text| duration(text).expect(text).as_millis());
        assert_eq!(read, [30_000, 65_000, 250, 7_000, 0]);
        for wrong in ["", "s", "-1", "5 parsecs", "99999999999999 years", "5000years"] {
            duration(wrong).expect_err(wrong);
        }
    }

    #[test]
    fn addresses_are_hexadecimal_or_decimal() {
        assert_eq!(address("0x1f4a0"), Ok(0x1f4a0));
        assert_eq!(address("4096"), Ok(4096));
        for wrong in ["1f4a0", "0x", "-1", "0x1ffffffffffffffff"] {
            address(wrong).expect_err(wrong);
        }
    }
}
