//! What a GGUF file says of each token besides its text.

/// llama.cpp's kinds of tokens, by their numbers in files.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(i32)]
pub enum TokenKind {
    /// Part of the vocabulary.
    Normal = 1,
    /// Stands for what has no token.
    Unknown = 2,
    /// Special: not text, and left out when tokens are decoded.
    Control = 3,
    /// Text that is always one token.
    UserDefined = 4,
    /// A row of the embedding without a token.
    Unused = 5,
    /// A byte, written as `<0x0A>`.
    Byte = 6,
}

impl TokenKind {
    /// The kind of this number.
    pub fn of(number: i32) -> Option<Self> {
        let all = [
            Self::Normal,
            Self::Unknown,
            Self::Control,
            Self::UserDefined,
            Self::Unused,
            Self::Byte,
        ];
        all.into_iter().find(|kind| *kind as i32 == number)
    }
}
