//! Symbols of an image that its own tables lack and that somebody else tells: the manifest of a patch file, which knows them
//! from a build that was not stripped.

use super::{Binding, Image, ImageBytes, ImageError, Symbol, bytes::Strings, symbols::SymbolTable};

impl Image {
    /// The symbols that it was told.
    #[must_use]
    pub fn told(&self) -> &[Symbol] {
        &self.told
    }

    /// This image with `symbols` besides its own. Who tells them has made sure that they are of this very build.
    ///
    /// # Errors
    /// As [`Image::parse`].
    pub fn with_told(&self, symbols: &[Symbol]) -> Result<Self, ImageError> {
        let mut image = self.without_index()?;
        image.told.extend(symbols.iter().cloned().map(|symbol| Symbol {
            binding: Binding::Local,
            exported: false,
            ..symbol
        }));
        Ok(image)
    }
}

/// Adds `told` to `table`, which keeps names as places in string tables.
pub(super) fn add(told: &[Symbol], table: &mut SymbolTable) {
    // Offset 0 is the empty name (gABI, "String Table").
    let mut names = vec![0];
    let mut places = Vec::with_capacity(told.len());
    for symbol in told {
        let mut place = |text: &str| {
            let at = names.len() as u32;
            names.extend_from_slice(text.as_bytes());
            names.push(0);
            at
        };
        places.push((place(&symbol.name), symbol.file.as_deref().map(place)));
    }
    let length = names.len();
    table.add_told(told, &places, Strings::new(&ImageBytes::from(names), 0..length));
}
