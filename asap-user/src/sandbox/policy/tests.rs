use super::*;
use proptest::prelude::*;

const WEB: &str = r#"
guards = ["shadow-stack", "cfi", "nx", "syscalls"]
on-exec = "stay"
fail = "closed"

[actions]
cfi = "log"
nx = "stop"

[syscalls]
default = "allow"

[[syscalls.rules]]
calls = ["socket"]
when = [{ argument = 0, bits = 32, equals = [1, 2, 10] }]
action = "allow"

[[syscalls.rules]]
calls = ["execve", "execveat", "socket"]
action = "kill"

[[syscalls.rules]]
calls = ["mprotect"]
when = [{ argument = 2, mask = 6, equals = 6 }]
action = "errno EACCES"

[[syscalls.rules]]
calls = ["lseek"]
when = [{ argument = 1, from = -4096, to = "0xffffffffffffffff" }, { argument = 2, bits = 32, differs = 2 }]
action = "log"
"#;

fn read(text: &str) -> Policy {
    Policy::read(text).unwrap_or_else(|error| panic!("{error}"))
}

fn number(name: &str) -> u64 {
    let call: SystemCall = name.parse().expect(name);
    call.0.into()
}

#[test]
fn a_policy_is_read() {
    let policy = read(WEB);
    assert_eq!(policy.guards, Guard::ALL);
    assert_eq!((policy.on_exec, policy.fail), (OnExec::Stay, Fail::Closed));
    let actions = [Guard::ShadowStack, Guard::Cfi, Guard::Nx].map(|guard| policy.action(guard));
    assert_eq!(actions, [Action::Kill, Action::Log, Action::Stop]);
    let syscalls = policy.syscalls.as_ref().expect("they are there");
    assert_eq!(syscalls.rules.len(), 4);
    assert_eq!(syscalls.rules[2].action, Verdict::Errno(libc::EACCES as u16));
    assert_eq!(syscalls.rules[3].when[0].from, Some(Value(-4096_i64 as u64)));
    assert_eq!(syscalls.rules[3].when[0].to, Some(Value(u64::MAX)));
    assert_eq!(syscalls.rules[3].when[1].differs, Some(vec![Value(2)]));
}

#[test]
fn the_first_rule_that_fits_decides() {
    let syscalls = read(WEB).syscalls.expect("they are there");
    let compiled = Compiled::of(&syscalls);
    let judge = |name: &str, arguments: [u64; 6]| compiled.judge(number(name), &arguments);
    let none = [0; 6];
    assert_eq!(judge("read", none), Decision::Allow);
    assert_eq!(judge("execve", none), Decision::Do(Action::Kill));
    assert_eq!(judge("socket", [10, 0, 0, 0, 0, 0]), Decision::Allow);
    assert_eq!(judge("socket", [17, 0, 0, 0, 0, 0]), Decision::Do(Action::Kill), "no other address families");
    // The kernel takes an int: what is above it does not matter.
    assert_eq!(judge("socket", [0xdead_beef_0000_0002, 0, 0, 0, 0, 0]), Decision::Allow);
    assert_eq!(judge("mprotect", [0, 0, 7, 0, 0, 0]), Decision::Errno(libc::EACCES as u16));
    assert_eq!(judge("mprotect", [0, 0, 5, 0, 0, 0]), Decision::Allow);
    assert_eq!(judge("lseek", [3, -1_i64 as u64, 0, 0, 0, 0]), Decision::Do(Action::Log));
    assert_eq!(judge("lseek", [3, -1_i64 as u64, 2, 0, 0, 0]), Decision::Allow);
    assert_eq!(judge("lseek", [3, 4096, 0, 0, 0, 0]), Decision::Allow);

    let asks = |name: &str| compiled.table()[number(name) as usize];
    let asked = ["execve", "execveat", "socket", "mprotect", "lseek"].map(asks);
    assert_eq!(asked, [1; 5]);
    assert_eq!(["read", "write", "exit_group", "rt_sigreturn", "futex"].map(asks), [0; 5]);
}

#[test]
fn what_a_strict_policy_does_not_name_is_forbidden_but_what_every_program_needs() {
    let strict = SyscallPolicy {
        default: Verdict::Do(Action::Kill),
        rules: vec![Rule { calls: vec!["read".parse().expect("known")], when: Vec::new(), action: Verdict::Allow }],
    };
    let compiled = Compiled::of(&strict);
    let allowed: Vec<usize> = (0..1 << 16).filter(|&number| compiled.table()[number] == 0).collect();
    let mut expected =
        ["read", "rt_sigreturn", "exit", "exit_group", "restart_syscall"].map(|name| number(name) as usize);
    expected.sort_unstable();
    assert_eq!(allowed, expected);
    assert_eq!(compiled.judge(number("exit_group"), &[0; 6]), Decision::Allow);
    assert_eq!(compiled.judge(9999, &[0; 6]), Decision::Do(Action::Kill));
    // By name they can be forbidden.
    let rule = Rule { calls: vec!["exit".parse().expect("known")], when: Vec::new(), action: Verdict::Errno(1) };
    let compiled = Compiled::of(&SyscallPolicy { rules: vec![rule], ..strict });
    assert_eq!(compiled.judge(number("exit"), &[0; 6]), Decision::Errno(1));
}

#[test]
fn there_is_no_way_around_by_other_numbers() {
    let policy = read(
        "guards = [\"syscalls\"]\n[syscalls]\ndefault = \"allow\"\n[[syscalls.rules]]\ncalls = [\"execve\"]\naction = \"kill\"\n",
    );
    let compiled = Compiled::of(&policy.syscalls.expect("they are there"));
    let execve = number("execve");
    // The kernel looks at the lower half of rax.
    assert_eq!(compiled.judge(execve | 0xffff_ffff_0000_0000, &[0; 6]), Decision::Do(Action::Kill));
    // The x32 variants, marked or not.
    for x32 in [0x4000_0000 | execve, 0x4000_0000 | 520, 520, 545] {
        assert_eq!(compiled.judge(x32, &[0; 6]), Decision::Errno(libc::ENOSYS as u16), "{x32:#x}");
        assert_eq!(compiled.table()[(x32 & 0xffff) as usize], 1, "{x32:#x}");
    }
}

#[test]
fn errors_name_line_and_key() {
    let broken = [
        ("guards = [\"shadow-stack\"", "line 1"),
        ("", "guards"),
        ("guards = [\"shadow\"]", "unknown variant `shadow`"),
        ("guards = []\n\non-exce = \"stay\"", "line 3"),
        ("guards = []\nfail = \"safe\"", "line 2"),
        ("guards = [\"cfi\", \"cfi\"]", "line 1: guards: `cfi` is there twice"),
        ("guards = [\"cfi\"]\n[actions]\nnx = \"log\"", "line 3: actions.nx: `nx` is not among the guards"),
        ("guards = [\"syscalls\"]\n[actions]\nsyscalls = \"log\"", "line 3: actions.syscalls"),
        ("guards = [\"syscalls\"]", "needs a table [syscalls]"),
        ("guards = []\n[syscalls]\ndefault = \"allow\"", "line 2: syscalls: `syscalls` is not among the guards"),
    ];
    for (text, words) in broken {
        let error = Policy::read(text).expect_err(text).to_string();
        assert!(error.contains(words), "{text}: no `{words}` in: {error}");
    }
    let rules = [
        ("calls = [\"exceve\"]\naction = \"kill\"", "line 5", "`exceve` is no system call"),
        ("calls = []\naction = \"kill\"", "line 5", "it names no call"),
        ("calls = [\"read\"]\naction = \"deny\"", "line 6", "`deny` is no action"),
        ("calls = [\"read\"]\naction = \"errno ENOTHING\"", "line 6", "`ENOTHING` is no error"),
        ("calls = [\"read\"]\naction = \"errno 0\"", "line 6", "0 is no error number"),
        ("calls = [\"read\"]\naction = \"kill\"\nwhen = [{ argument = 6, equals = 1 }]", "line 7", "0 to 5"),
        ("calls = [\"read\"]\naction = \"kill\"\nwhen = [{ argument = 1 }]", "line 7", "nothing is asked"),
        (
            "calls = [\"read\"]\naction = \"kill\"\nwhen = [{ argument = 1, bits = 8, equals = 1 }]",
            "line 7",
            "32 or 64",
        ),
        (
            "calls = [\"read\"]\naction = \"kill\"\nwhen = [{ argument = 1, from = 9, to = 3 }]",
            "line 7",
            "no number is in",
        ),
        (
            "calls = [\"read\"]\naction = \"kill\"\nwhen = [{ argument = 1, mask = 1, equals = 2 }]",
            "line 7",
            "never so",
        ),
        ("calls = [\"read\"]\naction = \"kill\"\nwhen = [{ argument = 1, equals = [] }]", "line 7", "0 values"),
        (
            "calls = [\"read\"]\naction = \"kill\"\nwhen = [{ argument = 1, equals = \"many\" }]",
            "line 7",
            "`many` is no number",
        ),
        ("calls = [\"read\"]\nactoin = \"kill\"", "line 6", "unknown field `actoin`"),
    ];
    for (rule, line, words) in rules {
        let text = format!("guards = [\"syscalls\"]\n[syscalls]\ndefault = \"allow\"\n[[syscalls.rules]]\n{rule}");
        let error = Policy::read(&text).expect_err(rule).to_string();
        assert!(error.contains(line) && error.contains(words), "{rule}: no {line} or `{words}` in: {error}");
    }
    let long = "#".repeat(MAX_TEXT + 1);
    assert!(matches!(Policy::read(&long), Err(PolicyError::TooLong(_))));
}

#[test]
fn calls_have_names_and_newer_ones_numbers() {
    assert_eq!(("read".parse(), "openat2".parse()), (Ok(SystemCall(0)), Ok(SystemCall(437))));
    assert_eq!("60000".parse(), Ok(SystemCall(60000)));
    assert_eq!(SystemCall(60000).to_string(), "60000");
    for wrong in ["", "70000", "-1", "Read", "x32_read"] {
        wrong.parse::<SystemCall>().expect_err(wrong);
    }
    // This system's own headers agree.
    let known: [(&str, libc::c_long); 5] = [
        ("mmap", libc::SYS_mmap),
        ("clone3", libc::SYS_clone3),
        ("rt_sigreturn", libc::SYS_rt_sigreturn),
        ("process_vm_writev", libc::SYS_process_vm_writev),
        ("memfd_create", libc::SYS_memfd_create),
    ];
    for (name, expected) in known {
        assert_eq!(name.parse().map(|call: SystemCall| i64::from(call.0)), Ok(expected), "{name}");
    }
}

#[test]
fn what_was_learned_is_a_policy_that_allows_it() {
    let mut learned = Learned::default();
    assert!(!learned.observe(number("read"), &[3, 0x7fff_0000, 10, 0, 0, 0]), "nothing more to be learned of it");
    assert!(!learned.observe(number("write"), &[1, 0x7fff_0000, 10, 0, 0, 0]));
    assert!(learned.observe(number("socket"), &[2, 1, 0, 0, 0, 0]), "it may be called with others");
    assert!(learned.observe(number("socket"), &[10, 0x80001, 6, 0, 0, 0]));
    let mut other = Learned::default();
    other.observe(number("close"), &[3, 0, 0, 0, 0, 0]);
    other.observe(number("socket"), &[1, 1, 0, 0, 0, 0]);
    for option in 0..20 {
        other.observe(number("prctl"), &[option, 0, 0, 0, 0, 0]);
    }
    learned.merge(&other);
    let policy = learned.policy(Verdict::Do(Action::Kill));
    let text = policy.write().expect("TOML");
    assert_eq!(read(&text), policy, "{text}");
    assert_eq!(
        text,
        r#"guards = ["syscalls"]
on-exec = "leave"
fail = "open"

[syscalls]
default = "kill"

[[syscalls.rules]]
calls = ["read", "write", "close", "prctl"]
action = "allow"

[[syscalls.rules]]
calls = ["socket"]
action = "allow"

[[syscalls.rules.when]]
argument = 0
bits = 32
equals = [1, 2, 10]

[[syscalls.rules.when]]
argument = 1
bits = 32
equals = [1, 524289]

[[syscalls.rules.when]]
argument = 2
bits = 32
equals = [0, 6]
"#
    );
    let compiled = Compiled::of(policy.syscalls.as_ref().expect("they are there"));
    assert_eq!(compiled.judge(number("socket"), &[10, 1, 0, 0, 0, 0]), Decision::Allow);
    assert_eq!(compiled.judge(number("socket"), &[16, 3, 0, 0, 0, 0]), Decision::Do(Action::Kill));
    assert_eq!(compiled.judge(number("prctl"), &[99, 0, 0, 0, 0, 0]), Decision::Allow, "too many to tell apart");
    assert_eq!(compiled.judge(number("execve"), &[0; 6]), Decision::Do(Action::Kill));
}

fn actions() -> impl Strategy<Value = Action> {
    prop_oneof![Just(Action::Log), Just(Action::Kill), Just(Action::Stop)]
}

fn verdicts() -> impl Strategy<Value = Verdict> {
    prop_oneof![Just(Verdict::Allow), (1_u16..=4095).prop_map(Verdict::Errno), actions().prop_map(Verdict::Do)]
}

fn values() -> impl Strategy<Value = Value> {
    prop_oneof![
        (0_u64..8).prop_map(Value),
        any::<u64>().prop_map(Value),
        any::<i32>().prop_map(|n| Value(i64::from(n) as u64))
    ]
}

fn conditions() -> impl Strategy<Value = ArgumentMatch> {
    let list = || prop::option::of(prop::collection::vec(values(), 1..4));
    let bits = prop_oneof![Just(32_u8), Just(64)];
    let limits = (prop::option::of(values()), prop::option::of(values()));
    (0_u8..6, bits, prop::option::of(values()), list(), list(), limits)
        .prop_map(|(argument, bits, mask, equals, differs, (from, to))| ArgumentMatch {
            mask,
            equals,
            differs,
            from,
            to,
            ..ArgumentMatch::of(argument, bits)
        })
        .prop_filter("it can be asked", |condition| condition.check().is_ok())
}

fn policies() -> impl Strategy<Value = Policy> {
    // Few numbers, so that several rules are about the same.
    let calls = prop::collection::vec(prop_oneof![0_u16..12, 500_u16..600].prop_map(SystemCall), 1..4);
    let rules = (calls, prop::collection::vec(conditions(), 0..3), verdicts()).prop_map(|(calls, when, action)| Rule {
        calls,
        when,
        action,
    });
    let syscalls =
        (verdicts(), prop::collection::vec(rules, 0..8)).prop_map(|(default, rules)| SyscallPolicy { default, rules });
    (prop::sample::subsequence(Guard::ALL.to_vec(), 0..=4), actions(), any::<bool>(), any::<bool>(), syscalls).prop_map(
        |(guards, action, stay, closed, syscalls)| Policy {
            on_exec: if stay { OnExec::Stay } else { OnExec::Leave },
            fail: if closed { Fail::Closed } else { Fail::Open },
            syscalls: guards.contains(&Guard::Syscalls).then_some(syscalls),
            ..Policy::of(&guards, action)
        },
    )
}

/// What [`Compiled::judge`] has to say, from the policy itself.
fn judged(policy: &SyscallPolicy, call: u16, arguments: &[u64; 6]) -> Decision {
    let is_about = |rule: &&Rule| rule.calls.contains(&SystemCall(call));
    let fits = |rule: &&Rule| rule.when.iter().all(|condition| condition.fits(arguments));
    policy.rules.iter().filter(is_about).find(fits).map_or(policy.default, |rule| rule.action).into()
}

proptest! {
    #[test]
    fn what_is_written_is_read_again(policy in policies()) {
        let text = policy.write().expect("TOML");
        prop_assert_eq!(Policy::read(&text).map_err(|error| error.to_string()), Ok(policy.clone()), "{}", text);
        let json = serde_json::to_string(&policy).expect("JSON");
        prop_assert_eq!(serde_json::from_str::<Policy>(&json).map_err(|error| error.to_string()), Ok(policy));
    }

    #[test]
    fn the_table_lets_pass_only_what_the_judge_always_allows(
        policy in policies(),
        call in 0_u16..12,
        arguments in prop::array::uniform6(prop_oneof![0_u64..8, any::<u64>()]),
    ) {
        let Some(syscalls) = &policy.syscalls else { return Ok(()) };
        let compiled = Compiled::of(syscalls);
        let decision = compiled.judge(call.into(), &arguments);
        prop_assert_eq!(decision, judged(syscalls, call, &arguments));
        if compiled.table()[usize::from(call)] == 0 {
            prop_assert_eq!(decision, Decision::Allow);
        } else if syscalls.rules.is_empty() {
            prop_assert_ne!(decision, Decision::Allow);
        }
    }

    #[test]
    fn what_was_seen_is_allowed_afterwards(
        seen in prop::collection::vec((0_u64..450, prop::array::uniform6(prop_oneof![0_u64..20, any::<u64>()])), 0..200),
    ) {
        let mut learned = Learned::default();
        for (number, arguments) in &seen {
            learned.observe(*number, arguments);
        }
        // As it comes from an agent.
        let family = crate::report::SandboxFamily { learned: Some(learned.clone()), ..Default::default() };
        let report = crate::report::SandboxReport {
            pid: 1, processes: Vec::new(), families: vec![family], dump: None, total_us: 0, notes: Vec::new(),
        };
        let line = serde_json::to_string(&crate::report::Reply::Sandbox(report)).expect("JSON");
        let crate::report::Reply::Sandbox(report) = serde_json::from_str(&line).expect("a reply") else { panic!("{line}") };
        prop_assert_eq!(report.families[0].learned.as_ref(), Some(&learned));
        let text = learned.policy(Verdict::Do(Action::Kill)).write().expect("TOML");
        let policy = Policy::read(&text).expect("it is one");
        let compiled = Compiled::of(policy.syscalls.as_ref().expect("they are there"));
        for (number, arguments) in &seen {
            prop_assert_eq!(compiled.judge(*number, arguments), Decision::Allow);
        }
    }

    #[test]
    fn hostile_text_is_harmless(text in "[ -~\\n]{0,400}", at in any::<prop::sample::Index>(), byte in any::<u8>()) {
        let _ = Policy::read(&text);
        // A good one with one byte changed.
        let mut near = WEB.as_bytes().to_vec();
        let at = at.index(near.len());
        near[at] = byte;
        if let Ok(near) = std::str::from_utf8(&near) && let Ok(policy) = Policy::read(near) {
            let compiled = policy.syscalls.as_ref().map(Compiled::of);
            let _ = compiled.map(|compiled| compiled.judge(at as u64, &[0; 6]));
        }
    }

    #[test]
    fn hostile_json_is_harmless(text in "[{}\\[\\]\":,a-z0-9 -]{0,200}") {
        let _ = serde_json::from_str::<Policy>(&text);
        let _ = serde_json::from_str::<Learned>(&text);
    }
}
