//! Turns tokens into text one by one, and never gives half a character.

use super::{
    Tokenizer,
    decoding::{Decoding, byte_level, byte_token, rewrite},
};

impl Tokenizer {
    /// A decoder for tokens that come one by one, without special tokens.
    pub fn stream(&self) -> TokenStream {
        TokenStream::new(self.clone(), true)
    }

    /// As [`Tokenizer::stream`], with the text of special tokens.
    pub fn stream_with_special(&self) -> TokenStream {
        TokenStream::new(self.clone(), false)
    }
}

/// What a decoder does differently at the beginning of a text.
#[derive(Debug, Clone, Copy)]
struct Start {
    /// No token that counts was pushed yet.
    first: bool,
    /// Leading characters that may still have to be dropped.
    strip: usize,
}

impl Start {
    fn of(decoding: &Decoding) -> Self {
        let strip = match decoding {
            Decoding::Pieces { strip: (_, n), .. } => *n,
            _ => 0,
        };
        Self { first: true, strip }
    }

    /// `text` without what the decoder drops at the beginning of the whole text.
    fn stripped(&mut self, decoding: &Decoding, text: String) -> String {
        let Decoding::Pieces { strip: (content, _), .. } = decoding else { return text };
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

/// Turns the tokens of one text into pieces of it, each as soon as it is certain.
///
/// All pieces together are exactly what [`Tokenizer::decode`] gives for all tokens. A character that is spread over
/// several tokens comes when it is complete; bytes that can no longer become one come as U+FFFD. With a byte-level
/// vocabulary a push costs time in proportion to the length of its token. Where a vocabulary uses tokens for single
/// bytes, a run of these comes when it ends, since by that decoder's rule one bad byte spoils the whole run.
///
/// ```
/// # let tokenizer = aoji::ModelFiles::open("demo")?.tokenizer.unwrap();
/// let ids = tokenizer.encode("안녕하세요", false)?;
/// let (prompt, answer) = ids.split_at(1);
/// let mut stream = tokenizer.stream().after(prompt);
/// let mut text = tokenizer.decode(prompt, true)?;
/// answer.iter().for_each(|&id| text.extend(stream.push(id)));
/// text.extend(stream.finish());
/// assert_eq!(text, "안녕하세요");
/// # Ok::<(), aoji::Error>(())
/// ```
#[derive(Debug, Clone)]
pub struct TokenStream {
    tokenizer: Tokenizer,
    skip_special: bool,
    /// Bytes that are not certain yet.
    bytes: Vec<u8>,
    /// Every token so far, if nothing less than all of them can be decoded, and roughly how many characters they make.
    tokens: Vec<u32>,
    chars: usize,
    start: Start,
    /// The text that decoding the prompt alone gives for its end, and that more tokens could still change.
    known: String,
}

impl TokenStream {
    fn new(tokenizer: Tokenizer, skip_special: bool) -> Self {
        let start = Start::of(tokenizer.decoding());
        Self { tokenizer, skip_special, bytes: Vec::new(), tokens: Vec::new(), chars: 0, start, known: String::new() }
    }

    /// Makes a new stream continue `prompt`: [`Tokenizer::decode`]'s text of the prompt, followed by all pieces, is its
    /// text of all tokens. So a space between the two is in the first piece; decoders of SentencePiece's vocabularies
    /// drop it only at the beginning of a text.
    ///
    /// If the prompt ends in the middle of a character, decoding it alone gives U+FFFD there; the pieces then begin
    /// with the whole character, once it is complete.
    pub fn after(mut self, prompt: &[u32]) -> Self {
        let mut rest = prompt;
        while let [id, tail @ ..] = rest
            && (self.start.first || self.start.strip > 0)
        {
            self.push(*id);
            rest = tail;
        }
        // Only what the last few tokens leave undecided matters from here on.
        let mut bytes = 0;
        let closes = |&id: &u32| match self.tokenizer.decoding() {
            Decoding::ByteLevel => {
                bytes += self.visible(id).map_or(0, |token| byte_level(&token).len());
                bytes > 3 // longer than an unfinished character can be
            }
            Decoding::Pieces { .. } => self.visible(id).is_some_and(|token| byte_token(&token).is_none()),
            Decoding::Whole => false,
        };
        let from = rest.iter().rposition(closes).unwrap_or(0);
        rest[from..].iter().for_each(|&id| drop(self.push(id)));
        self.known = self.open_text();
        self.chars = 0;
        self
    }

    /// Takes the next token. Returns the text that is certain now, if there is any.
    pub fn push(&mut self, id: u32) -> Option<String> {
        let token = self.visible(id)?;
        let first = std::mem::replace(&mut self.start.first, false);
        let text = match self.tokenizer.decoding() {
            Decoding::ByteLevel => {
                self.bytes.extend(byte_level(&token));
                let certain = certain_len(&self.bytes);
                lossy(self.bytes.drain(..certain).collect())
            }
            decoding @ Decoding::Pieces { each, byte_fallback, .. } => {
                let piece = rewrite(each, token, first);
                if let Some(byte) = byte_token(&piece).filter(|_| *byte_fallback) {
                    self.bytes.push(byte);
                    return None;
                }
                let mut text = run(std::mem::take(&mut self.bytes));
                text.push_str(&piece);
                self.start.stripped(decoding, text)
            }
            Decoding::Whole => {
                self.chars += String::from_utf8_lossy(&self.tokenizer.token_bytes(id)).chars().count();
                self.tokens.push(id);
                return None;
            }
        };
        self.unknown(text)
    }

    /// The rest of the text, after the last token. The stream is then like new.
    pub fn finish(&mut self) -> Option<String> {
        let text = self.open_text();
        let text = self.unknown(text);
        *self = Self::new(self.tokenizer.clone(), self.skip_special);
        text
    }

    /// The bytes that `id` would add to the text as its next token, possibly half a character; for a special token its
    /// name.
    #[cfg(feature = "server")]
    pub(crate) fn bytes_of(&self, id: u32) -> Vec<u8> {
        if self.tokenizer.is_special(id) {
            return self.tokenizer.token_bytes(id);
        }
        let bytes = self.tokenizer.bytes_at(id, self.start.first);
        let (decoding, mut start) = (self.tokenizer.decoding(), self.start);
        start.stripped(decoding, run(self.bytes.clone()));
        match String::from_utf8(bytes) {
            Ok(text) => start.stripped(decoding, text).into_bytes(),
            Err(half) => half.into_bytes(),
        }
    }

    /// How many whole characters of the tokens so far no piece has given yet, as far as that can be told.
    #[cfg(feature = "server")]
    pub(crate) fn open_chars(&self) -> usize {
        let decoding = self.tokenizer.decoding();
        match decoding {
            Decoding::ByteLevel => 0,
            Decoding::Pieces { .. } => {
                let whole = match std::str::from_utf8(&self.bytes) {
                    Ok(text) => text,
                    Err(e) => std::str::from_utf8(&self.bytes[..e.valid_up_to()]).unwrap_or_default(),
                };
                let text = { self.start }.stripped(decoding, whole.into());
                text[common(&text, &self.known)..].chars().count()
            }
            Decoding::Whole => self.chars,
        }
    }

    /// The token as the vocabulary writes it, if the text shows it.
    fn visible(&self, id: u32) -> Option<String> {
        self.tokenizer.visible(id, self.skip_special)
    }

    /// The text that the undecided tokens would give if no more followed.
    fn open_text(&self) -> String {
        let decoding = self.tokenizer.decoding();
        match decoding {
            Decoding::ByteLevel => lossy(self.bytes.clone()),
            Decoding::Pieces { .. } => { self.start }.stripped(decoding, run(self.bytes.clone())),
            // `push` kept only tokens that the text shows.
            Decoding::Whole => self.tokenizer.decode(&self.tokens, false).unwrap_or_else(|e| {
                tracing::warn!("a text is left out: {e}");
                String::new()
            }),
        }
    }

    /// The part of `text` that decoding the prompt alone did not give.
    fn unknown(&mut self, text: String) -> Option<String> {
        let n = common(&text, &self.known);
        match n < text.len() {
            true => self.known.clear(),
            false => drop(self.known.drain(..n)),
        }
        Some(text[n..].to_string()).filter(|t| !t.is_empty())
    }
}

/// A run of byte tokens that has ended: its text, or one U+FFFD for each of its bytes.
fn run(bytes: Vec<u8>) -> String {
    String::from_utf8(bytes).unwrap_or_else(|e| char::REPLACEMENT_CHARACTER.to_string().repeat(e.as_bytes().len()))
}

/// Bytes of the longest common beginning, in whole characters.
fn common(a: &str, b: &str) -> usize {
    a.chars().zip(b.chars()).take_while(|(a, b)| a == b).map(|(a, _)| a.len_utf8()).sum()
}

/// How many of `bytes` later bytes cannot change: all except the beginning of a character at the end.
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
    fn a_character_is_certain_only_when_complete() {
        let text = "a한🫠".as_bytes();
        let certain: Vec<usize> = (0..=text.len()).map(|n| certain_len(&text[..n])).collect();
        assert_eq!(certain, [0, 1, 1, 1, 4, 4, 4, 4, 8]);
        // A surrogate, an overlong form and a stray continuation byte can never become a character.
        for bad in [&[0xED, 0xA0][..], &[0xC0], &[0x80], &[0xF5]] {
            assert_eq!(certain_len(bad), bad.len(), "{bad:x?}");
        }
    }
}
