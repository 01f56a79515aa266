//! The 49 bugs that the ASAP paper went through, classified by the same rules as what `asap build` finds. The facts of each fix
//! are in `tests/data/apache-2.2.tsv`; `docs/apache-2.2.md` shows what comes of them.

use super::{Changed, Finding, Reason, class};
use crate::patch::manifest::Class;
use std::collections::BTreeMap;

const FACTS: &str = include_str!("../../../tests/data/apache-2.2.tsv");
const PAGE: &str = include_str!("../../../../docs/apache-2.2.md");

struct Fix<'a> {
    cve: &'a str,
    functions: Vec<&'a str>,
    data: Vec<String>,
    facts: &'a str,
    class: &'a str,
    why: &'a str,
}

fn fixes() -> Vec<Fix<'static>> {
    let lines = FACTS.lines().filter(|line| !line.starts_with('#')).skip(1);
    let list = |text: &'static str| text.split(' ').filter(|word| *word != "-").collect::<Vec<_>>();
    let fix = |line: &'static str| {
        let fields: Vec<&str> = line.split('\t').collect();
        let [cve, _, functions, _, data, facts, class, why] = fields[..] else { panic!("{line}") };
        let data = list(data).into_iter().map(str::to_owned).collect();
        Fix { cve, functions: list(functions), data, facts, class, why }
    };
    lines.map(fix).collect()
}

/// What the passes and the comparison of types say of such a fact.
fn finding(fact: &str) -> Finding {
    let (kind, subject) = fact.split_once(':').expect("a kind and a subject");
    let class = match kind {
        // A type of another size, or stored values that mean something else.
        "grows" | "means" => Class::DataLayout,
        // What only runs at start, or is only set then, must be made up for.
        "start" | "set-at-start" => Class::NeedsHook,
        "stays" => Class::NeverQuiescent,
        "absent" => Class::NotApplicable,
        kind => panic!("{kind}"),
    };
    let [object, reason, way_out] = ["", fact, "-"].map(str::to_owned);
    Finding { class, object, subject: subject.to_owned(), reason, way_out }
}

#[test]
fn the_49_bugs_of_the_paper() {
    let fixes = fixes();
    assert_eq!(fixes.len(), 49);
    let mut count: BTreeMap<Class, usize> = BTreeMap::new();
    for fix in &fixes {
        let changed = |(section, name): (usize, &&str)| {
            let function = name.rsplit(':').next().unwrap_or(name).to_owned();
            Changed { old: function.clone(), new: function, local: false, reason: Reason::Code, section }
        };
        let changed: Vec<Changed> = fix.functions.iter().enumerate().map(changed).collect();
        let findings: Vec<Finding> = fix.facts.split(';').filter(|fact| *fact != "-").map(finding).collect();
        let found = class(&changed, &fix.data, changed.is_empty() && findings.is_empty(), &findings);
        assert_eq!(found.name(), fix.class, "{}", fix.cve);
        // What does not simply go in is explained, also to readers.
        let is_plain = matches!(found, Class::CodeOnly | Class::NewData);
        assert_eq!(fix.why == "-", is_plain, "{}", fix.cve);
        let row = format!("| {} | `{}` | {} |", fix.cve, fix.class, fix.why);
        assert!(is_plain || PAGE.contains(&row), "docs/apache-2.2.md lacks: {row}");
        *count.entry(found).or_default() += 1;
    }
    for (class, number) in &count {
        assert!(PAGE.contains(&format!("| `{class}` | {number} |")), "docs/apache-2.2.md: {class} {number}");
    }
    let whole: usize = count.iter().filter(|(class, _)| class.is_live()).map(|(_, number)| number).sum();
    let of_linux = fixes.len() - count[&Class::NotApplicable];
    let said = format!("So {whole} go in whole and {} in part", count[&Class::NeverQuiescent]);
    assert!(PAGE.contains(&said) && PAGE.contains(&format!("of the {of_linux} that concern")), "{said}, {of_linux}");
}
