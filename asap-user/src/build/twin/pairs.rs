//! Which piece of the twin is which piece of the module: seeds, what follows from them, and what contradicts.

use super::{
    Evidence,
    data::{Objects, Places, Votes},
    view::{Reference, ReferenceKind, View},
};
use std::collections::{HashMap, HashSet, VecDeque};

/// Instructions from which on code that occurs once is known by itself.
const LONG: usize = 48;
/// The same for code with a string that nobody else uses.
const WITH_STRING: usize = 6;
/// How often all is begun again without what led to contradictions.
const ROUNDS: usize = 12;
/// Of 1000 neighbours, how many must be neighbours in both for order to mean anything.
const ORDERLY: usize = 995;

/// Of 1000 pieces of the twin, how many the module must have, too, to be of the same version.
const SAME_VERSION: usize = 970;

/// Pieces that belong together.
pub(super) struct Pairs {
    forward: Vec<Option<(usize, Evidence)>>,
    backward: Vec<Option<usize>>,
    /// Both images have their functions in the same order.
    pub keeps_order: bool,
}

impl Pairs {
    /// The module's piece for a piece of the twin.
    pub fn of(&self, piece: usize) -> Option<(usize, Evidence)> {
        self.forward[piece]
    }
}

struct Search<'a> {
    a: &'a View<'a>,
    b: &'a View<'a>,
    objects: &'a Objects,
    pairs: Pairs,
    votes: Votes,
    queue: VecDeque<(usize, usize)>,
    banned: &'a HashSet<(usize, usize)>,
    /// What may be concluded from its surroundings.
    tellable: &'a HashSet<u64>,
    contradictions: HashSet<(usize, usize)>,
}

/// Pieces by what they do.
fn by_hash(view: &View<'_>) -> HashMap<u64, Vec<usize>> {
    let mut map: HashMap<u64, Vec<usize>> = HashMap::new();
    for (index, piece) in view.pieces.iter().enumerate() {
        map.entry(piece.hash).or_default().push(index);
    }
    map
}

/// Strings that one piece alone uses.
fn own_strings(view: &View<'_>) -> HashSet<u64> {
    let mut users: HashMap<u64, usize> = HashMap::new();
    for piece in &view.pieces {
        let distinct: HashSet<u64> = piece.strings.iter().copied().collect();
        for string in distinct {
            *users.entry(string).or_default() += 1;
        }
    }
    users.into_iter().filter(|&(_, count)| count == 1).map(|(string, _)| string).collect()
}

/// Hashes of code that may be known by its surroundings. A caller that was found may call another function than it did
/// before, one that looks the same: so code that occurs several times counts only where all of it is there in both images,
/// and the images are of one version.
fn tellable(in_a: &HashMap<u64, Vec<usize>>, in_b: &HashMap<u64, Vec<usize>>) -> HashSet<u64> {
    let there = |hash: &u64| in_b.get(hash).map_or(0, Vec::len);
    let (all, common) = in_a
        .iter()
        .fold((0, 0), |(all, common), (hash, pieces)| (all + pieces.len(), common + pieces.len().min(there(hash))));
    let one_version = common * 1000 >= all * SAME_VERSION;
    let is_tellable =
        |&(hash, pieces): &(&u64, &Vec<usize>)| pieces.len() == there(hash) && (one_version || pieces.len() == 1);
    in_a.iter().filter(is_tellable).map(|(hash, _)| *hash).collect()
}

/// Finds the pairs, and where the twin's objects are in the module.
pub(super) fn find(a: &View<'_>, b: &View<'_>, objects: &Objects) -> (Pairs, Places) {
    let (in_a, in_b) = (by_hash(a), by_hash(b));
    let (own_a, own_b) = (own_strings(a), own_strings(b));
    let once: Vec<(usize, usize)> = in_a
        .iter()
        .filter_map(|(hash, pieces)| match (pieces.as_slice(), in_b.get(hash).map(Vec::as_slice)) {
            (&[one], Some(&[other])) => Some((one, other)),
            _ => None,
        })
        .collect();
    let is_known = |&(one, _): &(usize, usize)| {
        let piece = &a.pieces[one];
        let own = piece.strings.iter().any(|string| own_a.contains(string) && own_b.contains(string));
        piece.instructions.len() >= LONG || (own && piece.instructions.len() >= WITH_STRING)
    };
    let seeds: Vec<(usize, usize)> = once.iter().copied().filter(is_known).collect();
    let once: HashSet<(usize, usize)> = once.into_iter().collect();
    let tellable = tellable(&in_a, &in_b);
    let mut banned = HashSet::new();
    for round in 0.. {
        let mut search = Search {
            a,
            b,
            objects,
            pairs: Pairs {
                forward: vec![None; a.pieces.len()],
                backward: vec![None; b.pieces.len()],
                keeps_order: false,
            },
            votes: Votes::default(),
            queue: VecDeque::new(),
            banned: &banned,
            tellable: &tellable,
            contradictions: HashSet::new(),
        };
        let places = search.run(&seeds, &once);
        if search.contradictions.is_empty() || round >= ROUNDS {
            let (mut pairs, contradictions) = (search.pairs, search.contradictions);
            for (one, other) in contradictions {
                if pairs.forward[one].is_some_and(|(paired, _)| paired == other) {
                    pairs.forward[one] = None;
                    pairs.backward[other] = None;
                }
            }
            return (pairs, places);
        }
        let contradictions = search.contradictions;
        banned.extend(contradictions);
    }
    unreachable!("the last round returns")
}

impl Search<'_> {
    fn run(&mut self, seeds: &[(usize, usize)], once: &HashSet<(usize, usize)>) -> Places {
        for (name, &at) in &self.a.exports {
            let here = self.b.exports.get(name).and_then(|&other| self.b.piece_starting_at(other));
            if let (Some(one), Some(other)) = (self.a.piece_starting_at(at), here) {
                self.accept(one, other, Evidence::Exported);
            }
        }
        for &(one, other) in seeds {
            self.accept(one, other, Evidence::Code);
        }
        loop {
            self.follow();
            let places = self.votes.decide(self.objects, self.a, self.b);
            let before = self.count();
            self.follow_tables(&places);
            self.follow();
            if self.count() == before {
                self.fill_gaps(once);
            }
            if self.count() == before {
                return places;
            }
        }
    }

    fn count(&self) -> usize {
        self.pairs.forward.iter().flatten().count()
    }

    /// Two pieces belong together, unless that is known to be wrong.
    fn accept(&mut self, one: usize, other: usize, evidence: Evidence) {
        let hash = self.a.pieces[one].hash;
        if hash != self.b.pieces[other].hash || self.banned.contains(&(one, other)) {
            return;
        }
        if evidence != Evidence::Exported && !self.tellable.contains(&hash) {
            return;
        }
        match (self.pairs.forward[one], self.pairs.backward[other]) {
            (None, None) => {
                self.pairs.forward[one] = Some((other, evidence));
                self.pairs.backward[other] = Some(one);
                self.queue.push_back((one, other));
            }
            (Some((paired, _)), _) if paired == other => {}
            (forward, backward) => {
                // Who says so and what was said before can't both be right.
                self.contradictions.insert((one, other));
                self.contradictions.extend(forward.map(|(paired, _)| (one, paired)));
                self.contradictions.extend(backward.map(|paired| (paired, other)));
            }
        }
    }

    fn follow(&mut self) {
        while let Some((one, other)) = self.queue.pop_front() {
            let (a, b) = (self.a, self.b);
            let pairs = a.pieces[one].references.iter().zip(&b.pieces[other].references);
            for (x, y) in pairs {
                self.refer(*x, *y);
            }
        }
    }

    fn refer(&mut self, x: Reference, y: Reference) {
        if self.a.is_code(x.target) {
            self.code(x.target, y.target);
        } else if x.kind != ReferenceKind::Branch {
            self.votes.add(x, y.target);
        }
    }

    fn code(&mut self, x: u64, y: u64) {
        let (Some((one, at)), Some((other, there))) = (self.a.piece_around(x), self.b.piece_around(y)) else { return };
        if at == there && (at > 0) == (there > 0) {
            let starts = (self.a.pieces[one].start == x, self.b.pieces[other].start == y);
            if starts.0 == starts.1 {
                self.accept(one, other, Evidence::Reference);
            }
        }
    }

    /// Objects that were found hold addresses at the same places.
    fn follow_tables(&mut self, places: &Places) {
        for (&at, &(there, _)) in places {
            let Some(size) = self.objects.size_at(at) else { continue };
            for offset in (0..size).step_by(8) {
                let (Some(x), Some(y)) = (self.a.pointer_at(at + offset), self.b.pointer_at(there + offset)) else {
                    continue;
                };
                if self.a.is_code(x) && self.b.is_code(y) {
                    let (one, other) = (self.a.piece_starting_at(x), self.b.piece_starting_at(y));
                    if let (Some(one), Some(other)) = (one, other) {
                        self.accept(one, other, Evidence::Reference);
                    }
                }
            }
        }
    }

    /// Between two neighbours that were found, in images that have the same order.
    fn fill_gaps(&mut self, once: &HashSet<(usize, usize)>) {
        let known: Vec<(usize, usize)> =
            self.pairs.forward.iter().enumerate().filter_map(|(one, pair)| Some((one, (*pair)?.0))).collect();
        let orderly = known.windows(2).filter(|pair| pair[0].1 < pair[1].1).count();
        self.pairs.keeps_order = known.len() > 16 && orderly * 1000 >= (known.len() - 1) * ORDERLY;
        if !self.pairs.keeps_order {
            return;
        }
        for pair in known.windows(2) {
            let ((one, other), (next, beyond)) = (pair[0], pair[1]);
            if next <= one + 1 || beyond <= other + 1 {
                continue;
            }
            let hashes = |view: &View<'_>, range: std::ops::Range<usize>| -> Vec<u64> {
                view.pieces[range].iter().map(|piece| piece.hash).collect()
            };
            let (here, there) = (hashes(self.a, one + 1..next), hashes(self.b, other + 1..beyond));
            if here == there {
                for (x, y) in (one + 1..next).zip(other + 1..beyond) {
                    self.accept(x, y, Evidence::Order);
                }
                continue;
            }
            let both = here.len().min(there.len());
            let front =
                (0..both).take_while(|&step| here[step] == there[step]).map(|step| (one + 1 + step, other + 1 + step));
            let back = (1..=both)
                .take_while(|&step| here[here.len() - step] == there[there.len() - step])
                .map(|step| (next - step, beyond - step));
            for (x, y) in front.chain(back).collect::<Vec<_>>() {
                if once.contains(&(x, y)) {
                    self.accept(x, y, Evidence::Order);
                }
            }
        }
    }
}
