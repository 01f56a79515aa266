//! Which functions of which module a patch replaces, and whether that can be done: everything that can be refused before a
//! byte of the target changes.

use super::{
    modules::{ImageCache, Module},
    process::TargetProcess,
    text::JUMP_LENGTH,
};
use crate::{
    address::TargetAddr,
    image::{Function, FunctionQuery, LookupError, demangle},
    patch::{PatchObject, prologue},
    report::{Failure, PatchRequest},
};

/// One function to be replaced, found in the target.
#[derive(Clone)]
pub struct PlannedFunction {
    /// Name for people.
    pub name: String,
    /// As the patch's author wrote it, for `ASAP_ORIGINAL`.
    pub written: String,
    /// Index of its module.
    pub module: usize,
    /// What the image knows of it.
    pub function: Function,
    /// Where calls arrive.
    pub entry: TargetAddr,
    /// The symbol that replaces it.
    pub new_symbol: String,
}

/// What the user asked for: target function and symbol of the patch that replaces it.
///
/// # Errors
/// The objects neither declare nor contain what is asked for.
pub fn pairs(request: &PatchRequest, object: &PatchObject) -> Result<Vec<(String, String)>, Failure> {
    let declared = object.replacements();
    if request.functions.is_empty() {
        if declared.is_empty() {
            let defined: Vec<_> = object.functions().iter().filter(|f| f.global).map(|f| demangle(&f.name)).collect();
            return Err(Failure::refused(
                format!("the patch does not say which functions it replaces; it defines {}", list(&defined)),
                "name them with --function, or mark them with ASAP_REPLACES in the source (asap-patch.h)",
            ));
        }
        return Ok(declared.iter().map(|r| (r.replaces.clone(), r.new_symbol.clone())).collect());
    }
    request
        .functions
        .iter()
        .map(|wanted| {
            if let Some(found) = declared.iter().find(|r| r.replaces == *wanted) {
                return Ok((wanted.clone(), found.new_symbol.clone()));
            }
            let bare = FunctionQuery::parse(wanted).name;
            let functions = object.functions();
            let matching: Vec<_> = functions
                .iter()
                // What has a dot in its name is a part or a variant that the compiler split off (`f.cold`).
                .filter(|f| f.name == bare || !f.name.contains('.') && is_called(&f.name, &bare))
                .collect();
            match matching.as_slice() {
                [one] => Ok((wanted.clone(), one.name.clone())),
                [] => {
                    let defined: Vec<_> = functions.iter().map(|f| demangle(&f.name)).collect();
                    Err(Failure::refused(
                        format!("the patch defines no function {wanted}; it defines {}", list(&defined)),
                        "check the spelling, or name the replaced function with ASAP_REPLACES(\"old\") in the source",
                    ))
                }
                several => {
                    let names: Vec<_> = several.iter().map(|f| demangle(&f.name)).collect();
                    Err(Failure::refused(
                        format!("{wanted} could be {} of the patch", list(&names)),
                        "write out the arguments: --function 'name(types)'",
                    ))
                }
            }
        })
        .collect()
}

/// Whether a symbol stands for what a user calls `name`, with or without the types of its arguments.
fn is_called(symbol: &str, name: &str) -> bool {
    demangle(symbol) == name || unqualified(symbol) == name
}

/// `ns::f` for `ns::f(int)`.
fn unqualified(name: &str) -> String {
    let plain = demangle(name);
    plain.split('(').next().unwrap_or(&plain).to_owned()
}

fn list(names: &[String]) -> String {
    match names {
        [] => "none".to_owned(),
        names if names.len() > 8 => format!("{} and {} more", names[..8].join(", "), names.len() - 8),
        names => names.join(", "),
    }
}

/// Finds the functions of `pairs` in the modules of a process (in `home` alone, where given) and checks that each can be
/// replaced.
///
/// # Errors
/// One is unknown, ambiguous, too short, an IFUNC, in the vdso, or its text was changed by someone else.
pub fn functions(
    process: &TargetProcess,
    modules: &mut [Module],
    images: &mut ImageCache,
    pairs: &[(String, String)],
    address: Option<u64>,
    home: Option<usize>,
) -> Result<Vec<PlannedFunction>, Failure> {
    let mut planned: Vec<PlannedFunction> = Vec::new();
    for (wanted, new_symbol) in pairs {
        let mut query = FunctionQuery::parse(wanted);
        if let (Some(address), 1) = (address, pairs.len()) {
            query.address = Some(crate::address::ImageOffset(address));
        }
        let found = locate(modules, home, wanted, query.clone()).or_else(|failure| {
            // Debug files are large: looked at only when the files themselves don't tell.
            let mut news = false;
            for module in modules.iter_mut() {
                news |= images.add_debug_symbols(process.pid, module);
            }
            if news { locate(modules, home, wanted, query) } else { Err(failure) }
        });
        let (module, function) = found?;
        let entry = function.address.in_target(modules[module].bias);
        let name = function.name.as_deref().map_or_else(|| wanted.clone(), demangle);
        if planned.iter().any(|other| other.entry == entry) {
            return Err(Failure::refused(
                format!("the patch replaces {name} twice"),
                "name each function once (two names may stand for the same code)",
            ));
        }
        let function =
            PlannedFunction { name, written: wanted.clone(), module, function, entry, new_symbol: new_symbol.clone() };
        check(process, &modules[module], &function)?;
        planned.push(function);
    }
    Ok(planned)
}

/// Finds the function that `query` means in the modules (in `home` alone, where given); `wanted` is how the user wrote it.
///
/// # Errors
/// There is none, or several.
pub fn locate(
    modules: &[Module],
    home: Option<usize>,
    wanted: &str,
    query: FunctionQuery,
) -> Result<(usize, Function), Failure> {
    // `libfoo.so.1:f` names the module rather than a source file.
    let named = query.file.as_deref().and_then(|file| modules.iter().position(|module| module.file_name() == file));
    let (query, searched): (_, Vec<usize>) = match (home, named) {
        (Some(home), _) => (query, vec![home]),
        (None, Some(module)) => (FunctionQuery { file: None, ..query }, vec![module]),
        (None, None) => (query, (0..modules.len()).collect()),
    };
    let mut similar = Vec::new();
    let mut other_kind = None;
    for index in searched {
        let module = &modules[index];
        match module.image.find_function(&query) {
            Ok(function) if module.is_file => return Ok((index, function)),
            Ok(_) => {
                return Err(Failure::refused(
                    format!("{wanted} is code of the kernel's ({})", module.path),
                    "it can't be replaced in one process; patch the function that calls it",
                ));
            }
            Err(LookupError::Unknown { similar: names, .. }) => similar.extend(names),
            Err(error) => {
                let failure = Failure::refused(format!("{}: {error}", module.path), way_out(&error, wanted));
                // A variable of that name in one module keeps no function of another from being found.
                if !matches!(error, LookupError::NotAFunction(_)) {
                    return Err(failure);
                }
                other_kind.get_or_insert(failure);
            }
        }
    }
    if let Some(failure) = other_kind {
        return Err(failure);
    }
    if let Some(address) = query.address {
        return Err(Failure::refused(
            format!("no module of the process has a function {wanted} at {address}"),
            "leave out --address: asap lists the candidates and their addresses where there are several",
        ));
    }
    similar.truncate(5);
    let hint = if similar.is_empty() { String::new() } else { format!("; similar names: {}", similar.join(", ")) };
    Err(Failure::refused(
        format!("no module of the process has a function {wanted}{hint}"),
        "stripped binaries keep only exported names: install the debug symbols, or name the function by --address",
    ))
}

fn way_out(error: &LookupError, wanted: &str) -> String {
    match error {
        LookupError::Ambiguous { .. } => format!("say which one: --function FILE.c:{wanted}, or --address ADDRESS"),
        LookupError::Ifunc { .. } => {
            "an IFUNC stands for several implementations: name the one that is in use".to_owned()
        }
        _ => "name another function".to_owned(),
    }
}

/// Bytes between functions, which nobody executes.
fn is_padding(bytes: &[u8]) -> bool {
    let mut decoder = iced_x86::Decoder::new(64, bytes, iced_x86::DecoderOptions::NONE);
    let mut rest = decoder.iter();
    // The last no-op may go on behind what a jump needs.
    rest.all(|i| {
        matches!(i.mnemonic(), iced_x86::Mnemonic::Nop | iced_x86::Mnemonic::Int3 | iced_x86::Mnemonic::INVALID)
    }) && matches!(bytes.first(), Some(0x90 | 0xcc | 0x66 | 0x0f))
}

/// Whether the function's entry can carry a jump.
fn check(process: &TargetProcess, module: &Module, planned: &PlannedFunction) -> Result<(), Failure> {
    let name = &planned.name;
    let function = &planned.function;
    let size = usize::try_from(function.size).unwrap_or(usize::MAX).min(1 << 24);
    let file = module.image.bytes_at(function.address, size.max(JUMP_LENGTH)).ok_or_else(|| {
        Failure::refused(format!("the code of {name} lies outside its file {}", module.path), "report this")
    })?;
    if size < JUMP_LENGTH && !is_padding(&file[size..JUMP_LENGTH]) {
        return Err(Failure::refused(
            format!("{name} is too short to be replaced: {size} bytes, and a jump needs {JUMP_LENGTH}"),
            "replace the functions that call it",
        ));
    }
    let window = planned.entry..planned.entry.offset(JUMP_LENGTH as i64);
    if let Some(from) = prologue::branches_into_window(&file[..size], planned.entry, window) {
        return Err(Failure::refused(
            format!("{name} can't be replaced: its code at {from} jumps back into its first {JUMP_LENGTH} bytes"),
            "replace the functions that call it",
        ));
    }
    // What runs must be what the file says, but for our own jumps, which the exchange of pages compares.
    let patched = process.book.ledger.patches.iter().flat_map(|p| &p.functions).any(|f| f.entry == planned.entry);
    let now = process.memory.bytes(planned.entry, size).map_err(|error| super::process::gone(process.pid, error))?;
    let skip = if patched { JUMP_LENGTH.min(size) } else { 0 };
    if let Some(at) = now[skip..].iter().zip(&file[skip..size]).position(|(a, b)| a != b) {
        let at = at + skip;
        return Err(Failure::refused(
            format!(
                "the code of {name} in process {} was changed by someone else at {}: it holds {:#04x}, its file {:#04x}",
                process.pid,
                planned.entry.offset(at as i64),
                now[at],
                file[at]
            ),
            "remove the foreign breakpoint, probe or patch first (debuggers, bpftrace, perf probe), then try again",
        ));
    }
    Ok(())
}
