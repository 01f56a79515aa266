//! On which line of a TOML text a key is.

use toml::{
    Spanned,
    de::{DeTable, DeValue},
};

/// The line, counted from 1, of `key`, which is as in "syscalls.rules\[0\].calls"; else that of what holds it.
pub(super) fn line_of(text: &str, key: &str) -> Option<usize> {
    let document = DeTable::parse(text).ok()?;
    let mut table = document.get_ref();
    let mut found = None;
    for step in key.split('.') {
        let (name, index) = match step.strip_suffix(']').and_then(|step| step.split_once('[')) {
            Some((name, index)) => (name, index.parse().ok()),
            None => (step, None),
        };
        let Some((key, value)) = table.iter().find(|(key, _)| key.get_ref() == name) else { break };
        found = Some(key.span().start);
        let inner: &Spanned<DeValue<'_>> = match (value.get_ref(), index) {
            (DeValue::Array(list), Some(index)) => match list.get::<usize>(index) {
                Some(item) => {
                    found = Some(item.span().start);
                    item
                }
                None => break,
            },
            _ => value,
        };
        match inner.get_ref() {
            DeValue::Table(inner) => table = inner,
            _ => break,
        }
    }
    found.map(|at| text.as_bytes().iter().take(at).filter(|&&byte| byte == b'\n').count() + 1)
}
