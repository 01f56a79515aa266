//! Random functions as assembly: what compilers emit and what they don't, with unwind tables that tell the truth.

use crate::random::Random;
use std::fmt::Write;

const WIDE: [&str; 14] =
    ["rax", "rcx", "rdx", "rbx", "rbp", "rsi", "rdi", "r8", "r9", "r10", "r11", "r12", "r13", "r14"];
const NARROW: [&str; 14] =
    ["eax", "ecx", "edx", "ebx", "ebp", "esi", "edi", "r8d", "r9d", "r10d", "r11d", "r12d", "r13d", "r14d"];
const BYTE: [&str; 14] =
    ["al", "cl", "dl", "bl", "bpl", "sil", "dil", "r8b", "r9b", "r10b", "r11b", "r12b", "r13b", "r14b"];
const CONDITIONS: [&str; 16] = ["o", "no", "b", "ae", "e", "ne", "be", "a", "s", "ns", "p", "np", "l", "ge", "le", "g"];

/// One function under construction.
struct Function<'a> {
    random: &'a mut Random,
    text: String,
    index: usize,
    count: usize,
    labels: usize,
    /// Bytes of its frame below the return address, without what it pushes for the moment.
    frame: usize,
    /// Constants that it refers to: jump tables.
    tables: String,
    is_leaf: bool,
}

/// `count` functions and a table of them.
pub fn functions(random: &mut Random, count: usize) -> String {
    let mut all = String::from(".text\n");
    for index in 0..count {
        let is_leaf = random.below(3) == 0 || index + 1 == count;
        let frame = if is_leaf && random.below(2) == 0 { 0 } else { 8 + 16 * random.below(6) };
        let (text, tables) = (String::new(), String::new());
        let mut function = Function { random, text, index, count, labels: 0, frame, tables, is_leaf };
        function.write();
        let Function { text, tables, .. } = function;
        all.push_str(&text);
        all.push_str(&tables);
    }
    all.push_str(".section .data.rel.ro,\"aw\"\n.globl functions\nfunctions:\n");
    (0..count).for_each(|index| writeln!(all, ".quad f{index}").expect("text"));
    writeln!(all, ".section .rodata\n.globl function_count\nfunction_count: .quad {count}\n.data\npointers:")
        .expect("text");
    (0..count).for_each(|index| writeln!(all, ".quad f{index}").expect("text"));
    all.push_str(".section .note.GNU-stack,\"\",@progbits\n");
    all
}

impl Function<'_> {
    fn line(&mut self, line: &str) {
        self.text.push_str(line);
        self.text.push('\n');
    }

    fn pick<'b>(&mut self, from: &[&'b str]) -> &'b str {
        from[self.random.below(from.len())]
    }

    fn label(&mut self) -> String {
        self.labels += 1;
        format!(".Lf{}_{}", self.index, self.labels)
    }

    /// A memory operand that is there.
    fn memory(&mut self) -> String {
        match self.random.below(5) {
            // Sixteen bytes from there on are its own.
            0 if self.is_leaf => format!("{}(%rsp)", -8 * (2 + self.random.below(15)) as i64),
            0 | 1 if self.frame >= 16 => format!("{}(%rsp)", 8 * self.random.below(self.frame / 8 - 1)),
            2 => format!("data+{}(%rip)", 16 * self.random.below(500)),
            _ => format!("{}(%r15)", 16 * self.random.below(400) as i64 - 3200),
        }
    }

    fn write(&mut self) {
        let (index, frame) = (self.index, self.frame);
        if self.random.below(3) == 0 {
            self.line(".p2align 4");
        }
        self.line(&format!(".globl f{index}\n.type f{index},@function\nf{index}:\n.cfi_startproc"));
        if self.random.below(3) == 0 {
            self.line("endbr64");
        }
        let early = (self.random.below(3) == 0).then(|| self.label());
        if let Some(early) = &early {
            self.line(&format!("test %rdi,%rdi\njs {early}"));
        }
        if frame > 0 {
            self.line(&format!("sub ${frame},%rsp\n.cfi_adjust_cfa_offset {frame}"));
        }
        // What lies on the stack from before is not the same with guards.
        (0..frame / 8).for_each(|slot| self.line(&format!("movq $0,{}(%rsp)", 8 * slot)));
        if self.is_leaf {
            (1..=16).for_each(|slot| self.line(&format!("movq $0,-{}(%rsp)", 8 * slot)));
        }
        for _ in 0..2 + self.random.below(18) {
            self.piece();
        }
        if frame > 0 {
            self.line(&format!("add ${frame},%rsp\n.cfi_adjust_cfa_offset -{frame}"));
        }
        match self.random.below(8) {
            0 if index + 1 < self.count => {
                let to = self.later();
                self.line(&format!("jmp f{to}"));
            }
            1 => self.line("rep ret"),
            _ => self.line("ret"),
        }
        if let Some(early) = early {
            self.line(&format!("{early}:"));
            if self.random.below(2) == 0 {
                self.plain();
            }
            self.line("ret");
        }
        self.line(&format!(".cfi_endproc\n.size f{index},.-f{index}"));
    }

    /// A function that is called by this one: always a later one, so that all comes to an end.
    fn later(&mut self) -> usize {
        let span = (self.count - self.index - 1).min(6);
        self.index + 1 + self.random.below(span)
    }

    fn piece(&mut self) {
        match self.random.below(24) {
            0 if !self.is_leaf => {
                let to = self.later();
                self.line(&format!("call f{to}"));
            }
            1 if !self.is_leaf => self.indirect_call(),
            2 | 3 => {
                let over = self.label();
                let condition = self.pick(&CONDITIONS);
                self.line(&format!("j{condition} {over}"));
                for _ in 0..1 + self.random.below(3) {
                    self.plain();
                }
                self.line(&format!("{over}:"));
            }
            4 => self.repeat(),
            5 => self.table(),
            6 => {
                let register = self.pick(&WIDE);
                // The operand lies deeper while something is pushed.
                if self.is_leaf && self.frame == 0 {
                    self.plain();
                } else {
                    self.line(&format!("push %{register}\n.cfi_adjust_cfa_offset 8"));
                    let other = self.pick(&WIDE);
                    self.line(&format!("pop %{other}\n.cfi_adjust_cfa_offset -8"));
                }
            }
            7 => self.string(),
            8 => self.line("mov $39,%eax\nsyscall\nxor %eax,%eax\nmov %eax,%ecx\nmov %eax,%r11d"),
            9 => {
                let jump = self.pick(&["jrcxz", "jecxz", "loop", "loope", "loopne"]);
                let over = self.label();
                self.line(&format!("{jump} {over}"));
                self.plain();
                self.line(&format!("{over}:"));
            }
            10 if self.random.below(30) == 0 => {
                let fault =
                    self.pick(&["mov $16,%eax\nmov (,%rax,8),%rbx", "xor %ecx,%ecx\ndiv %ecx", "ud2", "mov %eax,8"]);
                self.line(fault);
            }
            _ => self.plain(),
        }
    }

    fn indirect_call(&mut self) {
        let to = self.later();
        let slot = 8 * to;
        match self.random.below(4) {
            0 => self.line(&format!("call *pointers+{slot}(%rip)")),
            1 => {
                let register = self.pick(&WIDE);
                self.line(&format!("lea f{to}(%rip),%{register}\ncall *%{register}"));
            }
            2 => {
                let register = self.pick(&["rax", "rcx", "r11", "rdx", "r12"]);
                self.line(&format!("lea pointers(%rip),%{register}\ncall *{slot}(%{register})"));
            }
            _ => {
                let (register, index) = if self.random.below(2) == 0 { ("rcx", "r11") } else { ("r11", "rcx") };
                self.line(&format!(
                    "lea pointers(%rip),%{register}\nmov ${to},%{index}\ncall *(%{register},%{index},8)"
                ));
            }
        }
    }

    fn repeat(&mut self) {
        let (again, at) = (self.label(), 16 * self.random.below(100));
        let times = 1 + self.random.below(5);
        self.line(&format!("movl ${times},{at}(%r15)\n{again}:"));
        for _ in 0..1 + self.random.below(3) {
            self.register_only();
        }
        self.line(&format!("decl {at}(%r15)\njnz {again}"));
    }

    /// `switch` as compilers write it: distances from the table, or a table of addresses.
    fn table(&mut self) {
        let (table, end) = (self.label(), self.label());
        let register = self.pick(&["rax", "rdx", "r8", "r10"]);
        let index = self.pick(&["rsi", "rdi", "rbx"]);
        let cases: Vec<String> = (0..4).map(|_| self.label()).collect();
        let is_relative = self.random.below(2) == 0;
        self.line(&format!("and $3,%{index}\nlea {table}(%rip),%{register}"));
        if is_relative {
            self.line(&format!("movslq (%{register},%{index},4),%{index}\nadd %{register},%{index}\njmp *%{index}"));
        } else if self.random.below(2) == 0 {
            self.line(&format!("jmp *(%{register},%{index},8)"));
        } else {
            self.line(&format!("mov (%{register},%{index},8),%{register}\nnotrack jmp *%{register}"));
        }
        for case in &cases {
            self.line(&format!("{case}:"));
            self.plain();
            if self.random.below(3) > 0 {
                self.line(&format!("jmp {end}"));
            }
        }
        self.line(&format!("{end}:"));
        let section =
            if is_relative { ".section .rodata\n.p2align 2" } else { ".section .data.rel.ro,\"aw\"\n.p2align 3" };
        let mut rows = format!("{section}\n{table}:\n");
        for case in &cases {
            let row = if is_relative { format!(".long {case}-{table}") } else { format!(".quad {case}") };
            rows.push_str(&row);
            rows.push('\n');
        }
        self.tables.push_str(&rows);
        self.tables.push_str(".text\n");
    }

    fn string(&mut self) {
        let (from, to, length) = (16 * self.random.below(100), 16 * self.random.below(100), self.random.below(40));
        let operation =
            self.pick(&["rep movsb", "rep stosb", "repe cmpsb", "repne scasb", "rep stosq", "lodsb", "movsl"]);
        self.line(&format!("lea {from}(%r15),%rsi\nlea {to}(%r15),%rdi\nmov ${length},%ecx"));
        if self.random.below(8) == 0 {
            self.line(&format!("std\n{operation}\ncld"));
        } else {
            self.line(&format!("cld\n{operation}"));
        }
    }

    fn register_only(&mut self) {
        let (a, b) = (self.random.below(14), self.random.below(14));
        let operation = self.pick(&["add", "adc", "sub", "sbb", "xor", "and", "or", "cmp", "test", "mov"]);
        let text = match self.random.below(3) {
            0 => format!("{operation}q %{},%{}", WIDE[a], WIDE[b]),
            1 => format!("{operation}l %{},%{}", NARROW[a], NARROW[b]),
            _ => format!("{operation}b %{},%{}", BYTE[a], BYTE[b]),
        };
        self.line(&text);
    }

    /// An instruction that goes on to the next.
    fn plain(&mut self) {
        let (a, b) = (self.random.below(14), self.random.below(14));
        let (wide, other, narrow, byte) = (WIDE[a], WIDE[b], NARROW[a], BYTE[a]);
        let memory = self.memory();
        let number = self.random.next() as i32 >> self.random.below(32);
        let condition = self.pick(&CONDITIONS);
        let (x, y) = (self.random.below(16), self.random.below(16));
        let operation = self.pick(&["add", "adc", "sub", "sbb", "xor", "and", "or", "cmp"]);
        let text = match self.random.below(34) {
            0..=4 => return self.register_only(),
            5 => format!("{operation}q ${number},%{wide}"),
            6 => format!("{operation}q {memory},%{wide}"),
            7 => format!("{operation}q %{wide},{memory}"),
            8 => format!("{operation}l ${number},{memory}"),
            9 => format!("mov %{wide},{memory}"),
            10 => format!("mov {memory},%{wide}"),
            11 => format!("movzbl {memory},%{narrow}"),
            12 => format!("movslq {memory},%{wide}"),
            13 => format!("lea {}(%{wide},%{other},4),%{other}", number >> 8),
            14 => format!("lea {memory},%{wide}\nmov $0,%{narrow}"),
            15 => format!("imul %{wide},%{other}"),
            16 => format!("shl ${},%{wide}", number & 63),
            17 => format!("sar %cl,%{wide}"),
            18 => format!("rol ${},%{narrow}", number & 31),
            19 => format!("cmov{condition} %{wide},%{other}"),
            20 => format!("set{condition} %{byte}"),
            21 => format!("bswap %{wide}"),
            22 => format!("xchg %{wide},%{other}"),
            23 => format!("lock xadd %{wide},{memory}"),
            24 => format!("lock cmpxchg %{wide},{memory}"),
            25 => format!("movdqu %xmm{x},{memory}"),
            26 => format!("movdqu {memory},%xmm{x}"),
            27 => format!("paddd %xmm{x},%xmm{y}\npshufd $27,%xmm{y},%xmm{x}"),
            28 => format!("cvtsi2sd %{wide},%xmm{x}\nmulsd %xmm{x},%xmm{y}"),
            29 => format!("vpaddq %xmm{x},%xmm{y},%xmm{x}"),
            30 => "fld1\nfldpi\nfaddp\nfstp %st(0)".to_owned(),
            31 => "stc".to_owned(),
            32 => format!("incq {memory}\nnotl %{narrow}"),
            _ => format!("movabs $0x{:x},%{wide}", self.random.next()),
        };
        self.line(&text);
    }
}
