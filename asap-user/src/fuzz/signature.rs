//! Signature and key files; and that nothing but the signature that was made fits.

use crate::signature::{PublicKey, SecretKey, Signature};
use std::sync::OnceLock;

fn key() -> &'static SecretKey {
    static KEY: OnceLock<SecretKey> = OnceLock::new();
    KEY.get_or_init(|| SecretKey::generate("").expect("random numbers"))
}

pub(super) fn check(bytes: &[u8]) {
    let text = String::from_utf8_lossy(bytes);
    if let Ok(signature) = Signature::parse(&text) {
        assert_eq!(Signature::parse(&signature.to_text()), Ok(signature.clone()));
        assert!(key().public().verify(bytes, &signature).is_err(), "nobody else has this key");
    }
    if let Ok(public) = PublicKey::parse(&text) {
        assert_eq!(PublicKey::parse(&public.to_text()), Ok(public.clone()));
        let _ = public.name();
    }
    if let Ok(secret) = SecretKey::parse(&text) {
        let signature = secret.sign(bytes).expect("any file can be signed");
        assert_eq!(secret.public().verify(bytes, &signature), Ok(()));
        assert!(secret.public().verify(&[bytes, b"x"].concat(), &signature).is_err());
    }
}
