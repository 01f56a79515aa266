//! The paper's fixes of Apache 2.2, classified by the rules that `asap build` has. Not built: the compilers of that time are gone;
//! what each fix changes was looked up in its objects, and is written down in a table.

use anyhow::{Context, Result};
use asap::patch::manifest::Class;

/// The table.
const TABLE: &str = include_str!("../../fixtures/study/apache-2.2.tsv");

/// What a fix changes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Change {
    /// Its CVE.
    pub cve: String,
    functions: usize,
    new_variables: usize,
    fact: String,
    /// Why it is not like most others.
    pub why: String,
}

impl Change {
    /// What it means for a running server.
    pub fn class(&self) -> Class {
        match self.fact.as_str() {
            "elsewhere" => Class::NotApplicable,
            "layout" => Class::DataLayout,
            "hook" => Class::NeedsHook,
            "stays" => Class::NeverQuiescent,
            _ if self.functions == 0 => Class::NotApplicable,
            _ if self.new_variables > 0 => Class::NewData,
            _ => Class::CodeOnly,
        }
    }

    /// Whether a patch can be made of it.
    pub fn is_patchable(&self) -> bool {
        !matches!(self.class(), Class::NotApplicable | Class::DataLayout | Class::StartUpOnly)
    }
}

/// Reads the table.
pub fn changes() -> Result<Vec<Change>> {
    let change = |line: &str| -> Result<Change> {
        let fields: Vec<&str> = line.split('\t').collect();
        let [cve, functions, variables, fact, why] = fields[..] else { anyhow::bail!("not five fields: {line}") };
        Ok(Change {
            cve: cve.to_owned(),
            functions: functions.parse().with_context(|| line.to_owned())?,
            new_variables: variables.split(',').filter(|name| !name.is_empty()).count(),
            fact: fact.to_owned(),
            why: why.to_owned(),
        })
    };
    TABLE.lines().filter(|line| !line.starts_with('#')).map(change).collect()
}

/// A line about them for the table of results.
pub fn summary() -> Result<String> {
    let changes = changes()?;
    let applies = changes.iter().filter(|change| change.class() != Class::NotApplicable).count();
    let patchable = changes.iter().filter(|change| change.is_patchable()).count();
    let others: Vec<String> = changes
        .iter()
        .filter(|change| !change.is_patchable())
        .map(|change| format!("{} ({}: {})", change.cve, change.class(), change.why))
        .collect();
    Ok(format!(
        "The paper's own {} fixes of Apache 2.2 by the same rules: {applies} change the server on Linux, {patchable} of them can be \
         patched. Not: {}.\n",
        changes.len(),
        others.join("; "),
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_of_the_papers_fixes_has_a_class_and_each_without_a_patch_a_reason() {
        let changes = changes().expect("the table");
        assert_eq!(changes.len(), super::super::table::PAPER.0);
        let count = |class| changes.iter().filter(|change| change.class() == class).count();
        assert_eq!(count(Class::NotApplicable), 3, "Solaris, Windows, a script");
        assert_eq!(count(Class::DataLayout), 4);
        assert_eq!(count(Class::NeedsHook), 2);
        assert_eq!(count(Class::NeverQuiescent), 1);
        assert_eq!(changes.iter().filter(|change| change.is_patchable()).count(), 42);
        for change in &changes {
            let is_plain = matches!(change.class(), Class::CodeOnly | Class::NewData);
            assert!(is_plain || !change.why.is_empty(), "{}: why?", change.cve);
        }
        assert!(summary().expect("a line").contains("46 change the server on Linux, 42 of them"));
    }
}
