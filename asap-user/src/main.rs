//! The one binary: client and agent.

fn main() {}
