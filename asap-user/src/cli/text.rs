//! How things look in a terminal: tables, times, and names that come from elsewhere. Knows no commands.

use comfy_table::{Table, presets};
use std::time::{Duration, SystemTime};

/// A table of aligned columns without lines, the header in capitals; each line is indented by `indent`.
pub fn table(indent: &str, header: &[&str], rows: impl IntoIterator<Item = Vec<String>>) -> String {
    let mut table = Table::new();
    table.load_style(presets::NOTHING);
    table.set_header(header.iter().copied());
    table.add_rows(rows.into_iter().map(|row| row.iter().map(|cell| printable(cell)).collect::<Vec<_>>()));
    for column in table.column_iter_mut() {
        column.set_padding((0, 2));
    }
    let mut text = String::new();
    for line in table.lines() {
        text.push_str(format!("{indent}{line}").trim_end());
        text.push('\n');
    }
    text
}

/// `text` with everything escaped that could steer a terminal or hide what it says: names of functions, files and threads are
/// chosen by others.
pub fn printable(text: &str) -> String {
    let steers = |c: char| {
        c.is_control()
            || matches!(c, '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}' | '\u{feff}')
    };
    text.chars().fold(String::with_capacity(text.len()), |mut shown, c| {
        if steers(c) {
            shown.extend(c.escape_default())
        } else {
            shown.push(c)
        }
        shown
    })
}

/// A length of time with its unit.
pub fn microseconds(us: u64) -> String {
    match us {
        0..1000 => format!("{us} µs"),
        1000..1_000_000 => format!("{:.1} ms", us as f64 / 1e3),
        _ => format!("{:.2} s", us as f64 / 1e6),
    }
}

/// A point in time, UTC.
pub fn point_in_time(seconds: u64) -> String {
    let time = SystemTime::UNIX_EPOCH.checked_add(Duration::from_secs(seconds)).filter(|_| seconds < 1 << 37);
    time.map_or_else(|| seconds.to_string(), |time| humantime::format_rfc3339_seconds(time).to_string())
}

/// "1 process", "2 processes".
pub fn count(number: usize, one: &str, many: &str) -> String {
    format!("{number} {}", if number == 1 { one } else { many })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_table_is_aligned_and_has_no_blanks_at_line_ends() {
        let rows = [vec!["1234".to_owned(), "apache2".to_owned()], vec!["5".to_owned(), "x".to_owned()]];
        assert_eq!(table("  ", &["PID", "NAME"], rows), "  PID   NAME\n  1234  apache2\n  5     x\n");
    }

    #[test]
    fn a_name_cannot_steer_the_terminal() {
        assert_eq!(printable("a\u{1b}[2Jb\nc\u{202e}d é"), "a\\u{1b}[2Jb\\nc\\u{202e}d é");
        let row = vec!["x\ny\u{7f}".to_owned()];
        assert_eq!(table("", &["NAME"], [row]), "NAME\nx\\ny\\u{7f}\n");
    }

    #[test]
    fn times_have_units() {
        let shown = [0, 999, 1000, 12_345, 999_999, 1_000_000, 31_400_000].map(microseconds);
        assert_eq!(shown, ["0 µs", "999 µs", "1.0 ms", "12.3 ms", "1000.0 ms", "1.00 s", "31.40 s"]);
        assert_eq!(point_in_time(1_700_000_000), "2023-11-14T22:13:20Z");
        assert_eq!(point_in_time(u64::MAX), u64::MAX.to_string());
    }
}
