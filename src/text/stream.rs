//! Tokens one by one to text, never half a character.

use tokenizers::{Decoder, DecoderWrapper};

use super::Tokenizer;

/// How the tokens of a vocabulary become text, as far as that can be done token by token.
pub(super) enum Decoding {
    /// Tokens are bytes in the alphabet of GPT-2 (Llama 3, SmolLM2).
    ByteLevel,
    /// Tokens are words with `▁` for the space, and `<0xE5>` for a byte of a character without a token (Llama 2).
    Pieces {
        /// What rewrites each token on its own.
        each: Vec<DecoderWrapper>,
        byte_fallback: bool,
        /// So many of this character are dropped where the text begins.
        strip: Option<(char, usize)>,
    },
    /// Anything else, of which nothing is certain before the last token.
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
            [] | [D::Fuse(_)] => None,
            [D::Fuse(_), D::Strip(strip)] if strip.stop == 0 => Some((strip.content, strip.start)),
            _ => return Self::Whole,
        };
        Self::Pieces { each: each.to_vec(), byte_fallback, strip }
    }

    /// Bytes of a token that is not the first one of its text.
    pub(super) fn token_bytes(&self, hf: &tokenizers::Tokenizer, token: String) -> Vec<u8> {
        match self {
            Self::ByteLevel => byte_level(&token),
            Self::Pieces { each, byte_fallback, .. } => {
                let piece = rewrite(each, token, false);
                match byte_token(&piece).filter(|_| *byte_fallback) {
                    Some(byte) => vec![byte],
                    None => piece.into_bytes(),
                }
            }
            Self::Whole => match hf.get_decoder() {
                Some(decoder) => decoder.decode(vec![token.clone()]).unwrap_or(token).into_bytes(),
                None => token.into_bytes(),
            },
        }
    }
}

/// Turns the tokens of one text into pieces of it, each as soon as it is certain.
///
/// All pieces together are exactly what [`Tokenizer::decode`] gives for all tokens. A character that is spread over
/// tokens comes when it is complete; bytes that can no longer become one come as U+FFFD. With a byte-level
/// vocabulary a push costs the length of its token. Where a vocabulary falls back to tokens for single bytes, a run
/// of these comes when it ends, for one bad byte spoils the whole run by that decoder's rule.
#[derive(Debug)]
pub struct TokenStream {
    tokenizer: Tokenizer,
    skip_special: bool,
    /// Bytes that are not certain yet.
    bytes: Vec<u8>,
    /// Every token so far, where nothing less than all of them can be decoded.
    tokens: Vec<u32>,
    /// Nothing was pushed that counts.
    at_start: bool,
    /// Leading characters that may still have to be dropped.
    strip: usize,
}

impl TokenStream {
    pub(super) fn new(tokenizer: Tokenizer, skip_special: bool) -> Self {
        let strip = match tokenizer.decoding() {
            Decoding::Pieces { strip: Some((_, n)), .. } => *n,
            _ => 0,
        };
        Self { tokenizer, skip_special, bytes: Vec::new(), tokens: Vec::new(), at_start: true, strip }
    }

    /// Takes the next token; the text that is certain now, if there is any.
    pub fn push(&mut self, id: u32) -> Option<String> {
        let token = self.tokenizer.token(id)?;
        if self.skip_special && self.tokenizer.skips(&token) {
            return None;
        }
        let first = std::mem::replace(&mut self.at_start, false);
        let text = match self.tokenizer.decoding() {
            Decoding::ByteLevel => {
                self.bytes.extend(byte_level(&token));
                let certain = certain_len(&self.bytes);
                lossy(self.bytes.drain(..certain).collect())
            }
            Decoding::Pieces { each, byte_fallback, .. } => {
                let piece = rewrite(each, token, first);
                if let Some(byte) = byte_token(&piece).filter(|_| *byte_fallback) {
                    self.bytes.push(byte);
                    return None;
                }
                let mut text = self.take_run();
                text.push_str(&piece);
                self.stripped(text)
            }
            Decoding::Whole => {
                self.tokens.push(id);
                return None;
            }
        };
        Some(text).filter(|t| !t.is_empty())
    }

    /// The rest of the text, after the last token. The stream is then as new.
    pub fn finish(&mut self) -> Option<String> {
        let text = match self.tokenizer.decoding() {
            Decoding::ByteLevel => lossy(std::mem::take(&mut self.bytes)),
            Decoding::Pieces { .. } => {
                let run = self.take_run();
                self.stripped(run)
            }
            // `push` kept only tokens that are to be seen.
            Decoding::Whole => self.tokenizer.decode(&self.tokens, false).unwrap_or_default(),
        };
        *self = Self::new(self.tokenizer.clone(), self.skip_special);
        Some(text).filter(|t| !t.is_empty())
    }

    /// The run of byte tokens that has just ended: a text, or one U+FFFD for each of its bytes.
    fn take_run(&mut self) -> String {
        String::from_utf8(std::mem::take(&mut self.bytes))
            .unwrap_or_else(|e| char::REPLACEMENT_CHARACTER.to_string().repeat(e.as_bytes().len()))
    }

    /// `text` without what the decoder drops where the whole text begins.
    fn stripped(&mut self, text: String) -> String {
        let Decoding::Pieces { strip: Some((content, _)), .. } = self.tokenizer.decoding() else { return text };
        let mut rest = text.as_str();
        while self.strip > 0 && !rest.is_empty() {
            match rest.strip_prefix(*content) {
                Some(shorter) => (rest, self.strip) = (shorter, self.strip - 1),
                None => self.strip = 0,
            }
        }
        rest.to_string()
    }
}

/// One token through decoders that look at a token and at whether it is the first.
fn rewrite(each: &[DecoderWrapper], token: String, first: bool) -> String {
    let mut tokens = if first { vec![token] } else { vec![String::new(), token] };
    for decoder in each {
        // Replacing a string in a string cannot fail; a regular expression that gives up leaves the token as it is.
        tokens = decoder.decode_chain(tokens.clone()).unwrap_or(tokens);
    }
    tokens.pop().unwrap_or_default()
}

/// The byte that a token like `<0xE5>` stands for.
fn byte_token(token: &str) -> Option<u8> {
    let hex = token.strip_prefix("<0x")?.strip_suffix('>')?;
    if hex.len() == 2 { u8::from_str_radix(hex, 16).ok() } else { None }
}

/// Bytes of a byte-level token; one with a character outside of that alphabet stands for itself.
fn byte_level(token: &str) -> Vec<u8> {
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

/// How much of `bytes` further bytes cannot change: all, less the beginning of a character at the end.
fn certain_len(bytes: &[u8]) -> usize {
    let incomplete = |&k: &usize| {
        let tail = std::str::from_utf8(&bytes[bytes.len() - k..]);
        tail.is_err_and(|e| e.valid_up_to() == 0 && e.error_len().is_none())
    };
    bytes.len() - (1..=bytes.len().min(3)).find(incomplete).unwrap_or(0)
}

fn lossy(bytes: Vec<u8>) -> String {
    String::from_utf8(bytes).unwrap_or_else(|e| String::from_utf8_lossy(e.as_bytes()).into_owned())
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
    fn a_character_is_certain_only_when_complete() {
        let text = "a한🫠".as_bytes();
        let certain: Vec<usize> = (0..=text.len()).map(|n| certain_len(&text[..n])).collect();
        assert_eq!(certain, [0, 1, 1, 1, 4, 4, 4, 4, 8]);
        // A surrogate, an overlong form and a stray continuation byte can never become a character.
        for bad in [&[0xED, 0xA0][..], &[0xC0], &[0x80], &[0xF5]] {
            assert_eq!(certain_len(bad), bad.len(), "{bad:x?}");
        }
    }

    #[test]
    fn byte_tokens() {
        assert_eq!(byte_token("<0xE5>"), Some(0xE5));
        for other in ["<0xE5", "<0xE>", "<0xXY>", "<0x가>", "0xE5", "<0xE55>"] {
            assert_eq!(byte_token(other), None, "{other}");
        }
    }
}
