//! Text to token ids and back, as `tokenizer.json` says.

use std::path::Path;
use std::sync::Arc;

use tokenizers::{AddedToken, AddedVocabulary, Decoder, Model, NormalizedString, Normalizer, OffsetType, PreTokenizer};

use super::{
    decoding::Decoding,
    tokenizer_config::TokenizerConfig,
    tokenizer_file::{check_ids, explain, guarded, read, vocab},
};
use crate::{
    error::{Error, Result},
    files::{
        gguf::Gguf,
        json::{self, BYTE_ORDER_MARK},
    },
};

/// A checkpoint's tokenizer. Clones share one vocabulary.
///
/// The ids are those that Hugging Face's `tokenizers` gives for the same file, with one exception that has to be asked
/// for: [`Tokenizer::encode_plain`].
#[derive(Clone)]
pub struct Tokenizer(Arc<Inner>);

struct Inner {
    hf: tokenizers::Tokenizer,
    /// The added tokens of `hf`, with special tokens in a text not recognised.
    plain: AddedVocabulary,
    bos: Option<u32>,
    decoding: Decoding,
}

impl Tokenizer {
    /// Reads `tokenizer.json` in `dir`, and the tokens that only `tokenizer_config.json` lists or names as special, or the
    /// vocabulary of the GGUF file that `dir` is; `None` when there is no such thing.
    ///
    /// # Errors
    /// A file cannot be read, or [`Tokenizer::from_bytes`] refuses it.
    pub fn from_dir(dir: &Path) -> Result<Option<Self>> {
        if dir.is_file() {
            return Self::of_gguf(&Gguf::open(dir)?);
        }
        let path = dir.join("tokenizer.json");
        let Some(text) = json::read_optional(&path)? else { return Ok(None) };
        Self::parse(&path, text.trim_start_matches(BYTE_ORDER_MARK).as_bytes(), Some(&TokenizerConfig::read(dir)?))
            .map(Some)
    }

    /// The vocabulary of a GGUF file, `None` when it has none.
    pub(crate) fn of_gguf(gguf: &Gguf) -> Result<Option<Self>> {
        let Some(json) = gguf.tokenizer()? else { return Ok(None) };
        Self::from_bytes(gguf.path(), json.to_string().as_bytes()).map(Some)
    }

    /// Reads the content of a `tokenizer.json`; `path` is what errors call it.
    ///
    /// Truncation and padding that the file may still have from training are dropped: a prompt is never cut.
    ///
    /// # Errors
    /// [`Error::File`] when it is no tokenizer, or lists an added token under an id that the vocabulary contradicts or that
    /// no vocabulary is large enough for.
    pub fn from_bytes(path: impl AsRef<Path>, bytes: &[u8]) -> Result<Self> {
        Self::parse(path.as_ref(), bytes, None)
    }

    fn parse(path: &Path, bytes: &[u8], config: Option<&TokenizerConfig>) -> Result<Self> {
        let wrong = |e: &dyn std::fmt::Display| Error::file(path, format!("not a tokenizer that aoji can read: {e}"));
        let mut hf = read(bytes).map_err(|e| wrong(&e))?;
        hf.with_truncation(None).map_err(|e| wrong(&e))?.with_padding(None);
        if let Some(config) = config {
            let more = config.added_tokens(&hf);
            if !more.is_empty() {
                guarded(|| hf.add_tokens(more)).map_err(|e| wrong(&e))?;
                check_ids(&hf).map_err(|e| wrong(&e))?;
            }
        }

        let mut plain = hf.get_added_vocabulary().clone();
        plain.set_encode_special_tokens(true);
        let decoding = Decoding::of(hf.get_decoder());
        let mut inner = Inner { hf, plain, bos: None, decoding };
        let encode = |special| inner.encode("a", special).map_err(|e| wrong(&explain(bytes, e)));
        let bare = encode(false)?;
        inner.bos = match encode(true)?.split_first() {
            Some((first, rest)) if !bare.is_empty() && rest.starts_with(&bare) => Some(*first),
            _ => None,
        };
        Ok(Self(Arc::new(inner)))
    }

    /// Token ids of `text`; with `special`, also what the file's post-processor adds (for Llama 3: one BOS in front).
    ///
    /// The text of a special token inside `text` becomes that special token, as in Hugging Face's libraries. For text
    /// that other people wrote there is [`Tokenizer::encode_plain`].
    ///
    /// # Errors
    /// [`Error::Input`] when the file's rules cannot be applied to the text.
    pub fn encode(&self, text: &str, special: bool) -> Result<Vec<u32>> {
        self.0.encode(text, special).map_err(cannot_encode)
    }

    /// Token ids of `text` with nothing added, the text of special tokens taken as plain text: `<|end_of_text|>`
    /// typed by a user is fifteen characters, not the end of the prompt.
    ///
    /// # Errors
    /// As [`Tokenizer::encode`].
    pub fn encode_plain(&self, text: &str) -> Result<Vec<u32>> {
        self.0.encode_seeing(&self.0.plain, text, &[])
    }

    /// Token ids of `text` with nothing added. A character of `marks` stands for the text of a special token that shall
    /// stay text. All of it is encoded as one text, so the rest gets the same tokens as in any other text.
    ///
    /// # Errors
    /// As [`Tokenizer::encode`].
    pub(super) fn encode_marked(&self, text: &str, marks: &[(&str, char)]) -> Result<Vec<u32>> {
        let shown: Vec<_> = marks.iter().map(|&(special, mark)| (mark, self.0.normalized(special))).collect();
        self.0.encode_seeing(self.0.hf.get_added_vocabulary(), text, &shown)
    }

    /// Text of `ids`, without special tokens if `skip_special`. Ids that name no token add nothing: models often
    /// have more rows than their tokenizer has tokens.
    ///
    /// # Errors
    /// [`Error::Input`] when the file's decoder cannot be applied.
    pub fn decode(&self, ids: &[u32], skip_special: bool) -> Result<String> {
        let tokens: Vec<String> = ids.iter().filter_map(|&id| self.visible(id, skip_special)).collect();
        match self.0.hf.get_decoder() {
            _ if tokens.is_empty() => Ok(String::new()), // the crate's BPEDecoder subtracts 1 from their number
            Some(decoder) => {
                guarded(|| decoder.decode(tokens)).map_err(|e| Error::Input(format!("cannot decode these tokens: {e}")))
            }
            None => Ok(tokens.join(" ")),
        }
    }

    /// Number of token ids: one more than the highest, added tokens included.
    pub fn vocab(&self) -> usize {
        vocab(&self.0.hf)
    }

    /// Id of the token that is written exactly so in the vocabulary.
    pub fn token_id(&self, token: &str) -> Option<u32> {
        self.0.hf.token_to_id(token)
    }

    /// How the vocabulary writes token `id` (byte-level: `Ġthe`), `None` when there is no such token.
    pub fn token(&self, id: u32) -> Option<String> {
        self.added(id).map(|token| token.content.clone()).or_else(|| self.0.hf.id_to_token(id))
    }

    /// Whether `id` is a special token: decoding can skip it, and a user's text never contains it.
    pub fn is_special(&self, id: u32) -> bool {
        self.added(id).is_some_and(|token| token.special)
    }

    /// Whether `id` was added to the vocabulary, as special tokens are, and is not one of the words that the vocabulary was
    /// trained for.
    pub fn is_added(&self, id: u32) -> bool {
        self.added(id).is_some()
    }

    /// The bytes that token `id` adds to a text when it is not the first token; possibly half a character, and nothing
    /// for an id that names no token.
    pub fn token_bytes(&self, id: u32) -> Vec<u8> {
        self.bytes_at(id, false)
    }

    /// The same; for the `first` token of a text, before the decoder drops what it drops at the beginning.
    pub(super) fn bytes_at(&self, id: u32, first: bool) -> Vec<u8> {
        self.visible(id, false).map_or(Vec::new(), |token| self.0.decoding.token_bytes(&self.0.hf, token, first))
    }

    /// The token as decoders get it; `None` when the text does not show it.
    pub(super) fn visible(&self, id: u32, skip_special: bool) -> Option<String> {
        match self.added(id) {
            Some(token) if token.special => (!skip_special).then(|| token.content.clone()),
            // An added token was changed by the normalizer, and the decoder undoes that.
            _ => self.0.hf.id_to_token(id),
        }
    }

    fn added(&self, id: u32) -> Option<&AddedToken> {
        self.0.hf.get_added_vocabulary().get_added_tokens_decoder().get(&id)
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

    pub(super) fn decoding(&self) -> &Decoding {
        &self.0.decoding
    }
}

impl Inner {
    fn encode(&self, text: &str, special: bool) -> tokenizers::Result<Vec<u32>> {
        let encoding = guarded(|| self.hf.encode_fast(text, special))?;
        Ok(encoding.get_ids().to_vec())
    }

    /// The steps of the crate's `encode` with another set of added tokens; a second tokenizer would double the
    /// vocabulary. `marks` are replaced by what they stand for after the added tokens have been found and the text is
    /// normalized.
    fn encode_seeing(&self, added: &AddedVocabulary, text: &str, marks: &[(char, String)]) -> Result<Vec<u32>> {
        let ids = guarded(|| {
            let mut split = added.extract_and_normalize(self.hf.get_normalizer(), text);
            split.normalize(|piece| {
                let here: Vec<_> = marks.iter().filter(|(mark, _)| piece.get().contains(*mark)).collect();
                here.into_iter().try_for_each(|(mark, shown)| piece.replace(*mark, shown))
            })?;
            if let Some(pre_tokenizer) = self.hf.get_pre_tokenizer() {
                pre_tokenizer.pre_tokenize(&mut split)?;
            }
            self.hf.get_model().tokenize_in_pretokenized(&mut split, None)?;
            Ok(split.into_encoding(None, 0, OffsetType::None)?.get_ids().to_vec())
        });
        ids.map_err(cannot_encode)
    }

    /// `text` as the normalizer writes it in the middle of other text.
    fn normalized(&self, text: &str) -> String {
        let normalize = |text: String| {
            let mut text = NormalizedString::from(text);
            let done = guarded(|| self.hf.get_normalizer().map_or(Ok(()), |n| n.normalize(&mut text)));
            done.is_ok().then(|| text.get().to_string())
        };
        // The x in front keeps the normalizer from adding what it adds at the beginning of a text.
        let amid = normalize(format!("x{text}")).zip(normalize("x".into()));
        amid.and_then(|(both, x)| Some(both.strip_prefix(&x)?.to_string())).unwrap_or_else(|| text.into())
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
