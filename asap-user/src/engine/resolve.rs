//! Where a patch's undefined symbols lie in the target: the module that is patched first, then the target's own search scope
//! (gABI, "Shared Object Dependencies"). Static functions and data of the module count; those of other modules don't.

use super::modules::Module;
use crate::{
    address::TargetAddr,
    image::{Symbol, SymbolKind},
    patch::{Import, Resolution, Resolver},
    process::memory::Memory,
};
use std::{cell::RefCell, collections::HashMap};

/// Runs an IFUNC's resolver in the target and gives the function it chose.
pub type CallResolver<'a> = dyn FnMut(TargetAddr) -> Option<TargetAddr> + 'a;

/// The symbols of one process, as a patch of one of its modules sees them.
pub struct TargetScope<'a> {
    /// The module that is patched.
    pub home: &'a Module,
    /// All modules, in search order.
    pub modules: &'a [Module],
    /// The process's memory, for slots that its linker has filled.
    pub memory: &'a Memory,
    /// Functions whose original is callable.
    pub originals: &'a HashMap<String, TargetAddr>,
    /// For IFUNCs that no module has resolved yet.
    pub call_resolver: RefCell<&'a mut CallResolver<'a>>,
    /// What was found wanting, for the message.
    pub complaints: RefCell<Vec<String>>,
}

impl Resolver for TargetScope<'_> {
    fn resolve(&self, import: &Import) -> Option<Resolution> {
        let in_home = import.file.is_none().then(|| self.home.image.export(&import.name)).flatten();
        if let Some(symbol) = in_home {
            return self.place(self.home, &symbol);
        }
        let locals = self.home.image.locals(&import.name, import.file.as_deref());
        match locals.as_slice() {
            [] => {}
            [symbol] => return self.place(self.home, symbol),
            several => {
                let files: Vec<_> = several.iter().map(|s| s.file.as_deref().unwrap_or("?")).collect();
                let name = &import.name;
                let message = format!(
                    "{name} is ambiguous: it is defined in {}; say which with ASAP_IMPORT(\"FILE:{name}\")",
                    files.join(", ")
                );
                self.complaints.borrow_mut().push(message);
                return None;
            }
        }
        if import.file.is_some() {
            return None;
        }
        self.modules.iter().find_map(|module| {
            let symbol = module.image.export(&import.name)?;
            self.place(module, &symbol)
        })
    }

    fn original(&self, function: &str) -> Option<TargetAddr> {
        self.originals.get(function).copied()
    }
}

impl TargetScope<'_> {
    fn place(&self, module: &Module, symbol: &Symbol) -> Option<Resolution> {
        let address = symbol.address.in_target(module.bias);
        match symbol.kind {
            SymbolKind::Function | SymbolKind::Data => Some(Resolution::Address(address)),
            SymbolKind::Ifunc => self.ifunc(&symbol.name, address).map(Resolution::Address),
            SymbolKind::Tls => self.thread_local(module, symbol),
        }
    }

    /// What the target's linker chose for an IFUNC: from a slot that it has filled, else by asking the resolver again.
    fn ifunc(&self, name: &str, resolver: TargetAddr) -> Option<TargetAddr> {
        for module in self.modules {
            for slot in module.image.got_slots(name) {
                let Ok(value) = self.memory.word(slot.in_target(module.bias)) else { continue };
                let value = TargetAddr(value);
                // A slot that still leads into its own module waits for its first call (lazy binding).
                let resolved = !module.text.contains(&value) && self.modules.iter().any(|m| m.text.contains(&value));
                if resolved && value != resolver {
                    return Some(value);
                }
            }
        }
        (self.call_resolver.borrow_mut())(resolver)
    }

    /// Offset of a thread-local variable from the thread pointer (psABI, TLS variant II): for the executable it follows from
    /// its own program header; for a library it is where the linker put it, known from a slot that it filled.
    fn thread_local(&self, module: &Module, symbol: &Symbol) -> Option<Resolution> {
        let segment = module.image.tls_segment()?;
        if self.modules.first().is_some_and(|first| std::sync::Arc::ptr_eq(&first.image, &module.image)) {
            let size = segment.memory_size.checked_next_multiple_of(segment.alignment.max(1))?;
            return Some(Resolution::TlsOffset(symbol.address.0.wrapping_sub(size) as i64));
        }
        for other in self.modules {
            for slot in other.image.got_slots(&symbol.name) {
                let Ok(value) = self.memory.word(slot.in_target(other.bias)) else { continue };
                let offset = value as i64;
                // Static TLS lies below the thread pointer; anything else is an address or a module number.
                if (-(1 << 24)..0).contains(&offset) {
                    return Some(Resolution::TlsOffset(offset));
                }
            }
        }
        self.complaints.borrow_mut().push(format!(
            "the thread-local variable {} of {} has no fixed offset from the thread pointer (dynamic TLS)",
            symbol.name, module.path
        ));
        None
    }
}
