//! Why a patch object is refused. One enum for the whole module: what a caller can do about it is in the message.

use thiserror::Error;

/// A patch object can't be used as it is. Nothing in the target was touched.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub enum PatchError {
    /// No file was given.
    #[error("a patch needs at least one object file; compile the new functions with `cc -O2 -fPIC -c` and name the .o")]
    NoFiles,
    /// A file, or all together, are larger than any patch.
    #[error("{file}: {size} bytes are too much for a patch (the limit is {limit}); leave out what does not change")]
    TooLarge {
        /// The file.
        file: String,
        /// Its size, or that of all files up to it.
        size: u64,
        /// What is accepted.
        limit: u64,
    },
    /// The file is no ELF object.
    #[error("{file}: not an object file ({found}); compile the patch with `cc -O2 -fPIC -c` and without -flto")]
    NotAnObject {
        /// The file.
        file: String,
        /// What it looks like.
        found: String,
    },
    /// ELF, but for another machine.
    #[error("{file}: made for {found}, but patches run on 64-bit x86; compile it for x86-64")]
    Architecture {
        /// The file.
        file: String,
        /// What the header says.
        found: String,
    },
    /// ELF, but linked already.
    #[error("{file}: is {found}, not a relocatable object; give the .o file that `cc -c` makes, before linking")]
    NotRelocatable {
        /// The file.
        file: String,
        /// What the header says.
        found: String,
    },
    /// Only the compiler's intermediate form is inside.
    #[error("{file}: holds no machine code, only data for link-time optimisation; compile it again with -fno-lto")]
    LinkTimeOptimisation {
        /// The file.
        file: String,
    },
    /// Headers contradict each other, or point outside of the file.
    #[error("{file}: damaged or truncated object file: {problem}; compile it again")]
    Malformed {
        /// The file.
        file: String,
        /// What is wrong.
        problem: String,
    },
    /// Two strong definitions of one symbol.
    #[error("`{symbol}` is defined in {first} and again in {second}; keep one of them, or make them static")]
    DuplicateDefinition {
        /// The symbol.
        symbol: String,
        /// File of the first definition.
        first: String,
        /// File of the second definition.
        second: String,
    },
    /// Code that would have to run before anything else.
    #[error(
        "{file}: section {section} asks for constructors or destructors, which a patch can't have; \
         use the hooks ASAP_PRE_APPLY, ASAP_POST_APPLY, ASAP_PRE_REVERT, ASAP_POST_REVERT of asap-patch.h"
    )]
    Constructor {
        /// The file.
        file: String,
        /// The section.
        section: String,
    },
    /// An IFUNC is defined.
    #[error(
        "{file}: `{symbol}` is an IFUNC; a patch can call IFUNCs of the target but not define any: define a plain function"
    )]
    IndirectFunction {
        /// The file.
        file: String,
        /// The symbol.
        symbol: String,
    },
    /// A thread-local variable is defined.
    #[error(
        "{file}: `{symbol}` is a new thread-local variable; threads that run already have no room for it. \
         Use the target's own thread-local variables (declare them extern), pthread_getspecific, or a table keyed by thread"
    )]
    ThreadLocalDefinition {
        /// The file.
        file: String,
        /// The variable, or the section.
        symbol: String,
    },
    /// A relocation that this linker does not know.
    #[error(
        "{file}: section {section} has a relocation of type {kind}, which is not supported; compile with gcc or clang for generic x86-64 (-fPIC)"
    )]
    UnknownRelocation {
        /// The file.
        file: String,
        /// The section.
        section: String,
        /// Name or number of the relocation type.
        kind: String,
    },
    /// A thread-local access that is not one of the psABI's sequences.
    #[error(
        "{file}: section {section}+{offset:#x}: the instructions around {kind} are not a thread-local access as the \
         psABI defines it; compile with -ftls-model=initial-exec"
    )]
    TlsSequence {
        /// The file.
        file: String,
        /// The section.
        section: String,
        /// Offset in it.
        offset: u64,
        /// The relocation type.
        kind: String,
    },
    /// An alignment that a patch can't have.
    #[error("{file}: {what} wants to be aligned to {alignment} bytes; at most 4096 can be had")]
    Alignment {
        /// The file.
        file: String,
        /// Section or symbol.
        what: String,
        /// The wish.
        alignment: u64,
    },
    /// Laid out, the patch is larger than anything that fits near a module.
    #[error(
        "the patch's {segment} would take {size} bytes (the limit is {limit}); make large arrays pointers that a hook allocates"
    )]
    SegmentTooLarge {
        /// code, rodata or data.
        segment: &'static str,
        /// Bytes.
        size: u64,
        /// What is accepted.
        limit: u64,
    },
    /// A declaration made by asap-patch.h does not make sense.
    #[error("{file}: section {section}: {problem}; use the macros of asap-patch.h")]
    Declaration {
        /// The file.
        file: String,
        /// The section.
        section: String,
        /// What is wrong.
        problem: String,
    },
    /// A name stands for more than one function.
    #[error("`{symbol}` is the name of more than one static function of the patch; rename one of them")]
    AmbiguousSymbol {
        /// The name.
        symbol: String,
    },
    /// Something refers to a section that was dropped.
    #[error(
        "{file}: section {section} refers to {what}, which is not part of the patch; compile all files of the patch with the same compiler and flags"
    )]
    DroppedSection {
        /// The file.
        file: String,
        /// The section that refers.
        section: String,
        /// What it refers to.
        what: String,
    },
    /// Names that neither the patch nor the target defines.
    #[error(
        "not found in the patch or the target: {}; check the spelling and the target's version, or declare static names with \
         ASAP_IMPORT(name, \"file.c:name\")", names.join(", ")
    )]
    Unresolved {
        /// All of them.
        names: Vec<String>,
    },
    /// The target has the symbol, but of another kind.
    #[error(
        "`{symbol}` is used as {wanted} by the patch, but the target has {found} of that name; correct the declaration"
    )]
    WrongKind {
        /// The symbol.
        symbol: String,
        /// What the patch expects.
        wanted: &'static str,
        /// What the target has.
        found: &'static str,
    },
    /// A value does not fit its field.
    #[error("{file}: section {section}+{offset:#x}: {kind} to `{symbol}` does not reach (value {value:#x}); {way_out}")]
    Overflow {
        /// The file.
        file: String,
        /// The section.
        section: String,
        /// Offset in it.
        offset: u64,
        /// The relocation type.
        kind: &'static str,
        /// What it refers to.
        symbol: String,
        /// The value that does not fit.
        value: i64,
        /// How to compile instead.
        way_out: &'static str,
    },
    /// The caller's bases do not fit the layout.
    #[error(
        "the {segment} of the patch can't be placed at {base:#x}: it must be aligned to {alignment} bytes and end within the address space"
    )]
    Base {
        /// code, rodata or data.
        segment: &'static str,
        /// The address that was asked for.
        base: u64,
        /// What the layout wants.
        alignment: u64,
    },
}
