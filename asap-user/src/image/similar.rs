//! "Did you mean": names that look like one that was not found.

use super::{demangle, names::bare_identifier};

/// Most names that are told.
const TOLD_MOST: usize = 5;
/// Longest name that is compared letter by letter, bytes.
const COMPARED_MOST: usize = 128;
/// How many letter comparisons may be made: a list of a million symbols is not worth a long wait.
const WORK_MOST: usize = 150_000_000;

/// Of `known` raw names, those most like `wanted`, readable.
pub(super) fn similar<'a>(wanted: &str, known: impl Iterator<Item = &'a [u8]>) -> Vec<String> {
    let last = wanted.split('(').next().unwrap_or(wanted).rsplit("::").next().unwrap_or(wanted);
    let wanted = if last.is_empty() { wanted } else { last }.to_ascii_lowercase();
    if wanted.is_empty() || wanted.len() > COMPARED_MOST {
        return Vec::new();
    }
    let mut work = 0;
    let mut row = Vec::new();
    let mut close: Vec<(usize, &str)> = Vec::new();
    // Parts of functions can't be meant.
    let whole = known.filter_map(|raw| std::str::from_utf8(raw).ok()).filter(|raw| !raw.contains(".cold"));
    for raw in whole {
        let name = bare_identifier(raw);
        let most = 2 + wanted.len() / 8;
        if name.len().abs_diff(wanted.len()) <= most {
            work += name.len() * (2 * most + 1);
            if work > WORK_MOST {
                break;
            }
            // In a short name two other letters make another name.
            if let Some(distance) = distance_within(name.as_bytes(), wanted.as_bytes(), most, &mut row)
                && distance * 2 <= wanted.len()
            {
                close.push((distance, raw));
            }
        } else if wanted.len() >= 5 && name.len() <= COMPARED_MOST && contains(name.as_bytes(), wanted.as_bytes()) {
            close.push((most + 1, raw));
        }
        if close.len() > 1000 {
            close.sort_unstable();
            close.dedup();
            close.truncate(TOLD_MOST);
        }
    }
    close.sort_unstable();
    let mut told = Vec::new();
    for (_, raw) in close {
        let name = demangle(raw);
        if !told.contains(&name) {
            told.push(name);
        }
        if told.len() == TOLD_MOST {
            break;
        }
    }
    told
}

/// `part`, lower case, occurs in `name`, whatever its case.
fn contains(name: &[u8], part: &[u8]) -> bool {
    name.windows(part.len()).any(|window| window.eq_ignore_ascii_case(part))
}

/// Levenshtein distance, if it is no more than `most`; `b` is lower case. `row` is space to work in.
fn distance_within(a: &[u8], b: &[u8], most: usize, row: &mut Vec<usize>) -> Option<usize> {
    let far = most + 1;
    row.clear();
    row.extend((0..=b.len()).map(|n| n.min(far)));
    for (i, x) in a.iter().enumerate() {
        // Cells further from the diagonal can't lead to a small distance.
        let (start, end) = (i.saturating_sub(most), b.len().min(i + far));
        let mut diagonal = row[start];
        row[start] = if start == 0 { (i + 1).min(far) } else { far };
        let mut least = row[start];
        for (j, y) in b.iter().enumerate().take(end).skip(start) {
            let cost = diagonal + usize::from(!x.eq_ignore_ascii_case(y));
            diagonal = row[j + 1];
            row[j + 1] = cost.min(row[j] + 1).min(diagonal + 1).min(far);
            least = least.min(row[j + 1]);
        }
        if least > most {
            return None;
        }
    }
    Some(row[b.len()]).filter(|&distance| distance <= most)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn alike_is_measured_in_letters() {
        let distance = |a: &str, b: &str, most| distance_within(a.as_bytes(), b.as_bytes(), most, &mut Vec::new());
        assert_eq!(distance("abc", "abc", 2), Some(0));
        assert_eq!(distance("Abc", "axc", 2), Some(1));
        assert_eq!(distance("", "abc", 3), Some(3));
        assert_eq!(distance("", "abc", 2), None);
        assert_eq!(distance("abcd", "bcda", 2), Some(2));
        assert_eq!(distance("abcdefgh", "hgfedcba", 3), None);
        assert_eq!(distance("kitten", "sitting", 3), Some(3));
        assert_eq!(distance("xxabcdef", "abcdef", 2), Some(2));
        assert_eq!(distance("abcdef", "abcdefxx", 2), Some(2));
    }

    #[test]
    fn the_nearest_names_come_first_and_readable() {
        let known = [
            "ap_byterange_filter",
            "ap_content_length_filter",
            "main",
            "_ZN2ns6victimEi",
            "victim_of_all",
            "_ZN2ns6victimEi.cold",
        ];
        let like = |wanted: &str| similar(wanted, known.iter().map(|name| name.as_bytes()));
        assert_eq!(like("ap_byterange_fliter"), ["ap_byterange_filter"]);
        assert_eq!(like("byterange"), ["ap_byterange_filter"]);
        assert_eq!(like("ns::victin"), ["ns::victim(int)"]);
        assert_eq!(like("victim"), ["ns::victim(int)", "victim_of_all"]);
        assert_eq!(like("f"), [""; 0]);
        assert_eq!(like(&"x".repeat(1_000_000)), [""; 0]);
    }

    #[test]
    fn a_million_names_end_the_search_soon() {
        let names: Vec<String> = (0..300_000).map(|n| format!("{n:0100}")).collect();
        let start = std::time::Instant::now();
        let _ = similar(&"y".repeat(100), names.iter().map(|name| name.as_bytes()));
        assert!(start.elapsed() < std::time::Duration::from_secs(10), "{:?}", start.elapsed());
    }
}
