//! Programs of the system, natively and under all guards.

use crate::{launch::Program, translations::Guards};
use asap::dbt::ShadowForm;

fn check(program: &Program) {
    let found = std::process::Command::new("sh").args(["-c", "command -v \"$0\""]).arg(&program.command[0]).output();
    if !found.is_ok_and(|found| found.status.success()) {
        println!("SKIPPED: {} is not installed", program.command[0]);
        return;
    }
    let native = program.natively();
    for form in [ShadowForm::Displaced, ShadowForm::Segment, ShadowForm::Folded] {
        let (output, stopped) = program.translated(Guards::all(form));
        let what = format!("{:?} {form:?}", program.command);
        let text = |bytes: &[u8]| String::from_utf8_lossy(&bytes[..bytes.len().min(2000)]).into_owned();
        assert_eq!(output.status, native.status, "{what}: {}\nstopped: {stopped:#?}", text(&output.stderr));
        assert!(output.stdout == native.stdout, "{what}: {}", text(&output.stdout));
        assert!(stopped.is_empty(), "{what}: {stopped:#?}");
    }
}

#[test]
fn programs_of_the_system_do_under_all_guards_what_they_do_natively() {
    check(&Program::of(&["ls", "-l", "/usr/bin"]));
    let loops =
        "for i in {1..2000}; do x=$((x + i * i)); done; echo $x; ls / | wc -l; trap 'echo caught' USR1; kill -USR1 $$";
    check(&Program::of(&["bash", "-c", loops]));
    let hashes =
        "my %h; $h{$_ % 97} += $_ for 1..200000; eval { die { a => 1 } }; print join(',', map {$h{$_}} sort keys %h)";
    check(&Program::of(&["perl", "-e", hashes]));
    check(&Program::of(&["sqlite3", ":memory:"]).reading(
        "create table t(a, b); with recursive n(x) as (select 1 union all select x + 1 from n where x < 20000) \
         insert into t select x, x * x % 977 from n; select b, count(*), sum(a) from t group by b order by b;",
    ));
    let sorted = "local t = {} for i = 1, 20000 do t[i] = (i * 7919) % 10007 end table.sort(t) print(t[1], t[777], #t, \
                  pcall(error, 'x'), string.format('%5.2f', 2 ^ 0.5), ('a'):rep(9):gsub('a', 'bb'))";
    check(&Program::of(&["lua5.4", "-e", sorted]));
    let python = "import json, re, hashlib\ntry:\n  1 / 0\nexcept ZeroDivisionError as e:\n  print(e)\n\
                  print(json.dumps({str(i): [i, i / 3] for i in range(50)}), re.sub('a(.)', r'\\1b', 'axay' * 9), \
                  hashlib.sha256(b'x' * 99999).hexdigest(), sum(i * i for i in range(99999)))";
    check(&Program::of(&["/usr/bin/python3", "-c", python]));
    let bytes: Vec<u8> = (0..300_000_u32).flat_map(|n| (n.wrapping_mul(n) / 7).to_le_bytes()).collect();
    check(&Program::of(&["gzip", "-9nc"]).reading(bytes.clone()));
    check(&Program::of(&["xz", "-1", "-T1", "-c"]).reading(bytes.clone()));
    check(&Program::of(&["openssl", "dgst", "-sha512"]).reading(bytes.clone()));
    check(&Program::of(&["openssl", "enc", "-aes-256-ctr", "-K", "00112233", "-iv", "00"]).reading(bytes));
    // Not gcc: a return of its libc, around vfork(2), is stopped although it is right.
}

/// For measurements by hand: `ASAP_TEST_PROGRAM='fib 32' cargo test --test translated by_hand -- --ignored --nocapture`.
#[test]
#[ignore = "runs what ASAP_TEST_PROGRAM says, natively and with each guard"]
fn by_hand() {
    let line = std::env::var("ASAP_TEST_PROGRAM").expect("ASAP_TEST_PROGRAM");
    let program = Program::of(&["sh", "-c", &format!("exec {line}")]);
    let program = if line.contains('|') {
        Program::of(&["sh", "-c", &line])
    } else {
        Program::of(&line.split(' ').collect::<Vec<_>>()).reading(program.input)
    };
    let rounds: usize = std::env::var("ASAP_TEST_ROUNDS").ok().and_then(|n| n.parse().ok()).unwrap_or(5);
    let kinds = [
        ("none", Guards::NONE),
        ("displaced", Guards { shadow: Some(ShadowForm::Displaced), ..Guards::NONE }),
        ("segment", Guards { shadow: Some(ShadowForm::Segment), ..Guards::NONE }),
        ("folded", Guards { shadow: Some(ShadowForm::Folded), ..Guards::NONE }),
        ("targets", Guards { targets: true, ..Guards::NONE }),
        ("all", Guards::all(ShadowForm::Displaced)),
    ];
    let mut times = vec![Vec::new(); kinds.len() + 1];
    let cpu = || {
        let usage = nix::sys::resource::getrusage(nix::sys::resource::UsageWho::RUSAGE_CHILDREN).expect("usage");
        let time = usage.user_time();
        time.tv_sec() as f64 + time.tv_usec() as f64 / 1e6
    };
    for _ in 0..rounds {
        let before = cpu();
        let native = program.natively();
        times[0].push(cpu() - before);
        for (index, (name, guards)) in kinds.iter().enumerate() {
            let before = cpu();
            let (output, stopped) = program.translated(*guards);
            times[index + 1].push(cpu() - before);
            if std::env::var_os("ASAP_TEST_DEBUGGER").is_some() {
                println!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
                continue;
            }
            assert_eq!(output.status, native.status, "{name} {stopped:?}");
            if !stopped.is_empty() {
                println!("{name} {stopped:?}");
            }
        }
    }
    let median = |list: &mut Vec<f64>| {
        list.sort_by(f64::total_cmp);
        list[list.len() / 2]
    };
    let native = median(&mut times[0]);
    println!("native {native:.3} s");
    for (index, (name, _)) in kinds.iter().enumerate() {
        let time = median(&mut times[index + 1]);
        println!("{name:10} {time:.3} s  {:.3}", time / native);
    }
}
