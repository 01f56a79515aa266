//! The patch transaction: plan, stage, quiesce, commit, revert. Knows nothing of sockets and command lines.

pub mod ledger;
