//! How a vocabulary's tokens become bytes: the parts of a decoder of `tokenizer.json` that look at one token at a time.

use tokenizers::{Decoder, DecoderWrapper};

use super::tokenizer_file::guarded;

/// How the tokens of a vocabulary become text, as far as that can be done token by token.
pub(super) enum Decoding {
    /// Tokens are bytes in the alphabet of GPT-2 (Llama 3, SmolLM2).
    ByteLevel,
    /// Tokens are words with `▁` for the space; `<0xE5>` is one byte of a character that has no token (Llama 2).
    Pieces {
        /// What rewrites each token on its own.
        each: Vec<DecoderWrapper>,
        byte_fallback: bool,
        /// How many of which character are dropped at the beginning of a text; mostly none.
        strip: (char, usize),
    },
    /// Anything else: nothing is certain before the last token.
    Whole,
}

impl Decoding {
    pub(super) fn of(decoder: Option<&DecoderWrapper>) -> Self {
        use DecoderWrapper as D;
        let chain = match decoder {
            None => return Self::Whole,
            Some(D::Sequence(sequence)) => sequence.get_decoders(),
            Some(one) => std::slice::from_ref(one),
        };
        if let [D::ByteLevel(_)] = chain {
            return Self::ByteLevel;
        }
        let n = chain.iter().take_while(|d| matches!(d, D::Replace(_) | D::Metaspace(_))).count();
        let (each, rest) = chain.split_at(n);
        let (byte_fallback, rest) = match rest {
            [D::ByteFallback(_), rest @ ..] => (true, rest),
            rest => (false, rest),
        };
        let strip = match rest {
            [] | [D::Fuse(_)] => (' ', 0),
            [D::Fuse(_), D::Strip(strip)] if strip.stop == 0 => (strip.content, strip.start),
            _ => return Self::Whole,
        };
        Self::Pieces { each: each.to_vec(), byte_fallback, strip }
    }

    /// Bytes of a token. For the `first` token of a text, before the decoder drops what it drops at the beginning.
    pub(super) fn token_bytes(&self, hf: &tokenizers::Tokenizer, token: String, first: bool) -> Vec<u8> {
        match self {
            Self::ByteLevel => byte_level(&token),
            Self::Pieces { each, byte_fallback, .. } => {
                let piece = rewrite(each, token, first);
                match byte_token(&piece).filter(|_| *byte_fallback) {
                    Some(byte) => vec![byte],
                    None => piece.into_bytes(),
                }
            }
            Self::Whole => match hf.get_decoder() {
                Some(decoder) => guarded(|| decoder.decode(vec![token.clone()])).unwrap_or(token).into_bytes(),
                None => token.into_bytes(),
            },
        }
    }
}

/// Passes one token through decoders that only need the token and whether it is the first.
pub(super) fn rewrite(each: &[DecoderWrapper], token: String, first: bool) -> String {
    let mut tokens = if first { vec![token] } else { vec![String::new(), token] };
    for decoder in each {
        // Replacing a string in a string cannot fail; a regular expression that gives up leaves the token as it is.
        tokens = guarded(|| decoder.decode_chain(tokens.clone())).unwrap_or(tokens);
    }
    tokens.pop().unwrap_or_default()
}

/// The byte that a token like `<0xE5>` stands for.
pub(super) fn byte_token(token: &str) -> Option<u8> {
    let hex = token.strip_prefix("<0x")?.strip_suffix('>')?;
    if hex.len() == 2 { u8::from_str_radix(hex, 16).ok() } else { None }
}

/// Bytes of a byte-level token; one with a character outside of that alphabet stands for itself.
pub(super) fn byte_level(token: &str) -> Vec<u8> {
    token.chars().map(byte_of).collect::<Option<_>>().unwrap_or_else(|| token.as_bytes().to_vec())
}

/// The byte that a character of GPT-2's alphabet stands for: printable Latin-1 stands for itself, the other 68
/// bytes, in order, are the characters from U+0100.
fn byte_of(c: char) -> Option<u8> {
    let c = c as u32;
    match c {
        0x21..=0x7E | 0xA1..=0xAC | 0xAE..=0xFF => Some(c as u8),
        0x100..=0x120 => Some((c - 0x100) as u8),
        0x121..=0x142 => Some((c - 0x121 + 0x7F) as u8),
        0x143 => Some(0xAD),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn alphabet_is_one_to_one() {
        let mut seen = [false; 256];
        for byte in (0..0x200).filter_map(|c| char::from_u32(c).and_then(byte_of)) {
            assert!(!std::mem::replace(&mut seen[byte as usize], true), "byte {byte:#x} has two characters");
        }
        assert!(seen.iter().all(|&s| s), "a byte has no character");
        assert_eq!(byte_level("Ġa"), b" a");
        assert_eq!(byte_level("Ċ"), b"\n");
    }

    #[test]
    fn byte_tokens() {
        assert_eq!(byte_token("<0xE5>"), Some(0xE5));
        for other in ["<0xE5", "<0xE>", "<0xXY>", "<0x가>", "0xE5", "<0xE55>"] {
            assert_eq!(byte_token(other), None, "{other}");
        }
    }
}
