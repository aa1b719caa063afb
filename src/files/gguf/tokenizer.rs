//! Makes a `tokenizer.json` of the keys of a GGUF file.

use super::{Gguf, Kind, vocabulary::kind};
use crate::error::Result;
use serde_json::{Map, Value as Json, json};
use std::collections::HashMap;

/// How a byte-level tokenizer cuts a text before it merges.
struct Split {
    /// What `tokenizer.ggml.pre` calls it.
    names: &'static [&'static str],
    pre_tokenizer: fn() -> Json,
    normalizer: fn() -> Json,
    /// A piece that is a token is that token, whatever the merges say.
    ignore_merges: bool,
    /// A text begins with BOS where no key says so.
    bos: bool,
}

/// Cuts a text by a pattern; the byte level after it only turns the pieces into bytes and cuts nothing.
fn pattern(numbers: &str) -> Json {
    let words = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|";
    let rest = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
    json!({"type": "Sequence", "pretokenizers": [
        {"type": "Split", "pattern": {"Regex": format!("{words}{numbers}{rest}")}, "behavior": "Isolated", "invert": false},
        byte_level(false)]})
}

fn byte_level(use_regex: bool) -> Json {
    json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": use_regex})
}

const SPLITS: [Split; 4] = [
    Split {
        names: &["llama-bpe", "llama3", "llama-v3"],
        pre_tokenizer: || pattern(r"\p{N}{1,3}"),
        normalizer: || Json::Null,
        ignore_merges: true,
        bos: true,
    },
    Split {
        names: &["smollm"],
        pre_tokenizer: || json!({"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": true}, byte_level(true)]}),
        normalizer: || Json::Null,
        ignore_merges: false,
        bos: false,
    },
    Split {
        names: &["qwen2"],
        pre_tokenizer: || pattern(r"\p{N}"),
        normalizer: || json!({"type": "NFC"}),
        ignore_merges: false,
        bos: false,
    },
    Split {
        names: &["gpt-2"],
        pre_tokenizer: || byte_level(true),
        normalizer: || Json::Null,
        ignore_merges: false,
        bos: false,
    },
];

/// The name that `tokenizer.ggml.pre` has for the rule by which this `pre_tokenizer` cuts a text.
pub(super) fn split_name(pre_tokenizer: &Json) -> Option<&'static str> {
    let cuts = cuts(pre_tokenizer);
    SPLITS.iter().find(|split| self::cuts(&(split.pre_tokenizer)()) == cuts).map(|split| split.names[0])
}

/// The steps of a pre-tokenizer, without flags that only matter for positions in the text.
fn cuts(step: &Json) -> Vec<String> {
    if let Some(steps) = step["pretokenizers"].as_array() {
        return steps.iter().flat_map(cuts).collect();
    }
    let flags = ["type", "pattern", "behavior", "invert", "individual_digits", "add_prefix_space", "use_regex"];
    let value = |flag| match (&step[flag], flag) {
        (Json::Null, "use_regex") if step["type"] == "ByteLevel" => "true".into(), // its default
        (value, _) => value.to_string(),
    };
    vec![flags.map(value).join(" ")]
}

impl Gguf {
    /// The tokenizer; `None` when the file has none.
    ///
    /// # Errors
    /// [`Error::Unsupported`](crate::Error::Unsupported) for another kind of tokenizer or another split of the text;
    /// [`Error::File`](crate::Error::File) for keys that are missing, malformed or contradictory.
    pub fn tokenizer(&self) -> Result<Option<Json>> {
        match self.text("tokenizer.ggml.model")? {
            None | Some("none" | "no_vocab") => Ok(None),
            Some("gpt2") => self.byte_level().map(Some),
            Some("llama") => self.sentence_pieces().map(Some),
            Some(other) => self.unsupported(format!(
                "tokenizer.ggml.model {other:?}; supported: \"gpt2\" (byte-level BPE) and \"llama\" (SentencePiece)"
            )),
        }
    }

    fn byte_level(&self) -> Result<Json> {
        let name = self.text("tokenizer.ggml.pre")?.unwrap_or("default");
        let Some(split) = SPLITS.iter().find(|split| split.names.contains(&name)) else {
            let names: Vec<&str> = SPLITS.iter().flat_map(|split| split.names).copied().collect();
            return self.unsupported(format!("tokenizer.ggml.pre {name:?}; supported: {}", names.join(", ")));
        };
        let Some(merges) = self.strings("tokenizer.ggml.merges")? else {
            return self
                .wrong("tokenizer.ggml.merges is missing, expected the merges of a byte-level tokenizer".into());
        };
        let (tokens, kinds) = self.tokens()?;
        let model = json!({"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "ignore_merges": split.ignore_merges,
            "vocab": self.ids(&tokens)?, "merges": merges});
        self.file(
            &tokens,
            &kinds,
            split.bos,
            json!({"normalizer": (split.normalizer)(),
            "pre_tokenizer": (split.pre_tokenizer)(), "decoder": byte_level(true), "model": model}),
        )
    }

    /// SentencePiece's BPE merges first those neighbours whose token has the highest score. A token that is made of two
    /// others is a merge, so sorting these by score gives the list of merges, as transformers converts such models.
    fn sentence_pieces(&self) -> Result<Json> {
        let (tokens, kinds) = self.tokens()?;
        let scores =
            self.words("tokenizer.ggml.scores", "a number for each token", &[Kind::F32], f32::from_le_bytes)?;
        let Some(scores) = scores.filter(|scores| scores.len() == tokens.len()) else {
            return self.wrong("tokenizer.ggml.scores is missing, or has not a number for each token".into());
        };
        let ids: HashMap<&str, usize> = tokens.iter().enumerate().map(|(id, token)| (*token, id)).collect();
        let mut merges = Vec::new();
        for (id, token) in tokens.iter().enumerate() {
            if matches!(kinds[id], kind::CONTROL | kind::UNKNOWN | kind::BYTE) {
                continue;
            }
            for (at, _) in token.char_indices().skip(1) {
                let (left, right) = token.split_at(at);
                if let (Some(l), Some(r)) = (ids.get(left), ids.get(right)) {
                    merges.push((scores[id], left.len(), right.len(), *l, *r));
                }
            }
        }
        merges.sort_by(|a, b| b.0.total_cmp(&a.0).then((b.1, b.2, a.3, a.4).cmp(&(a.1, a.2, b.3, b.4))));
        let merges: Vec<Json> = merges.iter().map(|&(.., l, r)| json!([tokens[l], tokens[r]])).collect();
        let unknown = match self.special("unknown", tokens.len())? {
            Some(id) => Some(id as usize),
            None => kinds.iter().position(|kind| *kind == kind::UNKNOWN),
        };
        let prefix = self.flag("tokenizer.ggml.add_space_prefix")?.unwrap_or(true);
        let replace = json!({"type": "Replace", "pattern": {"String": " "}, "content": "▁"});
        let normalizers = match prefix {
            true => vec![json!({"type": "Prepend", "prepend": "▁"}), replace],
            false => vec![replace],
        };
        let mut decoders = vec![
            json!({"type": "Replace", "pattern": {"String": "▁"}, "content": " "}),
            json!({"type": "ByteFallback"}),
            json!({"type": "Fuse"}),
        ];
        decoders.extend(prefix.then(|| json!({"type": "Strip", "content": " ", "start": 1, "stop": 0})));
        let model = json!({"type": "BPE", "dropout": null, "unk_token": unknown.map(|id| tokens[id]),
            "continuing_subword_prefix": null, "end_of_word_suffix": null, "fuse_unk": true, "byte_fallback": true,
            "ignore_merges": false, "vocab": self.ids(&tokens)?, "merges": merges});
        self.file(
            &tokens,
            &kinds,
            true,
            json!({"normalizer": {"type": "Sequence", "normalizers": normalizers},
            "pre_tokenizer": null, "decoder": {"type": "Sequence", "decoders": decoders}, "model": model}),
        )
    }

    /// Ids by tokens, which must differ.
    fn ids(&self, tokens: &[&str]) -> Result<Map<String, Json>> {
        let mut ids = Map::new();
        for (id, token) in tokens.iter().enumerate() {
            if let Some(other) = ids.insert(token.to_string(), json!(id)) {
                return self.wrong(format!("tokenizer.ggml.tokens has {token:?} twice, as {other} and {id}"));
            }
        }
        Ok(ids)
    }

    /// What all tokenizers have: added tokens, and BOS in front of a text if a key says so, or none and `bos` does.
    fn file(&self, tokens: &[&str], kinds: &[u32], bos: bool, mut file: Json) -> Result<Json> {
        let added = |(id, kind): (usize, &u32)| {
            let special = match *kind {
                kind::CONTROL | kind::UNKNOWN => true,
                kind::USER_DEFINED => false,
                _ => return None,
            };
            Some(json!({"id": id, "content": tokens[id], "single_word": false, "lstrip": false, "rstrip": false,
                "normalized": false, "special": special}))
        };
        file["version"] = json!("1.0");
        file["truncation"] = Json::Null;
        file["padding"] = Json::Null;
        file["added_tokens"] = kinds.iter().enumerate().filter_map(added).collect();
        let bos = self.flag("tokenizer.ggml.add_bos_token")?.unwrap_or(bos);
        file["post_processor"] = match self.special("bos", tokens.len())?.filter(|_| bos) {
            None => Json::Null,
            Some(id) => {
                let token = tokens[id as usize];
                let text = |name: &str, n: u8| json!({"Sequence": {"id": name, "type_id": n}});
                json!({"type": "TemplateProcessing",
                    "single": [{"SpecialToken": {"id": token, "type_id": 0}}, text("A", 0)],
                    "pair": [{"SpecialToken": {"id": token, "type_id": 0}}, text("A", 0), text("B", 1)],
                    "special_tokens": {token: {"id": token, "ids": [id], "tokens": [token]}}})
            }
        };
        Ok(file)
    }
}
