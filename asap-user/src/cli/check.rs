//! `asap check`: a patch without the patching.

use super::{
    client::ask,
    context::{Global, require_root},
    inspect::Contents,
    patch::PatchOptions,
    text::count,
};
use crate::{
    patch::{
        PatchObject,
        manifest::{self, Class},
    },
    report::{Failure, Reply, Request},
};
use serde::Serialize;

/// Say whether a patch would go in, what it changes, and what would happen in each process; change nothing.
///
/// The same as `asap patch --dry-run`, with the class of the patch and its contents.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  asap check fix.asap
  asap check --pid 1234 --function ap_byterange_filter fix.o
  asap check --pid 1234 fix.o && asap patch --pid 1234 fix.o
  asap check --json fix.asap | jq '.class, .would_go_in'")]
pub struct Check {
    #[command(flatten)]
    options: PatchOptions,
}

/// What `--json` prints.
#[derive(Serialize)]
struct Document {
    /// What the patch means for a running program.
    class: Class,
    /// In a few words.
    meaning: &'static str,
    would_go_in: bool,
    /// What is in the patch.
    contents: Contents,
    /// What the agent says.
    #[serde(flatten)]
    reply: Option<Reply>,
    #[serde(skip_serializing_if = "Option::is_none")]
    failed: Option<Failure>,
}

impl Check {
    pub fn run(self, global: &Global) -> Result<(), Failure> {
        require_root("check")?;
        let request = self.options.request(true)?;
        let Request::Patch(patch) = &request else { return Err(Failure::refused("no patch", "give a patch file")) };
        let files: Vec<_> = patch.files.iter().map(|file| (file.name.clone(), file.bytes.clone())).collect();
        // What can't be read is refused by the agent, too, in the same words as when it is to go in.
        let object = PatchObject::read(&files).ok();
        let manifest = files.iter().find_map(|(_, bytes)| manifest::read(bytes).ok().flatten());
        let contents = object.as_ref().map(|object| Contents::of(object).with(manifest.clone()));
        let class = manifest.map(|manifest| manifest.class);
        let class = class.or_else(|| object.as_ref().map(|object| class_of(object, &patch.functions)));
        let reply = ask(&global.socket, &request);
        let (Some(class), Some(contents)) = (class, contents) else {
            let reply = reply?;
            return global.show(&reply, || super::patch::shown(&reply));
        };
        let (reply, failed) = match reply {
            Ok(reply) => (Some(reply), None),
            Err(failure) => (None, Some(failure)),
        };
        let meaning = class.meaning();
        let document = Document { class, meaning, would_go_in: failed.is_none(), contents, reply, failed };
        if document.failed.is_none() || global.json {
            global.show(&document, || {
                let changes = document.contents.summary();
                let agent = document.reply.as_ref().map(super::patch::shown).unwrap_or_default();
                format!("class {class} ({meaning}); {changes}\n{agent}")
            })?;
            global.is_said.set(true);
        }
        document.failed.map_or(Ok(()), Err)
    }
}

/// The class of plain object files, as far as they tell it themselves.
fn class_of(object: &PatchObject, functions: &[String]) -> Class {
    let replaces_main = functions.iter().any(|name| name == "main")
        || object.replacements().iter().any(|replacement| replacement.replaces == "main");
    if replaces_main {
        Class::NeverQuiescent
    } else if object.hooks().all().next().is_some() {
        Class::NeedsHook
    } else if object.variables().is_empty() {
        Class::CodeOnly
    } else {
        Class::NewData
    }
}

impl Contents {
    /// In one line.
    fn summary(&self) -> String {
        format!(
            "{}, {}, {} bytes of code",
            count(self.functions.len(), "function", "functions"),
            count(self.variables.len(), "variable or constant", "variables and constants"),
            self.code_bytes
        )
    }
}
