//! Log-probabilities in the shapes that clients know: that of completions, that of chats, and vLLM's of a prompt's tokens.

use crate::{TokenLogprobs, TokenStream, Tokenizer};
use serde::Serialize;
use std::{collections::BTreeMap, fmt::Write};
use utoipa::ToSchema;

/// A token and what the batch said of it.
pub(super) type Scored = (u32, Option<TokenLogprobs>);

/// A token as the completions API writes it: its text, or `bytes:\xed\x95` where it is not a whole number of characters.
pub(super) fn name(tokenizer: &Tokenizer, id: u32) -> String {
    written(tokenizer.token_bytes(id))
}

fn written(bytes: Vec<u8>) -> String {
    String::from_utf8(bytes).unwrap_or_else(|e| {
        e.as_bytes().iter().fold("bytes:".to_string(), |mut text, byte| {
            let _ = write!(text, "\\x{byte:02x}"); // writing to a string cannot fail
            text
        })
    })
}

/// JSON has no infinity; OpenAI writes this number for a token that cannot be.
fn finite(logprob: f32) -> f32 {
    logprob.max(-9999.0)
}

/// Log-probabilities as `/v1/completions` reports them: four lists of the same length.
#[derive(Debug, Default, Clone, Serialize, ToSchema)]
pub(super) struct LegacyLogprobs {
    /// Texts of the tokens, `bytes:\x..` for a part of a character.
    pub tokens: Vec<String>,
    /// Their log-probabilities; `null` for the first token of a prompt.
    pub token_logprobs: Vec<Option<f32>>,
    /// For each the most likely tokens and the token itself.
    pub top_logprobs: Vec<Option<BTreeMap<String, f32>>>,
    /// How many characters of the text come before each.
    pub text_offset: Vec<usize>,
}

/// Makes [`LegacyLogprobs`], in pieces.
#[derive(Debug)]
pub(super) struct Legacy {
    /// Characters that the stream has given so far.
    chars: usize,
    stream: TokenStream,
}

impl Legacy {
    /// For tokens that come to `stream` next, at the beginning of the reply's text.
    pub fn new(stream: TokenStream) -> Legacy {
        Legacy { chars: 0, stream }
    }

    /// From now on for tokens that come to `stream`, after this many characters of the reply's text.
    pub fn go_on(&mut self, chars: usize, stream: TokenStream) {
        *self = Legacy { chars, stream };
    }

    /// The lists for the next tokens. The name of a token is the text that it adds, so all names together are the text.
    pub fn add(&mut self, tokens: &[Scored]) -> LegacyLogprobs {
        let mut lists = LegacyLogprobs::default();
        for token in tokens {
            lists.extend(self.without_text(std::slice::from_ref(token)));
            self.chars += self.stream.push(token.0).map_or(0, |text| text.chars().count());
        }
        lists
    }

    /// The lists for tokens that add nothing to the text, such as a BOS in front of it.
    pub fn without_text(&self, tokens: &[Scored]) -> LegacyLogprobs {
        let mut lists = LegacyLogprobs::default();
        for (id, scored) in tokens {
            let name = |id: u32| written(self.stream.bytes_of(id));
            lists.tokens.push(name(*id));
            lists.token_logprobs.push(scored.as_ref().map(|s| finite(s.logprob)));
            lists.top_logprobs.push(scored.as_ref().map(|s| {
                let top = s.top.iter().copied().chain([(s.token, s.logprob)]);
                top.map(|(id, logprob)| (name(id), finite(logprob))).collect()
            }));
            lists.text_offset.push(self.chars + self.stream.open_chars());
        }
        lists
    }
}

impl LegacyLogprobs {
    /// Adds the lists of later tokens.
    pub fn extend(&mut self, later: LegacyLogprobs) {
        self.tokens.extend(later.tokens);
        self.token_logprobs.extend(later.token_logprobs);
        self.top_logprobs.extend(later.top_logprobs);
        self.text_offset.extend(later.text_offset);
    }
}

/// Log-probabilities as `/v1/chat/completions` reports them.
#[derive(Debug, Default, Clone, Serialize, ToSchema)]
pub(super) struct ChatLogprobs {
    /// One for each token.
    pub content: Vec<ChatToken>,
    /// Always absent: models here refuse in the text of the answer.
    refusal: Option<()>,
}

/// A token of a chat's answer.
#[derive(Debug, Clone, Serialize, ToSchema)]
pub(super) struct ChatToken {
    #[serde(flatten)]
    token: Alternative,
    /// The most likely tokens in its place.
    top_logprobs: Vec<Alternative>,
}

/// A token that was possible.
#[derive(Debug, Clone, Serialize, ToSchema)]
struct Alternative {
    /// Its text, with U+FFFD for a part of a character.
    token: String,
    /// Natural logarithm of its probability.
    logprob: f32,
    /// Its bytes.
    bytes: Vec<u8>,
}

impl ChatLogprobs {
    /// The report on `tokens`, which come to `stream` next; tokens without a log-probability are left out.
    pub fn of(stream: &mut TokenStream, tokens: &[Scored]) -> ChatLogprobs {
        let mut content = Vec::with_capacity(tokens.len());
        for (id, scored) in tokens {
            let alternative = |id, logprob| {
                let bytes = stream.bytes_of(id);
                Alternative { token: String::from_utf8_lossy(&bytes).into_owned(), logprob: finite(logprob), bytes }
            };
            content.extend(scored.as_ref().map(|s| ChatToken {
                token: alternative(s.token, s.logprob),
                top_logprobs: s.top.iter().map(|&(id, logprob)| alternative(id, logprob)).collect(),
            }));
            stream.push(*id);
        }
        ChatLogprobs { content, refusal: None }
    }
}

/// A token of a prompt, as vLLM reports it.
#[derive(Debug, Clone, Serialize, ToSchema)]
pub(super) struct PromptToken {
    logprob: f32,
    /// Its rank among the most likely tokens, if it is one of those that were asked for.
    rank: Option<usize>,
    decoded_token: String,
}

/// The log-probabilities of a prompt's tokens and of the `top` most likely ones, as vLLM reports them: by id, `null` for
/// the first token.
pub(super) fn prompt(
    tokenizer: &Tokenizer,
    scored: &[TokenLogprobs],
    top: u32,
) -> Vec<Option<BTreeMap<u32, PromptToken>>> {
    let token =
        |id, logprob, rank| (id, PromptToken { logprob: finite(logprob), rank, decoded_token: name(tokenizer, id) });
    let each = |s: &TokenLogprobs| {
        // The token itself comes first, so that where it is also among the others, its known rank replaces the unknown
        // one.
        let own = token(s.token, s.logprob, None);
        let top =
            s.top.iter().take(top as usize).enumerate().map(|(i, &(id, logprob))| token(id, logprob, Some(i + 1)));
        Some([own].into_iter().chain(top).collect())
    };
    [None].into_iter().chain(scored.iter().map(each)).collect()
}
