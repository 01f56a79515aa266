//! Random numbers for tests that can be had again: xorshift64*, from a seed that is printed. The tests of real processes
//! include this file, too.

/// A source of numbers.
pub struct Random {
    state: u64,
    /// What repeats the run, as `ASAP_TEST_SEED`.
    pub seed: u64,
}

impl Random {
    /// Takes its seed from `ASAP_TEST_SEED`, else from the clock.
    pub fn new() -> Self {
        let given = std::env::var("ASAP_TEST_SEED").ok().and_then(|text| text.parse().ok());
        let now = || std::time::UNIX_EPOCH.elapsed().map_or(1, |time| time.as_nanos() as u64);
        let seed: u64 = given.unwrap_or_else(now).max(1);
        println!("to repeat: ASAP_TEST_SEED={seed}");
        Self { state: seed, seed }
    }

    /// Any number.
    pub fn next(&mut self) -> u64 {
        self.state ^= self.state >> 12;
        self.state ^= self.state << 25;
        self.state ^= self.state >> 27;
        self.state.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    /// A number below `limit`.
    pub fn below(&mut self, limit: usize) -> usize {
        ((self.next() >> 33) % limit.max(1) as u64) as usize
    }
}
