//! Text to token ids and back, as `tokenizer.json` says.

use std::path::Path;
use std::sync::Arc;

use serde::Deserialize;
use tokenizers::{AddedVocabulary, Model, NormalizerWrapper, OffsetReferential, OffsetType, PreTokenizer};

use super::stream::{Decoding, TokenStream};
use crate::error::{Error, Result};

/// A checkpoint's tokenizer. Clones share one vocabulary.
///
/// Ids are the ones Hugging Face's `tokenizers` gives for the same file, with one exception that is asked for by
/// name: [`Tokenizer::encode_plain`].
#[derive(Clone)]
pub struct Tokenizer(Arc<Inner>);

struct Inner {
    hf: tokenizers::Tokenizer,
    /// The added tokens of `hf`, told not to see special tokens in a text.
    plain: AddedVocabulary,
    bos: Option<u32>,
    decoding: Decoding,
}

/// A run of a prompt, as [`Tokenizer::split_special`] finds it.
pub(super) enum Part<'a> {
    /// A special token.
    Special(u32),
    /// Everything up to the next one.
    Text(&'a str),
}

impl Tokenizer {
    /// Reads `tokenizer.json` in `dir`; `None` when there is no such file.
    ///
    /// # Errors
    /// The file cannot be read, or [`Tokenizer::from_bytes`] refuses it.
    pub fn from_dir(dir: &Path) -> Result<Option<Self>> {
        let path = dir.join("tokenizer.json");
        match std::fs::read(&path) {
            Ok(bytes) => Self::from_bytes(&path, &bytes).map(Some),
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(None),
            Err(e) => Err(Error::io(&path)(e)),
        }
    }

    /// Reads the content of a `tokenizer.json`; `path` is what errors call it.
    ///
    /// Truncation and padding that the file may carry over from training are dropped: a prompt is never cut.
    ///
    /// # Errors
    /// [`Error::File`] when it is no tokenizer, or lists an added token under an id that the vocabulary contradicts.
    pub fn from_bytes(path: impl AsRef<Path>, bytes: &[u8]) -> Result<Self> {
        let path = path.as_ref();
        let wrong = |e: &dyn std::fmt::Display| Error::file(path, format!("not a tokenizer that aoji can read: {e}"));
        let mut hf = tokenizers::Tokenizer::from_bytes(bytes).map_err(|e| wrong(&e))?;
        hf.with_truncation(None).map_err(|e| wrong(&e))?.with_padding(None);

        // The crate numbers added tokens by itself and only logs where it comes to another id than the file.
        let listed: Listed = serde_json::from_slice(bytes).map_err(|e| wrong(&e))?;
        for token in listed.added_tokens {
            let found = hf.token_to_id(&token.content);
            if found != Some(token.id) {
                let found = found.map_or("none".into(), |id| id.to_string());
                let Added { id, content } = token;
                return Err(wrong(&format!("added token {content:?} is listed with id {id}, its place gives {found}")));
            }
        }

        let mut plain = hf.get_added_vocabulary().clone();
        plain.set_encode_special_tokens(true);
        let decoding = Decoding::of(hf.get_decoder());
        let mut inner = Inner { hf, plain, bos: None, decoding };
        let bare = inner.encode("a", false)?;
        inner.bos = match inner.encode("a", true)?.split_first() {
            Some((first, rest)) if !bare.is_empty() && rest.starts_with(&bare) => Some(*first),
            _ => None,
        };
        Ok(Self(Arc::new(inner)))
    }

    /// Token ids of `text`; with `special`, also what the file's post-processor adds (for Llama 3: one BOS in front).
    ///
    /// The text of a special token inside `text` becomes that special token, as in Hugging Face's libraries; text
    /// from somebody else goes through [`Tokenizer::encode_plain`].
    ///
    /// # Errors
    /// [`Error::Input`] when the file's rules cannot be applied to the text.
    pub fn encode(&self, text: &str, special: bool) -> Result<Vec<u32>> {
        self.0.encode(text, special)
    }

    /// Token ids of `text` with nothing added, the text of special tokens taken as plain text: `<|end_of_text|>`
    /// typed by a user is fifteen characters, not the end of the prompt.
    ///
    /// # Errors
    /// As [`Tokenizer::encode`].
    pub fn encode_plain(&self, text: &str) -> Result<Vec<u32>> {
        let hf = &self.0.hf;
        // The steps of `encode`, with the other set of added tokens: a second tokenizer would double the vocabulary.
        let mut split = self.0.plain.extract_and_normalize(hf.get_normalizer(), text);
        let ids = (|| {
            if let Some(pre_tokenizer) = hf.get_pre_tokenizer() {
                pre_tokenizer.pre_tokenize(&mut split)?;
            }
            hf.get_model().tokenize_in_pretokenized(&mut split, None)?;
            Ok(split.into_encoding(None, 0, OffsetType::None)?.get_ids().to_vec())
        })();
        ids.map_err(cannot_encode)
    }

    /// Text of `ids`, without special tokens if `skip_special`. Ids that name no token add nothing: models often
    /// have more rows than their tokenizer has tokens.
    ///
    /// # Errors
    /// [`Error::Input`] when the file's decoder cannot be applied.
    pub fn decode(&self, ids: &[u32], skip_special: bool) -> Result<String> {
        self.0.hf.decode(ids, skip_special).map_err(|e| Error::Input(format!("cannot decode these tokens: {e}")))
    }

    /// A decoder for tokens that come one by one, without special tokens.
    pub fn stream(&self) -> TokenStream {
        TokenStream::new(self.clone(), true)
    }

    /// As [`Tokenizer::stream`], with the text of special tokens.
    pub fn stream_with_special(&self) -> TokenStream {
        TokenStream::new(self.clone(), false)
    }

    /// Number of token ids: one more than the highest, added tokens included.
    pub fn vocab(&self) -> usize {
        let added = self.0.hf.get_added_vocabulary().get_added_tokens_decoder();
        let highest = added.keys().max().map_or(0, |&id| id as usize + 1);
        self.0.hf.get_vocab_size(false).max(highest)
    }

    /// Id of the token that is written exactly so in the vocabulary.
    pub fn token_id(&self, token: &str) -> Option<u32> {
        self.0.hf.token_to_id(token)
    }

    /// How the vocabulary writes token `id` (byte-level: `Ġthe`), `None` when there is no such token.
    pub fn token(&self, id: u32) -> Option<String> {
        self.0.hf.id_to_token(id)
    }

    /// Whether `id` is a special token: decoding can skip it, and a user's text never contains it.
    pub fn is_special(&self, id: u32) -> bool {
        self.token(id).is_some_and(|token| self.skips(&token))
    }

    /// The bytes that token `id` adds to a text, when it is not its first token. Half a character is possible;
    /// nothing for an id that names no token.
    pub fn token_bytes(&self, id: u32) -> Vec<u8> {
        self.token(id).map_or(Vec::new(), |token| self.0.decoding.token_bytes(&self.0.hf, token))
    }

    /// The token that [`Tokenizer::encode`] with `special` puts in front of a text.
    pub fn bos(&self) -> Option<u32> {
        self.0.bos
    }

    /// Texts of all special tokens.
    pub(super) fn specials(&self) -> impl Iterator<Item = &str> {
        let added = self.0.hf.get_added_vocabulary().get_added_tokens_decoder();
        added.values().filter(|token| token.special).map(|token| token.content.as_str())
    }

    /// Cuts `text` at its special tokens, with the file's rules for the spaces around them.
    pub(super) fn split_special<'a>(&self, text: &'a str) -> Vec<Part<'a>> {
        let added = self.0.hf.get_added_vocabulary();
        let split = added.extract_and_normalize(None::<&NormalizerWrapper>, text);
        let mut parts = Vec::new();
        let mut from = 0;
        for (_, (start, end), tokens) in split.get_splits(OffsetReferential::Original, OffsetType::Byte) {
            let Some(id) = tokens.as_ref().and_then(|t| t.first()).map(|t| t.id).filter(|&id| self.is_special(id))
            else {
                continue;
            };
            parts.push(Part::Text(&text[from..start]));
            parts.push(Part::Special(id));
            from = end;
        }
        parts.push(Part::Text(&text[from..]));
        parts
    }

    /// Whether decoding without special tokens leaves out the token written so.
    pub(super) fn skips(&self, token: &str) -> bool {
        self.0.hf.get_added_vocabulary().is_special_token(token)
    }

    pub(super) fn decoding(&self) -> &Decoding {
        &self.0.decoding
    }
}

impl Inner {
    fn encode(&self, text: &str, special: bool) -> Result<Vec<u32>> {
        let encoding = self.hf.encode_fast(text, special).map_err(cannot_encode)?;
        Ok(encoding.get_ids().to_vec())
    }
}

impl std::fmt::Debug for Tokenizer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Tokenizer").field("vocab", &self.vocab()).field("bos", &self.bos()).finish_non_exhaustive()
    }
}

fn cannot_encode(e: tokenizers::Error) -> Error {
    Error::Input(format!("cannot tokenize the text: {e}"))
}

/// The part of `tokenizer.json` that the crate does not check.
#[derive(Deserialize)]
struct Listed {
    #[serde(default)]
    added_tokens: Vec<Added>,
}

#[derive(Deserialize)]
struct Added {
    id: u32,
    content: String,
}
