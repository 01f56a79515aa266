//! Why bytes are no image that we can use.

/// Why bytes are no image that we can use.
#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    /// Not ELF, or damaged.
    #[error("{name} is no ELF file, or damaged: {reason}")]
    Damaged {
        /// Its name.
        name: String,
        /// What the parser met.
        reason: String,
    },
    /// Another machine, or 32 bits.
    #[error("{name} is not an x86-64 executable or library: {}", foreign(*class, *machine, *kind))]
    Foreign {
        /// Its name.
        name: String,
        /// EI_CLASS.
        class: u8,
        /// e_machine.
        machine: u16,
        /// e_type.
        kind: u16,
    },
    /// A debug file of another build.
    #[error(
        "the debug file belongs to another build of {0}: install the one for the build-id that `asap status` shows"
    )]
    OtherBuild(String),
}

/// What a file is that is not for us, in words (gABI, "ELF Header").
fn foreign(class: u8, machine: u16, kind: u16) -> String {
    let machine = match machine {
        3 => "x86".to_owned(),
        40 => "Arm".to_owned(),
        62 if class == 1 => "x32".to_owned(),
        62 => "x86-64".to_owned(),
        183 => "AArch64".to_owned(),
        243 => "RISC-V".to_owned(),
        247 => "eBPF".to_owned(),
        other => format!("machine {other}"),
    };
    let class = if class == 1 { "32-bit" } else { "64-bit" };
    let kind = match kind {
        1 => "object file",
        2 => "executable",
        3 => "shared object",
        4 => "core dump",
        _ => "file of unknown type",
    };
    format!("it is a {class} {machine} {kind}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_foreign_file_is_called_by_its_name() {
        let text = |class, machine, kind| ImageError::Foreign { name: "f".into(), class, machine, kind }.to_string();
        assert!(text(1, 3, 2).ends_with("it is a 32-bit x86 executable"));
        assert!(text(2, 62, 1).ends_with("it is a 64-bit x86-64 object file"));
        assert!(text(2, 4711, 3).ends_with("it is a 64-bit machine 4711 shared object"));
    }
}
