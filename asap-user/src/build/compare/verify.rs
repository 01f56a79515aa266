//! The last pass: what of a change can't go into a running program, or not without more ado; each with the reason and the way
//! out. Not for types, which need debug information: that is `types`.

use super::{
    Finding,
    correlate::{Correlation, Numbered, base_name},
    include::Inclusion,
    mark::{Marks, function, is_named, uses},
    object::{Kind, Object, SymbolKind},
};
use crate::patch::manifest::Class;

const RESTART: &str = "restart the program with a repaired build";
const HOOK: &str = "give the patch a hook that sets the running program's data right (asap-patch.h), or restart";

/// Says what stands in the way.
pub fn verify(old: &Object, new: &Object, found: &Correlation, marks: &Marks, inclusion: &Inclusion) -> Vec<Finding> {
    let mut findings = Vec::new();
    let numbered = Numbered::of(old, new);
    let mut find = |class, subject: &str, reason: String, way_out: &str| {
        let object = new.source.clone().unwrap_or_else(|| new.name.clone());
        findings.push(Finding { class, object, subject: subject.to_owned(), reason, way_out: way_out.to_owned() });
    };
    for &at in &marks.variables {
        let before = found.old_of(at).map_or(0, |at| old.sections[at].size);
        let (name, after) = (new.title(at), new.sections[at].size);
        let reason = if before == after {
            format!("the variable {name} starts with another value, and the running program has set it already")
        } else {
            format!(
                "the variable {name} has {after} bytes instead of {before}, and the running program uses the old one"
            )
        };
        find(Class::DataLayout, name, reason, HOOK);
    }
    for &at in &marks.constants {
        let name = new.title(at);
        let globally = new.symbols_in(at).iter().any(|symbol| !symbol.local);
        if globally {
            let reason = format!("the constant {name} changes, and other parts of the program use it");
            find(Class::DataLayout, name, reason, RESTART);
        }
        let keeps = |&user: &usize| {
            found.old_of(user).is_some()
                && matches!(new.sections[user].kind, Kind::Variable | Kind::Startup)
                && uses(new, user).contains(&at)
        };
        if let Some(user) = (0..new.sections.len()).find(keeps) {
            let reason = format!("the constant {name} changes, and {} holds its address already", new.title(user));
            find(Class::DataLayout, name, reason, HOOK);
        }
    }
    if marks.startup {
        find(
            Class::StartUpOnly,
            ".init_array",
            "what runs when the program starts changes, and it has started already".to_owned(),
            HOOK,
        );
    }
    for &at in marks.code.keys() {
        let Some(symbol) = function(new, at) else {
            let reason = "the code that changes has no function symbol (assembly)".to_owned();
            find(Class::NotApplicable, new.title(at), reason, RESTART);
            continue;
        };
        let mut entries: Vec<u64> = new
            .symbols_in(at)
            .iter()
            .filter(|symbol| symbol.kind == SymbolKind::Function)
            .map(|symbol| symbol.value)
            .collect();
        entries.dedup();
        if entries.len() > 1 {
            let reason = format!("{} functions share the section {}", entries.len(), new.sections[at].name);
            find(Class::NotApplicable, &symbol.name, reason, "compile with -ffunction-sections");
        }
        let name = &symbol.name;
        if name == "main" {
            let reason = "main is entered once, and returns when the program ends".to_owned();
            find(Class::NeverQuiescent, name, reason, RESTART);
        } else if is_constructor(new, at) {
            let reason = format!("{name} runs when the program starts, and it has started already");
            find(Class::StartUpOnly, name, reason, HOOK);
        }
        if new.symbols_in(at).iter().any(|symbol| symbol.kind == SymbolKind::Ifunc) {
            let reason = format!("{name} chooses an implementation when the program starts");
            find(Class::StartUpOnly, name, reason, RESTART);
        }
    }
    for &at in &inclusion.sections {
        let name = new.title(at);
        if new.sections[at].kind == Kind::ThreadLocal {
            let reason = format!("{name} is a new thread-local variable, for which the running threads have no room");
            find(Class::DataLayout, name, reason, RESTART);
        }
        if new.sections[at].kind == Kind::Variable && inclusion.new_data.iter().any(|data| data == name) {
            let reason =
                format!("the new variable {name} starts at its initial value, whatever the program did before");
            find(Class::NewData, name, reason, "if code that sets it has run already, set it in a hook (asap-patch.h)");
        }
        // Numbers of static variables change; if it is not certain which is which, it could be the wrong one.
        let base = base_name(name);
        if matches!(new.sections[at].kind, Kind::Variable | Kind::ThreadLocal)
            && is_named(new, at)
            && numbered.has(name)
        {
            let is_rival = |&other: &usize| {
                new.sections[at].kind == old.sections[other].kind
                    && found.new_of(other).is_none()
                    && base_name(old.title(other)) == base
            };
            if let Some(rival) = (0..old.sections.len()).find(is_rival) {
                let reason = format!(
                    "it is not certain whether the static variable {name} is {} of the running program",
                    old.title(rival)
                );
                find(Class::DataLayout, name, reason, "give the static variables of the source different names");
            }
        }
    }
    if let Some(hook) = new.of_kind(Kind::Declaration).next() {
        let name = &new.sections[hook].name;
        let reason = format!("the source declares {name}, which runs in the program when the patch goes in or out");
        find(Class::NeedsHook, name, reason, "nothing: it is in the patch");
    }
    for &at in &inclusion.nameless {
        let reason = format!("the code uses {}, which has no name in the running program", new.sections[at].name);
        find(Class::NotApplicable, new.title(at), reason, "compile with -fdata-sections");
    }
    findings
}

/// Runs before main: the compiler puts it there, or the list names it.
fn is_constructor(new: &Object, at: usize) -> bool {
    let is_listed = new.of_kind(Kind::Startup).any(|list| uses(new, list).contains(&at));
    is_listed || new.sections[at].name.starts_with(".text.startup._GLOBAL__sub_I")
}
