//! Signed patch files: an agent that was told to accepts no others, and looks at the bytes that it is about to apply.

use crate::{
    patch_files::{names, patch_file, strip},
    support::{Fixture, Lab, Snapshot, lab_answer},
};
use asap::report::{Consistency, Mechanism, PatchFile, PatchReport, PatchRequest, Reply, Request};
use std::{
    fs,
    io::{BufRead, BufReader, Write},
    os::unix::{fs::PermissionsExt, net::UnixStream},
    path::Path,
};

/// Makes a pair of keys; gives the path of the secret one.
fn key(lab: &Lab, name: &str) -> String {
    let path = lab.path(name).to_str().expect("ASCII").to_owned();
    let made = lab.asap(&["keygen", "--comment", name, &path]);
    assert_eq!(made.code, 0, "{made:?}");
    path
}

/// Has the laboratory's agents trust a key.
fn trust(lab: &Lab, key: &str) {
    let folder = lab.path("keys");
    fs::create_dir_all(&folder).expect("made");
    fs::set_permissions(&folder, fs::Permissions::from_mode(0o700)).expect("closed");
    let name = Path::new(key).file_name().expect("a name").to_str().expect("ASCII");
    fs::copy(format!("{key}.pub"), folder.join(format!("{name}.pub"))).expect("copied");
}

fn sign(lab: &Lab, key: &str, file: &str) {
    let signed = lab.asap(&["sign", "--key", key, file]);
    assert_eq!(signed.code, 0, "{signed:?}");
}

/// A stripped program that runs, and a patch file for it.
fn target_and_patch(lab: &Lab) -> (Fixture, String) {
    let program = strip(lab, &names());
    let object = lab.object("int victim(int x) { return x + 50; }");
    let file = patch_file(lab, &object, &program.manifest("fix", &[("victim", None)]));
    (program.start(), file)
}

fn was_signed_by(report: &PatchReport, name: &str) -> bool {
    report.notes.iter().any(|note| note.starts_with("signed by ") && note.contains(name))
}

#[test]
fn an_agent_that_requires_signatures_accepts_no_other_patch() {
    let Some(lab) = Lab::new("an_agent_that_requires_signatures_accepts_no_other_patch") else { return };
    let (target, file) = target_and_patch(&lab);
    let [ours, others] = ["ours", "others"].map(|name| key(&lab, name));
    trust(&lab, &ours);
    lab.attach_with(target.pid(), &["--require-signature"]);
    let before = Snapshot::of(target.pid());

    lab.asap(&["patch", &file]).refusal(&["fix.asap: it is not signed", "signed patches only"]);
    sign(&lab, &others, &file);
    lab.asap(&["patch", &file]).refusal(&["signed with the key", "not among those trusted"]);
    let plain = lab.object("int victim(int x) { return x + 60; }");
    lab.asap(&["patch", "--function", "victim", &plain]).refusal(&["not signed"]);
    assert_eq!(lab.asap(&["sign", "--key", &ours, &plain]).refusal(&["no manifest"]).kind.exit_code(), 1);

    // The right signature, and one bit of the file other than it was: at several places, the code among them.
    sign(&lab, &ours, &file);
    let sound = fs::read(&file).expect("readable");
    let code = sound.windows(4).position(|part| part == [0x8d, 0x47, 0x32, 0xc3]).expect("lea 50(%rdi),%eax; ret");
    for at in [0, code + 2, sound.len() / 2, sound.len() - 1] {
        let mut changed = sound.clone();
        changed[at] ^= 1;
        fs::write(&file, &changed).expect("written");
        lab.asap(&["patch", &file]).refusal(&["does not fit", "changed after it was signed"]);
        lab.asap(&["verify", "--key", &format!("{ours}.pub"), &file]).refusal(&["does not fit"]);
    }
    // Another file, with a signature that was made of this one; a signature that is damaged.
    let other = Path::new(&file).with_file_name("other.asap").to_str().expect("ASCII").to_owned();
    let manifest = asap::patch::manifest::read(&sound).expect("sound").expect("there");
    let manifest = asap::patch::manifest::Manifest { name: "other".to_owned(), ..manifest };
    assert_eq!(patch_file(&lab, &lab.object("int victim(int x) { return x + 70; }"), &manifest), other);
    fs::copy(format!("{file}.sig"), format!("{other}.sig")).expect("copied");
    lab.asap(&["patch", &other]).refusal(&["other.asap", "another file"]);
    fs::write(format!("{other}.sig"), "asap-signature 1\nkey 0\n").expect("written");
    lab.asap(&["patch", &other]).refusal(&["signature is damaged"]);
    Snapshot::of(target.pid()).assert_same(&before, "refused");
    assert_eq!(target.number("call 1"), 2);

    fs::write(&file, &sound).expect("written");
    assert!(was_signed_by(&lab.patch(&["--dry-run", &file]), "ours"));
    assert!(was_signed_by(&lab.patch(&[&file]), "ours"));
    assert_eq!(target.number("call 1"), 51);
    // A key that is taken away is not trusted any more, without a new agent.
    lab.revert(&[]);
    fs::remove_file(lab.path("keys/ours.pub")).expect("removed");
    lab.asap(&["patch", &file]).refusal(&["not among those trusted"]);

    let log = fs::read_to_string(lab.path("log/audit.jsonl")).expect("a log");
    let done: Vec<_> = log.lines().filter(|line| line.contains("\"command\":\"patch\"")).collect();
    let signed = |line: &&&str| line.contains("\"signed_by\"") && line.contains("(ours)");
    assert_eq!(done.iter().filter(signed).count(), 1, "{log}");
    assert!(done.iter().any(|line| line.contains("does not fit")), "{log}");
}

#[test]
fn the_agent_checks_the_bytes_it_applies_whatever_its_client_says() {
    let Some(lab) = Lab::new("the_agent_checks_the_bytes_it_applies_whatever_its_client_says") else { return };
    let (target, file) = target_and_patch(&lab);
    let ours = key(&lab, "ours");
    trust(&lab, &ours);
    sign(&lab, &ours, &file);
    // A file in the folder of keys is enough, for every agent.
    fs::write(lab.path("keys/required"), "").expect("written");
    lab.attach(target.pid());
    let mut bytes = fs::read(&file).expect("readable");
    let code = bytes.windows(4).position(|part| part == [0x8d, 0x47, 0x32, 0xc3]).expect("lea 50(%rdi),%eax; ret");
    bytes[code + 2] += 1;
    // A client of another make that sends something else than it was given.
    let signature = fs::read_to_string(format!("{file}.sig")).expect("readable");
    let request = Request::Patch(PatchRequest {
        pid: None,
        functions: Vec::new(),
        address: None,
        files: vec![PatchFile { name: "fix.asap".to_owned(), bytes, signature: Some(signature) }],
        name: None,
        dry_run: false,
        timeout_ms: 10_000,
        consistency: Consistency::Quiescent,
        mechanism: Mechanism::Auto,
    });
    let mut agent = BufReader::new(UnixStream::connect(lab.path("run/agent.sock")).expect("an agent"));
    writeln!(agent.get_mut(), "{}", serde_json::to_string(&request).expect("serialises")).expect("sent");
    let failure = loop {
        let mut line = String::new();
        agent.read_line(&mut line).expect("an answer");
        match serde_json::from_str(&line).expect("a reply") {
            Reply::Progress(_) => {}
            Reply::Failed(failure) => break failure,
            other => panic!("{other:?}"),
        }
    };
    assert!(failure.message.contains("does not fit"), "{failure:?}");
    assert_eq!(target.number("call 1"), 2);
    assert!(was_signed_by(&lab.patch(&[&file]), "ours"));
    assert_eq!(target.number("call 1"), 51);
}

#[test]
fn without_the_requirement_unsigned_patches_go_in_and_bad_signatures_do_not() {
    let Some(lab) = Lab::new("without_the_requirement_unsigned_patches_go_in_and_bad_signatures_do_not") else {
        return;
    };
    let (target, file) = target_and_patch(&lab);
    let [ours, others] = ["ours", "others"].map(|name| key(&lab, name));
    trust(&lab, &ours);
    lab.attach(target.pid());
    assert!(lab.patch(&["--dry-run", &file]).notes.is_empty());
    sign(&lab, &others, &file);
    let note = lab.patch(&["--dry-run", &file]).notes.concat();
    assert!(note.contains("another one") && note.contains("not required"), "{note}");
    sign(&lab, &ours, &file);
    let mut bytes = fs::read(&file).expect("readable");
    *bytes.last_mut().expect("bytes") ^= 1;
    fs::write(&file, &bytes).expect("written");
    lab.asap(&["patch", &file]).refusal(&["does not fit"]);
    // Who attaches with the requirement makes the agent that runs stricter, for all its targets.
    let (second, _) = target_and_patch(&lab);
    lab.attach_with(second.pid(), &["--require-signature"]);
    fs::remove_file(format!("{file}.sig")).expect("removed");
    let pid = target.pid_text();
    let plain = lab.object("int victim(int x) { return x + 60; }");
    lab.asap(&["patch", "--pid", &pid, "--function", "victim", &plain]).refusal(&["not signed"]);
    // Keys that others could have changed count for nothing, and nothing goes in on their word.
    fs::set_permissions(lab.path("keys/ours.pub"), fs::Permissions::from_mode(0o666)).expect("opened");
    let refusal = lab.asap(&["patch", "--pid", &pid, &file]).refusal(&["ours.pub", "others can write it"]);
    assert!(refusal.way_out.contains("--keys"), "{refusal:?}");
    assert_eq!(target.number("call 1"), 2);
}

#[test]
fn keys_are_private_and_never_overwritten() {
    let Some(lab) = Lab::new("keys_are_private_and_never_overwritten") else { return };
    let (_target, file) = target_and_patch(&lab);
    let ours = key(&lab, "ours");
    let mode = |path: &str| fs::metadata(path).expect("there").permissions().mode() & 0o777;
    assert_eq!((mode(&ours), mode(&format!("{ours}.pub")) & 0o022), (0o600, 0));
    let text = fs::read_to_string(&ours).expect("readable");
    lab.asap(&["keygen", &ours]).refusal(&["is there already"]);
    fs::remove_file(&ours).expect("removed");
    lab.asap(&["keygen", &ours]).refusal(&["ours.pub is there already"]);
    assert!(!Path::new(&ours).exists(), "no half a pair");
    fs::write(&ours, text).expect("written");
    fs::set_permissions(&ours, fs::Permissions::from_mode(0o640)).expect("opened");
    lab.asap(&["sign", "--key", &ours, &file]).refusal(&["others may have read", "0640"]);
    fs::set_permissions(&ours, fs::Permissions::from_mode(0o600)).expect("closed");
    lab.asap(&["sign", "--key", &format!("{ours}.pub"), &file]).refusal(&[]);
    lab.asap(&["verify", "--key", &format!("{ours}.pub"), &file]).refusal(&["no signature"]);
    // Signing again replaces the signature, and what comes of it is the same.
    sign(&lab, &ours, &file);
    let first = fs::read_to_string(format!("{file}.sig")).expect("readable");
    sign(&lab, &ours, &file);
    assert_eq!(fs::read_to_string(format!("{file}.sig")).expect("readable"), first);
    let verified = lab_answer(lab.start(&["verify", "--key", &format!("{ours}.pub"), &file]));
    assert_eq!(verified.code, 0, "{verified:?}");
    assert!(verified.text.contains("(ours)"), "{verified:?}");
    trust(&lab, &ours);
    assert_eq!(lab.asap(&["verify", &file]).code, 0);
}
