//! Manifests of patch files. A fuzzer does not guess a checksum: besides the file as it is, the bytes are tried as the text of a
//! manifest in a file that is right otherwise.

use crate::patch::manifest::{self, Manifest};

/// An object file that defines `f`.
const OBJECT: &[u8] = include_bytes!("../../../fuzz/corpus/patch_object/plain.o");

pub(super) fn check(bytes: &[u8]) {
    if let Ok(Some(manifest)) = manifest::read(bytes) {
        let _ =
            (manifest.build("00"), manifest.functions.iter().map(|function| function.written().len()).sum::<usize>());
    }
    let Ok(manifest) = serde_json::from_slice::<Manifest>(bytes) else { return };
    // What is not sound is not written; what is written is read, and is the same.
    let Ok(file) = manifest::write(OBJECT, &manifest) else { return };
    assert_eq!(manifest::read(&file), Ok(Some(manifest)));
    assert!(matches!(
        manifest::write(&file, &manifest::read(&file).ok().flatten().expect("read before")),
        Err(manifest::ManifestError::Present)
    ));
}
