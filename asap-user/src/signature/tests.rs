//! What a signature proves, and what is no key and no signature.

use super::{
    KeyId, PublicKey, SecretKey, Signature, SignatureError,
    folder::{self, REQUIRED},
};
use crate::random::Random;
use std::{fs, os::unix::fs::PermissionsExt, path::Path};

fn key(comment: &str) -> SecretKey {
    SecretKey::generate(comment).expect("random numbers")
}

#[test]
fn a_signature_is_good_for_one_file_and_one_key() {
    let (ours, others) = (key("ours"), key("others"));
    let file = b"some code".to_vec();
    let signature = ours.sign(&file).expect("signed");
    assert_eq!(ours.public().verify(&file, &signature), Ok(()));
    assert_eq!(signature, ours.sign(&file).expect("signed again"), "reproducible");
    let other = others.public().verify(&file, &signature);
    assert_eq!(other, Err(SignatureError::OtherKey(ours.public().id())));
    // Whoever claims that another key made it has proved nothing.
    let claimed = Signature { key: others.public().id(), ..signature.clone() };
    assert_eq!(others.public().verify(&file, &claimed), Err(SignatureError::DoesNotFit(others.public().id())));
    let does_not_fit = Err(SignatureError::DoesNotFit(ours.public().id()));
    for bit in 0..file.len() * 8 {
        let mut changed = file.clone();
        changed[bit / 8] ^= 1 << (bit % 8);
        assert_eq!(ours.public().verify(&changed, &signature), does_not_fit, "bit {bit}");
    }
    for changed in [&file[..8], b"", b"some code\0"] {
        assert_eq!(ours.public().verify(changed, &signature), does_not_fit);
    }
    for bit in 0..512 {
        let mut changed = signature.clone();
        changed.bytes[bit / 8] ^= 1 << (bit % 8);
        assert_eq!(ours.public().verify(&file, &changed), does_not_fit, "bit {bit} of the signature");
    }
}

#[test]
fn keys_and_signatures_are_read_as_they_were_written() {
    for comment in ["", "release key of Ann", "a  b "] {
        let secret = key(comment.trim_end());
        assert_eq!(SecretKey::parse(&secret.to_text()).expect("secret").to_text(), secret.to_text());
        let public = PublicKey::parse(&secret.public().to_text()).expect("public");
        assert_eq!(public, secret.public());
        let signature = secret.sign(b"x").expect("signed");
        let read = Signature::parse(&signature.to_text()).expect("a signature");
        assert_eq!(public.verify(b"x", &read), Ok(()));
    }
    assert_eq!(SecretKey::generate("two\nlines").map(drop), Err(SignatureError::Comment));
    assert!(!format!("{:?}", key("")).contains("asap-ed25519-secret"), "no secret in messages");
}

#[test]
fn a_key_pair_of_rfc_8032_is_the_one_that_it_says() {
    // Section 7.1, test 1: the key pair; its short name is the beginning of SHA-256 of the public key.
    let seed = [
        0x9d, 0x61, 0xb1, 0x9d, 0xef, 0xfd, 0x5a, 0x60, 0xba, 0x84, 0x4a, 0xf4, 0x92, 0xec, 0x2c, 0xc4, 0x44, 0x49,
        0xc5, 0x69, 0x7b, 0x32, 0x69, 0x19, 0x70, 0x3b, 0xac, 0x03, 0x1c, 0xae, 0x7f, 0x60,
    ];
    let secret = SecretKey { key: ed25519_dalek::SigningKey::from_bytes(&seed), comment: String::new() };
    assert_eq!(secret.public().to_text(), "asap-ed25519 11qYAYKxCrfVS/7TyWQHOg7hcvPapiMlrwIaaPcHURo=\n");
    assert_eq!(secret.public().id(), KeyId([0x21, 0xfe, 0x31, 0xdf, 0xa1, 0x54, 0xa2, 0x61]));
}

#[test]
fn rubbish_is_no_key_and_no_signature() {
    let secret = key("c");
    let texts = [secret.to_text(), secret.public().to_text(), secret.sign(b"x").expect("signed").to_text()];
    // Each is none of the other two.
    PublicKey::parse(&texts[0]).expect_err("a secret key is not published by mistake");
    for text in [&texts[1], &texts[2]] {
        SecretKey::parse(text).expect_err("no secret key");
    }
    let weak = "asap-ed25519 AQAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA= weak\n";
    assert!(matches!(PublicKey::parse(weak), Err(SignatureError::NoPublicKey(why)) if why.contains("any signature")));
    let long = "asap-ed25519 ".to_owned() + &"A".repeat(1 << 20);
    for rubbish in ["", "\n", "asap-ed25519", "asap-ed25519 ", "asap-ed25519 AAAA x", "asap-signature 2\n", &long] {
        PublicKey::parse(rubbish).expect_err(rubbish);
        SecretKey::parse(rubbish).expect_err(rubbish);
        Signature::parse(rubbish).expect_err(rubbish);
    }
    let mut random = Random::new();
    for _ in 0..20_000 {
        let text = &texts[random.below(3)];
        let mut bytes = text.clone().into_bytes();
        for _ in 0..=random.below(3) {
            let at = random.below(bytes.len());
            match random.below(3) {
                0 => bytes[at] = random.below(256) as u8,
                1 => drop(bytes.remove(at)),
                _ => bytes.insert(at, random.below(256) as u8),
            }
        }
        let changed = String::from_utf8_lossy(&bytes);
        // Whatever it still says, it says it of itself, and it proves nothing that the original does not.
        if let Ok(public) = PublicKey::parse(&changed) {
            assert_eq!(PublicKey::parse(&public.to_text()), Ok(public));
        }
        if let Ok(signature) = Signature::parse(&changed)
            && signature.to_text() != texts[2]
        {
            secret.public().verify(b"x", &signature).expect_err("changed");
        }
    }
}

fn write(path: &Path, text: &str, mode: u32) {
    fs::write(path, text).expect("written");
    fs::set_permissions(path, fs::Permissions::from_mode(mode)).expect("chmod");
}

#[test]
fn a_folder_that_others_can_write_or_that_holds_rubbish_is_not_trusted() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let keys = dir.path().join("keys");
    assert_eq!(folder::read(&keys), Ok(folder::Trusted::default()), "none is there");
    fs::create_dir(&keys).expect("mkdir");
    fs::set_permissions(&keys, fs::Permissions::from_mode(0o755)).expect("chmod");
    let public = key("a").public();
    write(&keys.join("a.pub"), &public.to_text(), 0o644);
    write(&keys.join("README"), "not looked at", 0o666);
    let trusted = folder::read(&keys).expect("sound");
    assert_eq!((trusted.keys, trusted.required), (vec![public.clone()], false));
    write(&keys.join(REQUIRED), "", 0o600);
    assert!(folder::read(&keys).expect("sound").required);

    let refused = |what: &str| {
        let error = folder::read(&keys).expect_err(what).to_string();
        assert!(error.contains(what), "{error}");
    };
    let bad = keys.join("b.pub");
    write(&bad, &public.to_text(), 0o666);
    refused("b.pub: others can write it (mode 0666)");
    write(&bad, "rubbish", 0o600);
    refused("b.pub: it is no public key");
    fs::remove_file(&bad).expect("removed");
    std::os::unix::fs::symlink(keys.join("a.pub"), &bad).expect("symlink");
    refused("b.pub: ");
    fs::remove_file(&bad).expect("removed");
    fs::create_dir(&bad).expect("mkdir");
    refused("b.pub: it is not a regular file");
    fs::remove_dir(&bad).expect("removed");
    if nix::unistd::geteuid().is_root() {
        write(&bad, &public.to_text(), 0o600);
        std::os::unix::fs::chown(&bad, Some(65534), None).expect("chown");
        refused("b.pub: it belongs to user 65534");
        fs::remove_file(&bad).expect("removed");
    }
    fs::set_permissions(&keys, fs::Permissions::from_mode(0o777)).expect("chmod");
    refused("keys: others can write it (mode 0777)");
    fs::set_permissions(&keys, fs::Permissions::from_mode(0o700)).expect("chmod");
    let link = dir.path().join("link");
    std::os::unix::fs::symlink(&keys, &link).expect("symlink");
    folder::read(&link).expect_err("a link");
}
