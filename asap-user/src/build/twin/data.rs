//! Where the twin's variables and constants are in the module: told by the code that was found and refers to them. An
//! instruction that accesses memory tells for certain; one that computes an address may mean the end of the object in front.

use super::{
    Evidence,
    view::{Reference, ReferenceKind, View},
};
use crate::image::{Symbol, SymbolKind};
use std::collections::{BTreeMap, HashMap};

/// Address in the twin -> address in the module.
pub(super) type Places = BTreeMap<u64, (u64, Evidence)>;

/// The twin's objects, by address.
pub(super) struct Objects {
    sorted: Vec<(u64, u64)>,
    exported: Vec<(u64, String)>,
}

impl Objects {
    pub fn of(symbols: &[Symbol], twin: &View<'_>) -> Self {
        let data = || symbols.iter().filter(|symbol| symbol.kind == SymbolKind::Data);
        let objects = data().filter(|symbol| symbol.size > 0 && !twin.is_code(symbol.address.0));
        let mut sorted: Vec<(u64, u64)> = objects.map(|symbol| (symbol.address.0, symbol.size)).collect();
        sorted.sort_unstable_by_key(|&(at, size)| (at, std::cmp::Reverse(size)));
        sorted.dedup_by_key(|&mut (at, _)| at);
        let exported = twin.exports.iter().map(|(name, &at)| (at, name.clone())).collect();
        Self { sorted, exported }
    }

    /// The object that holds `at`.
    fn around(&self, at: u64) -> Option<usize> {
        let index = self.sorted.partition_point(|&(start, _)| start <= at).checked_sub(1)?;
        let (start, size) = self.sorted[index];
        (at - start < size).then_some(index)
    }

    pub fn size_at(&self, at: u64) -> Option<u64> {
        self.sorted.binary_search_by_key(&at, |&(start, _)| start).ok().map(|index| self.sorted[index].1)
    }
}

/// What code says of addresses.
#[derive(Default)]
pub(super) struct Votes {
    /// Address in the twin, in the module, and how it is used.
    all: HashMap<(u64, u64, bool), usize>,
}

/// What is said of one object: distances from twin to module.
#[derive(Default)]
struct Ballot {
    /// By instructions that access it.
    access: Vec<u64>,
    /// By instructions that compute its address.
    start: Vec<u64>,
    /// By instructions that compute an address inside it.
    inside: Vec<u64>,
}

impl Votes {
    pub fn add(&mut self, reference: Reference, there: u64) {
        *self.all.entry((reference.target, there, reference.kind == ReferenceKind::Access)).or_default() += 1;
    }

    /// The places that are certain.
    pub fn decide(&self, objects: &Objects, a: &View<'_>, b: &View<'_>) -> Places {
        let mut ballots: BTreeMap<usize, Ballot> = BTreeMap::new();
        for &(at, there, is_access) in self.all.keys() {
            let Some(object) = objects.around(at) else { continue };
            let ballot = ballots.entry(object).or_default();
            let list = match (is_access, objects.sorted[object].0 == at) {
                (true, _) => &mut ballot.access,
                (false, true) => &mut ballot.start,
                (false, false) => &mut ballot.inside,
            };
            list.push(there.wrapping_sub(at));
        }
        let mut deltas: BTreeMap<usize, u64> = BTreeMap::new();
        let mut places = Places::new();
        for (at, name) in &objects.exported {
            if let (Some(&there), false) = (b.exports.get(name), a.is_code(*at)) {
                places.insert(*at, (there, Evidence::Exported));
                if let Ok(index) = objects.sorted.binary_search_by_key(at, |&(start, _)| start) {
                    deltas.insert(index, there.wrapping_sub(*at));
                }
            }
        }
        for (&object, ballot) in &ballots {
            if let Some(delta) = same(&ballot.access).filter(|_| !deltas.contains_key(&object)) {
                deltas.insert(object, delta);
            }
        }
        // An address at the start of an object could be the end of the one in front, unless that has gone elsewhere.
        for (&object, ballot) in &ballots {
            let Some(delta) = same(&ballot.start).filter(|_| ballot.access.is_empty() && !deltas.contains_key(&object))
            else {
                continue;
            };
            let start = objects.sorted[object].0;
            let front = object.checked_sub(1).filter(|&front| {
                let (at, size) = objects.sorted[front];
                at + size == start
            });
            let elsewhere = front.and_then(|front| deltas.get(&front)).is_some_and(|&other| other != delta);
            // Among constants there are arrays without a name.
            if elsewhere || (front.is_none() && !a.is_constant(start)) {
                deltas.insert(object, delta);
            }
        }
        // What lies between two objects that moved by the same distance moved with them.
        let certain: Vec<(usize, u64)> = deltas.iter().map(|(&object, &delta)| (object, delta)).collect();
        for (&object, ballot) in &ballots {
            if deltas.contains_key(&object) {
                continue;
            }
            let said: Vec<u64> =
                [&ballot.access, &ballot.start, &ballot.inside].into_iter().flatten().copied().collect();
            let next = certain.partition_point(|&(other, _)| other < object);
            let around = [next.checked_sub(1).and_then(|front| certain.get(front)), certain.get(next)];
            if let (Some(delta), [Some(&(_, front)), Some(&(_, behind))]) = (same(&said), around)
                && front == delta
                && behind == delta
            {
                deltas.insert(object, delta);
            }
        }
        let mut taken: HashMap<u64, usize> = HashMap::new();
        for (&object, &delta) in &deltas {
            *taken.entry(objects.sorted[object].0.wrapping_add(delta)).or_default() += 1;
        }
        for (object, delta) in deltas {
            let at = objects.sorted[object].0;
            let there = at.wrapping_add(delta);
            // Two objects at one place: one of them is wrong.
            if taken[&there] == 1 && !b.is_code(there) {
                places.entry(at).or_insert((there, Evidence::Reference));
            }
        }
        places
    }
}

/// The one value, if there is one only.
fn same(values: &[u64]) -> Option<u64> {
    let first = *values.first()?;
    values.iter().all(|&value| value == first).then_some(first)
}
