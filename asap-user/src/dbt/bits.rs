//! A set of addresses in one stretch of code: a bit per byte.

/// Addresses from `start` on.
#[derive(Clone, Debug, Default)]
pub(super) struct Bits {
    start: u64,
    length: u64,
    words: Vec<u64>,
}

impl Bits {
    pub(super) fn new(start: u64, length: usize) -> Self {
        Self { start, length: length as u64, words: vec![0; length.div_ceil(64)] }
    }

    fn place(&self, at: u64) -> Option<(usize, u64)> {
        let offset = at.checked_sub(self.start).filter(|&offset| offset < self.length)?;
        Some(((offset / 64) as usize, 1 << (offset % 64)))
    }

    /// Adds `at`; what lies outside is left out.
    pub(super) fn set(&mut self, at: u64) {
        if let Some((word, bit)) = self.place(at) {
            self.words[word] |= bit;
        }
    }

    pub(super) fn has(&self, at: u64) -> bool {
        self.place(at).is_some_and(|(word, bit)| self.words[word] & bit != 0)
    }

    /// The last member before `at` that is not before `floor`.
    pub(super) fn before(&self, at: u64, floor: u64) -> Option<u64> {
        let floor = floor.max(self.start);
        (floor..at).rev().find(|&at| self.has(at))
    }

    /// Members in `range`, by address.
    pub(super) fn within(&self, range: std::ops::Range<u64>) -> impl Iterator<Item = u64> + '_ {
        let end = range.end.min(self.start.saturating_add(self.length));
        let mut at = range.start.max(self.start);
        std::iter::from_fn(move || {
            while at < end {
                let offset = at - self.start;
                let word = self.words[(offset / 64) as usize] >> (offset % 64);
                if word == 0 {
                    at = at - offset % 64 + 64;
                    continue;
                }
                let found = at + u64::from(word.trailing_zeros());
                at = found + 1;
                return (found < end).then_some(found);
            }
            None
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn members_are_found_in_order_and_outsiders_ignored() {
        let mut bits = Bits::new(1000, 200);
        for at in [999, 1000, 1063, 1064, 1199, 1200, u64::MAX] {
            bits.set(at);
        }
        assert_eq!(bits.within(0..u64::MAX).collect::<Vec<_>>(), [1000, 1063, 1064, 1199]);
        assert_eq!(bits.within(1001..1199).collect::<Vec<_>>(), [1063, 1064]);
        assert_eq!(bits.before(1199, 1000), Some(1064));
        assert_eq!(bits.before(1199, 1065), None);
        assert_eq!(bits.before(1000, 0), None);
        assert!(!bits.has(1200));
    }
}
