//! The results as a table in Markdown, the worst first, beside what the paper reached.

use super::outcome::{Outcome, Verdict};
use asap::patch::manifest::Class;
use std::collections::BTreeMap;

/// The paper's fixes, and those of them that it could patch.
pub const PAPER: (usize, usize) = (49, 45);

/// Counts of fixes by how it went.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    counts: [usize; Verdict::ALL.len()],
}

impl Counts {
    /// Of some outcomes.
    pub fn of<'a>(outcomes: impl IntoIterator<Item = &'a Outcome>) -> Self {
        let mut counts = Self::default();
        for outcome in outcomes {
            counts.counts[outcome.verdict as usize] += 1;
        }
        counts
    }

    /// How many went so.
    pub fn with(&self, verdict: Verdict) -> usize {
        self.counts[verdict as usize]
    }

    /// All.
    pub fn all(&self) -> usize {
        self.counts.iter().sum()
    }

    /// Those that were patched.
    pub fn patched(&self) -> usize {
        Verdict::ALL.iter().filter(|verdict| verdict.is_patched()).map(|&verdict| self.with(verdict)).sum()
    }
}

/// The outcomes of each package.
pub fn by_package(outcomes: &[Outcome]) -> BTreeMap<&str, Vec<&Outcome>> {
    let mut found: BTreeMap<&str, Vec<&Outcome>> = BTreeMap::new();
    for outcome in outcomes {
        found.entry(&outcome.package).or_default().push(outcome);
    }
    found
}

/// Outcomes of fixes that change something here: the share is of these. What changes nothing in the target can't be patched, and
/// need not be.
pub fn that_count(outcomes: &[Outcome]) -> impl Iterator<Item = &Outcome> {
    outcomes
        .iter()
        .filter(|outcome| !(outcome.verdict == Verdict::NoPatch && outcome.class == Some(Class::NotApplicable)))
}

/// Per cent.
pub fn share(part: usize, all: usize) -> f64 {
    if all == 0 { 0.0 } else { 100.0 * part as f64 / all as f64 }
}

/// The table.
pub fn markdown(outcomes: &[Outcome]) -> String {
    let mut text = String::new();
    let broken: Vec<&Outcome> = outcomes.iter().filter(|outcome| outcome.verdict == Verdict::Broken).collect();
    if !broken.is_empty() {
        text.push_str("**A PATCH BROKE THE SERVER:**\n\n");
        for outcome in broken {
            let why = outcome.why.as_deref().unwrap_or_default();
            text.push_str(&format!("- {}/{}: {}\n", outcome.package, outcome.fix, cell(why)));
        }
        text.push('\n');
    }
    let (all, counted) = (Counts::of(outcomes), Counts::of(that_count(outcomes)));
    text.push_str(&format!(
        "{} fixes of {} packages; {} change the program as it is built here. Of these {} were patched ({:.1} %); the paper: {} of {} ({:.1} %).\n\n",
        all.all(),
        by_package(outcomes).len(),
        counted.all(),
        counted.patched(),
        share(counted.patched(), counted.all()),
        PAPER.1,
        PAPER.0,
        share(PAPER.1, PAPER.0),
    ));
    text.push_str("| package | version | fixes | repaired, seen | in and out | no patch | failed | broken |\n|---|---|---|---|---|---|---|---|\n");
    for (package, outcomes) in by_package(outcomes) {
        let counts = Counts::of(outcomes.iter().copied());
        let numbers: Vec<String> = Verdict::ALL.iter().map(|&verdict| counts.with(verdict).to_string()).collect();
        let version = outcomes.first().map_or("", |outcome| outcome.version.as_str());
        text.push_str(&format!("| {package} | {version} | {} | {} |\n", counts.all(), numbers.join(" | ")));
    }
    text.push_str(
        "\n| fix | CVE | class | functions | result | seen | patch ms | gate us |\n|---|---|---|---|---|---|---|---|\n",
    );
    for outcome in outcomes {
        let class = outcome.class.map_or("", |class| class.name());
        let number = |value: Option<String>| value.unwrap_or_default();
        text.push_str(&format!(
            "| {}/{} | {} | {class} | {} | {} | {} | {} | {} |\n",
            outcome.package,
            outcome.fix,
            outcome.cve,
            outcome.functions,
            outcome.verdict.words(),
            cell(&seen(outcome)),
            number(outcome.patch_ms.map(|ms| format!("{ms:.1}"))),
            number(outcome.gate_us.map(|us| us.to_string())),
        ));
    }
    text
}

fn seen(outcome: &Outcome) -> String {
    if let (Verdict::InAndOut | Verdict::NoPatch, Some(note)) = (outcome.verdict, &outcome.note) {
        return note.clone();
    }
    match (outcome.verdict, &outcome.why) {
        (Verdict::Repaired, _) if outcome.reproduced => "answers differ, before and after".to_owned(),
        (Verdict::Repaired, _) => format!("new code ran: {}", outcome.ran.join(", ")),
        (_, Some(why)) => why.clone(),
        _ => String::new(),
    }
}

/// A text that fits into a cell.
fn cell(text: &str) -> String {
    let line = text.split_ascii_whitespace().collect::<Vec<_>>().join(" ").replace('|', "\\|");
    match line.char_indices().nth(240) {
        Some((end, _)) => format!("{}...", &line[..end]),
        None => line,
    }
}

#[cfg(test)]
pub mod tests {
    use super::*;

    /// An outcome as it may be.
    pub fn outcome(package: &str, verdict: Verdict, class: Class) -> Outcome {
        Outcome {
            package: package.to_owned(),
            version: "1-1".to_owned(),
            fix: "CVE-2000-0001".to_owned(),
            cve: "CVE-2000-0001".to_owned(),
            about: String::new(),
            verdict,
            class: Some(class),
            expected: class,
            functions: 1,
            ran: Vec::new(),
            reproduced: false,
            patch_ms: None,
            gate_us: None,
            answers: 0,
            why: (verdict >= Verdict::NoPatch).then(|| "a | reason\nin two lines".to_owned()),
            note: None,
            steps: Vec::new(),
            described: String::new(),
        }
    }

    #[test]
    fn the_share_is_of_what_changes_anything() {
        let outcomes = [
            outcome("a", Verdict::Repaired, Class::CodeOnly),
            outcome("a", Verdict::InAndOut, Class::NewData),
            outcome("a", Verdict::NoPatch, Class::NotApplicable),
            outcome("b", Verdict::NoPatch, Class::DataLayout),
        ];
        let text = markdown(&outcomes);
        assert!(
            text.starts_with(
                "4 fixes of 2 packages; 3 change the program as it is built here. Of these 2 were patched (66.7 %)"
            ),
            "{text}"
        );
        assert!(text.contains("| a | 1-1 | 3 | 1 | 1 | 1 | 0 | 0 |"), "{text}");
        assert!(text.contains("a \\| reason in two lines"), "{text}");
    }

    #[test]
    fn a_broken_server_stands_at_the_top() {
        let outcomes =
            [outcome("a", Verdict::Repaired, Class::CodeOnly), outcome("b", Verdict::Broken, Class::CodeOnly)];
        assert!(markdown(&outcomes).starts_with("**A PATCH BROKE THE SERVER:**\n\n- b/CVE-2000-0001"));
    }
}
