//! What is recorded in a process that is in the sandbox, on its way in, or on its way out.

use super::{area::Area, code::Layout, policy::Policy};
use crate::{address::TargetAddr, process::locked::Lock};
use serde::{Deserialize, Serialize};
use std::ops::Range;

/// How far it is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum State {
    /// On its way in, which was never answered: who finds it takes it out.
    #[default]
    Entering,
    /// Inside.
    Inside,
    /// On its way out.
    Leaving,
}

/// One text mapping.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Text {
    /// First address.
    pub start: TargetAddr,
    /// The address behind it.
    pub end: TargetAddr,
    /// Where the file's own mapping is meanwhile. None: it may have been made, or not.
    pub spare: Option<TargetAddr>,
    /// The file: device as the kernel prints it, inode, offset of the first byte.
    pub device: String,
    /// See `device`.
    pub inode: u64,
    /// See `device`.
    pub file_offset: u64,
    /// How it is locked in memory outside of the sandbox. Inside it is not.
    #[serde(default)]
    pub lock: Option<Lock>,
    /// Where its translated code lies, if it is translated.
    #[serde(default)]
    pub region: Option<TargetAddr>,
}

impl Text {
    /// Where it is.
    #[must_use]
    pub fn range(&self) -> Range<TargetAddr> {
        self.start..self.end
    }

    /// Its length in bytes.
    #[must_use]
    pub fn len(&self) -> u64 {
        self.end.0.saturating_sub(self.start.0)
    }

    /// Never, for what was recorded.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The region with its translated code, if it has one.
    #[must_use]
    pub fn region_range(&self) -> Option<Range<TargetAddr>> {
        self.region.map(|start| start..start.offset(Layout::of(self.len()).length as i64))
    }

    /// The spare, once it is there.
    #[must_use]
    pub fn spare_range(&self) -> Option<Range<TargetAddr>> {
        self.spare.map(|start| start..start.offset(self.len() as i64))
    }
}

/// All of it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    /// How far it is.
    pub state: State,
    /// When it was entered, seconds since the epoch.
    pub since: u64,
    /// The texts.
    pub texts: Vec<Text>,
    /// Names the processes that have the same translated code: one that entered, and those that it has forked.
    #[serde(default)]
    pub family: u64,
    /// What guards it.
    #[serde(default)]
    pub policy: Policy,
    /// System calls are noted.
    #[serde(default)]
    pub learns: bool,
    /// Memory of the guards.
    #[serde(default)]
    pub area: Option<Area>,
    /// Regions of texts that are gone, in which threads may still be.
    #[serde(default)]
    pub regions: Vec<Range<TargetAddr>>,
}

impl Record {
    /// The text that holds `address`.
    #[must_use]
    pub fn text_at(&self, address: TargetAddr) -> Option<&Text> {
        self.texts.iter().find(|text| text.range().contains(&address))
    }

    /// Whether `address` lies in a region with translated code.
    #[must_use]
    pub fn is_region(&self, address: TargetAddr) -> bool {
        let of_texts = self.texts.iter().filter_map(Text::region_range);
        of_texts.chain(self.regions.iter().cloned()).any(|region| region.contains(&address))
    }

    /// Whether `address` lies in one of the spares.
    #[must_use]
    pub fn is_spare(&self, address: TargetAddr) -> bool {
        self.texts.iter().filter_map(Text::spare_range).any(|spare| spare.contains(&address))
    }
}
