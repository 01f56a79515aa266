//! `asap sandbox dump`: a function's native code beside what runs instead of it.

use super::Target;
use crate::{
    address::TargetAddr,
    cli::{
        client::{ask, unexpected},
        context::{Global, require_root},
        text::printable,
    },
    report::{CodeBytes, CodeDump, CodeFragment, Failure, FailureKind, Reply, Request, SandboxAction, SandboxRequest},
};
use iced_x86::{Decoder, DecoderOptions, Formatter, GasFormatter, Instruction};
use serde::Serialize;

/// Width of the column with native code.
const COLUMN: usize = 44;

/// See the module.
#[derive(Debug, clap::Args)]
pub struct Dump {
    #[command(flatten)]
    target: Target,
    /// The function: a name as for `asap patch`, or an address in the process (0x...).
    #[arg(long, short, value_name = "NAME")]
    function: String,
}

impl Dump {
    pub fn run(self, global: &Global) -> Result<(), Failure> {
        require_root("sandbox dump")?;
        let request = SandboxRequest {
            pid: self.target.pid,
            action: SandboxAction::Dump,
            function: Some(self.function),
            ..SandboxRequest::default()
        };
        let reply = ask(&global.socket, &Request::Sandbox(request))?;
        let Reply::Sandbox(report) = &reply else { return Err(unexpected(&reply)) };
        let Some(dump) = &report.dump else {
            return Err(Failure {
                kind: FailureKind::Failed,
                ..Failure::refused("the agent sent no code", "use the `asap` program that belongs to the agent")
            });
        };
        global.show(&Disassembled::of(dump), || text(dump))
    }
}

/// One instruction, disassembled.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
struct Line {
    at: TargetAddr,
    /// Its bytes, hex.
    bytes: String,
    /// In the syntax of the GNU assembler.
    text: String,
}

/// The dump as JSON: every instruction as text.
#[derive(Serialize)]
struct Disassembled<'a> {
    pid: i32,
    function: &'a str,
    module: &'a str,
    native: Vec<Line>,
    /// One entry per native instruction; none where what is in its place belongs to the one before.
    translated: Option<Vec<Option<Line>>>,
    fragments: Vec<DisassembledFragment<'a>>,
}

#[derive(Serialize)]
struct DisassembledFragment<'a> {
    of: TargetAddr,
    kind: &'a str,
    code: Vec<Line>,
}

impl<'a> Disassembled<'a> {
    fn of(dump: &'a CodeDump) -> Self {
        let native = lines(&dump.native);
        let beside = dump.translated.as_ref().map(|translated| beside(&native, translated));
        let fragment = |fragment: &'a CodeFragment| DisassembledFragment {
            of: fragment.of,
            kind: &fragment.kind,
            code: lines(&fragment.code),
        };
        Self {
            pid: dump.pid,
            function: &dump.function,
            module: &dump.module,
            translated: beside,
            native,
            fragments: dump.fragments.iter().map(fragment).collect(),
        }
    }
}

/// All instructions of `code`; what is none is shown as bytes.
fn lines(code: &CodeBytes) -> Vec<Line> {
    let mut decoder = Decoder::with_ip(64, &code.bytes, code.at.0, DecoderOptions::NONE);
    let mut found = Vec::new();
    while decoder.can_decode() {
        let from = decoder.position();
        let instruction = decoder.decode();
        if instruction.is_invalid() && decoder.set_position(from + 1).is_ok() {
            let at = code.at.0.wrapping_add(from as u64);
            decoder.set_ip(at.wrapping_add(1));
            let byte = code.bytes.get(from).copied().unwrap_or_default();
            found.push(Line { at: TargetAddr(at), bytes: format!("{byte:02x}"), text: format!(".byte {byte:#04x}") });
            continue;
        }
        found.push(line(&instruction, code.bytes.get(from..decoder.position()).unwrap_or_default()));
    }
    found
}

fn line(instruction: &Instruction, bytes: &[u8]) -> Line {
    let mut formatter = GasFormatter::new();
    let options = formatter.options_mut();
    options.set_uppercase_hex(false);
    options.set_branch_leading_zeros(false);
    options.set_rip_relative_addresses(true);
    let mut text = String::new();
    formatter.format(instruction, &mut text);
    Line { at: TargetAddr(instruction.ip()), bytes: bytes.iter().map(|byte| format!("{byte:02x}")).collect(), text }
}

/// For each native instruction what is at its place in `translated`; none if that is the rest of a longer one, or of no meaning.
fn beside(native: &[Line], translated: &CodeBytes) -> Vec<Option<Line>> {
    let mut until = 0;
    let mut found = Vec::new();
    for own in native {
        let offset = own.at.0.wrapping_sub(translated.at.0) as usize;
        let rest = translated.bytes.get(offset..).unwrap_or_default();
        if own.at.0 < until || rest.is_empty() {
            found.push(None);
            continue;
        }
        let instruction = Decoder::with_ip(64, rest, own.at.0, DecoderOptions::NONE).decode();
        let length = instruction.len().max(1);
        // The native instruction itself may be no instruction.
        let shown = match instruction.is_invalid() {
            true => Line { text: format!(".byte {:#04x}", rest[0]), bytes: format!("{:02x}", rest[0]), at: own.at },
            false => line(&instruction, &rest[..length.min(rest.len())]),
        };
        if shown.bytes != own.bytes {
            until = own.at.0.wrapping_add(length as u64);
        }
        found.push(Some(shown));
    }
    found
}

fn text(dump: &CodeDump) -> String {
    let native = lines(&dump.native);
    let mut text = format!("{} of {}, process {}\n", printable(&dump.function), printable(&dump.module), dump.pid);
    let Some(translated) = &dump.translated else {
        text.push_str("  it has not run in the sandbox; this is the file's code\n");
        for line in native {
            text.push_str(&format!("  {:x}  {}\n", line.at.0, line.text));
        }
        return text;
    };
    for (native, beside) in native.iter().zip(beside(&native, translated)) {
        let beside = match beside {
            Some(same) if same.bytes == native.bytes => String::new(),
            Some(other) => format!("| {}", other.text),
            None => "| .".to_owned(),
        };
        text.push_str(format!("  {:x}  {:COLUMN$} {beside}", native.at.0, native.text).trim_end());
        text.push('\n');
    }
    for fragment in &dump.fragments {
        text.push_str(&format!("  fragment of {:x}: {}\n", fragment.of.0, printable(&fragment.kind)));
        for line in lines(&fragment.code) {
            text.push_str(&format!("    {:x}  {}\n", line.at.0, line.text));
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn example() -> CodeDump {
        let code = |at: u64, bytes: &[u8]| CodeBytes { at: TargetAddr(at), bytes: bytes.to_vec() };
        CodeDump {
            pid: 7,
            function: "serve".to_owned(),
            module: "/usr/sbin/web".to_owned(),
            // push rbx; mov rbx, rdi; call *rax; pop rbx; ret
            native: code(0x1000, &[0x53, 0x48, 0x89, 0xfb, 0xff, 0xd0, 0x5b, 0xc3]),
            // push rbx; mov rbx, rdi; then a jump over the rest.
            translated: Some(code(0x1000, &[0x53, 0x48, 0x89, 0xfb, 0xe9, 0xf7, 0x0f, 0xc3])),
            fragments: vec![CodeFragment {
                of: TargetAddr(0x1004),
                kind: "indirect call".to_owned(),
                code: code(0x2000, &[0xff, 0xd0, 0x5b, 0xc3, 0x06]),
            }],
        }
    }

    #[test]
    fn native_code_is_shown_beside_what_runs() {
        let mut dump = example();
        // The jump's last byte would lie behind the function.
        dump.native.bytes.push(0x90);
        dump.translated.as_mut().expect("it ran").bytes = vec![0x53, 0x48, 0x89, 0xfb, 0xe9, 0xf7, 0x0f, 0x00, 0x00];
        assert_eq!(
            text(&dump),
            "\
serve of /usr/sbin/web, process 7
  1000  push %rbx
  1001  mov %rdi,%rbx
  1004  call *%rax                                   | jmp 0x2000
  1006  pop %rbx                                     | .
  1007  ret                                          | .
  1008  nop                                          | .
  fragment of 1004: indirect call
    2000  call *%rax
    2002  pop %rbx
    2003  ret
    2004  .byte 0x06
"
        );
        let json = serde_json::to_value(Disassembled::of(&dump)).expect("JSON");
        assert_eq!(json["native"][2]["text"], "call *%rax");
        assert_eq!(json["translated"][2]["bytes"], "e9f70f0000");
        assert!(json["translated"][3].is_null());
        assert_eq!(json["fragments"][0]["code"][0]["at"], serde_json::to_value(TargetAddr(0x2000)).expect("JSON"));
    }

    #[test]
    fn a_function_that_has_not_run_is_shown_as_it_is() {
        let dump = CodeDump { translated: None, fragments: Vec::new(), ..example() };
        assert!(text(&dump).contains("has not run") && text(&dump).contains("  1007  ret\n"), "{}", text(&dump));
    }

    proptest! {
        #[test]
        fn any_bytes_can_be_shown(
            native in prop::collection::vec(any::<u8>(), 0..60),
            translated in prop::collection::vec(any::<u8>(), 0..60),
            at in any::<u64>(),
        ) {
            let at = TargetAddr(at);
            let dump = CodeDump {
                native: CodeBytes { at, bytes: native.clone() },
                translated: Some(CodeBytes { at, bytes: translated.clone() }),
                fragments: vec![CodeFragment { of: at, kind: String::new(), code: CodeBytes { at, bytes: translated } }],
                ..example()
            };
            let shown = text(&dump);
            prop_assert!(shown.lines().count() > dump.fragments.len());
            let all: usize = lines(&dump.native).iter().map(|line| line.bytes.len() / 2).sum();
            prop_assert!(all <= native.len() && native.len() - all < 16);
            serde_json::to_string(&Disassembled::of(&dump)).expect("JSON");
        }
    }
}
