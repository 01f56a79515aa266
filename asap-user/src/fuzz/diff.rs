//! Diffs (`asap build --patch`): a diff and the text that it is applied to, with a NUL between them.

use crate::build::diff::Diff;

pub(super) fn check(bytes: &[u8]) {
    let end = bytes.iter().position(|&byte| byte == 0).unwrap_or(bytes.len());
    let text = bytes.get(end + 1..).unwrap_or_default();
    let Ok(diff) = Diff::parse(&bytes[..end]) else { return };
    assert!(!diff.files.is_empty(), "a diff of nothing is refused");
    for file in &diff.files {
        for strip in [0, 1, usize::MAX] {
            let path = file.path(strip);
            // Whoever joins it to a folder must stay in there.
            let outside = |path: &str| path.starts_with('/') || path.split('/').any(|part| part == "..");
            assert!(path.is_none_or(|path| !path.is_empty() && !outside(&path)));
        }
        for name in ["a.c", "a.txt"] {
            if let Ok(changed) = file.apply(name, text) {
                // Lines of the diff, of the text, and `#line` directives between them.
                assert!(changed.len() <= 64 * (bytes.len() + 64), "{} bytes out of {}", changed.len(), bytes.len());
            }
        }
    }
}
