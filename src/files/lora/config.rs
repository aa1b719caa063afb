//! `adapter_config.json`: which modules of a model an adapter changes, with which rank and scale, as PEFT decides it (0.21:
//! `check_target_module_exists` and `get_pattern_key`).

use crate::{
    error::{Error, Result},
    files::{config::Config, json, weights::Weights},
};
use fancy_regex::Regex;
use serde::{
    Deserialize, Deserializer,
    de::{MapAccess, Visitor},
};
use serde_json::Value;
use std::{collections::BTreeMap, fmt, marker::PhantomData, path::Path};

/// The matrices of a layer that an adapter may change.
pub const TARGETS: [&str; 7] = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"];
/// Other modules that a pattern may hit, and that are not adapted here.
const OTHERS: [&str; 2] = ["model.embed_tokens", "lm_head"];
/// Initialisations that leave the base model's weights alone; the others (PiSSA, OLoRA, LoftQ, CorDA, LoRA-GA) change them.
const INITS: [&str; 4] = ["gaussian", "eva", "orthogonal", "mica"];
/// Keys that change nothing of a trained adapter: bookkeeping, and settings of the training.
const HARMLESS: [&str; 16] = [
    "task_type",
    "inference_mode",
    "revision",
    "auto_mapping",
    "peft_version",
    "lora_dropout",
    "megatron_config",
    "megatron_core",
    "loftq_config",
    "eva_config",
    "corda_config",
    "lora_ga_config",
    "qalora_group_size",
    "runtime_config",
    "ensure_weight_tying",
    "merge_weights",
];

/// What the file says.
#[derive(Deserialize)]
pub(super) struct AdapterConfig {
    peft_type: String,
    r: usize,
    lora_alpha: f64,
    #[serde(default)]
    use_rslora: bool,
    target_modules: Option<Names>,
    exclude_modules: Option<Names>,
    layers_to_transform: Option<OneOrMany<usize>>,
    layers_pattern: Option<OneOrMany<String>>,
    rank_pattern: Option<Patterns<usize>>,
    alpha_pattern: Option<Patterns<f64>>,
    base_model_name_or_path: Option<String>,
    /// Everything else.
    #[serde(flatten)]
    rest: BTreeMap<String, Value>,
}

/// A module that the adapter changes.
pub(super) struct Module {
    /// [rows, cols] of its weight.
    pub rows: usize,
    pub cols: usize,
    pub rank: usize,
    pub scale: f64,
}

impl AdapterConfig {
    /// Reads the file. Everything that would not give `W + scale * B A` is refused by name, and so is every unknown key
    /// whose value is not known to be harmless.
    pub fn read(path: &Path) -> Result<AdapterConfig> {
        let adapter: AdapterConfig = json::parse(&json::read(path)?)
            .map_err(|e| Error::file(path, format!("is not the configuration of a LoRA adapter: {e}")))?;
        let unsupported = |what: String| Err(Error::Unsupported { path: path.into(), what });
        if adapter.peft_type != "LORA" {
            return unsupported(format!("peft_type is {:?}; only LORA adapters can be merged", adapter.peft_type));
        }
        let harmless = |key: &str, v: &Value| match key {
            "bias" => *v == "none",
            "init_lora_weights" => v.as_str().is_none_or(|init| INITS.contains(&init)),
            _ if HARMLESS.contains(&key) => true,
            _ => is_empty(v),
        };
        match adapter.rest.iter().find(|(key, v)| !harmless(key, v)) {
            Some((key, v)) => unsupported(format!(
                "{key} is {v}; aoji merges plain LoRA of {}, without biases and without modules of their own",
                TARGETS.join(", ")
            )),
            None => Ok(adapter),
        }
    }

    /// The base model that it names.
    pub fn base(&self) -> &str {
        self.base_model_name_or_path.as_deref().unwrap_or("a model that it does not name")
    }

    /// The modules of a model of `config` that it changes, by their names.
    pub fn modules(&self, path: &Path, config: &Config) -> Result<BTreeMap<String, Module>> {
        let targets = self.targets(path)?;
        let ranks = self.rank_pattern.as_ref().map(|p| p.compile(path, "rank_pattern")).transpose()?;
        let alphas = self.alpha_pattern.as_ref().map(|p| p.compile(path, "alpha_pattern")).transpose()?;
        if let Some(other) = OTHERS.into_iter().find(|name| targets.has(name)) {
            let what = format!("target_modules names {other}; aoji merges {}", TARGETS.join(", "));
            return Err(Error::Unsupported { path: path.into(), what });
        }
        let mut modules = BTreeMap::new();
        Weights::table(config, |name, shape| {
            let module = name.strip_suffix(".weight").filter(|m| TARGETS.iter().any(|t| m.ends_with(&format!(".{t}"))));
            let (Some(module), &[rows, cols]) = (module, shape) else { return Ok(()) };
            if !targets.has(module) {
                return Ok(());
            }
            let rank = ranks.as_ref().and_then(|p| p.first(module)).unwrap_or(self.r);
            let alpha = alphas.as_ref().and_then(|p| p.first(module)).unwrap_or(self.lora_alpha);
            if rank == 0 {
                return Err(Error::file(path, format!("the rank of {module} is 0, expected at least 1")));
            }
            let scale = alpha / if self.use_rslora { (rank as f64).sqrt() } else { rank as f64 };
            modules.insert(module.to_string(), Module { rows, cols, rank, scale });
            Ok(())
        })?;
        Ok(modules)
    }

    fn targets(&self, path: &Path) -> Result<Targets<'_>> {
        let layers = self.layers_to_transform.as_ref().map(OneOrMany::list).filter(|list| !list.is_empty());
        let target = match &self.target_modules {
            // What PEFT takes for a Llama.
            None => Matcher::Names(vec!["q_proj", "v_proj"]),
            Some(Names::One(all)) if all.eq_ignore_ascii_case("all-linear") => Matcher::Names(TARGETS.to_vec()),
            Some(Names::One(_)) if layers.is_some() => {
                return Err(Error::file(
                    path,
                    "layers_to_transform is given, so target_modules must be a list, as in PEFT",
                ));
            }
            Some(names) => names.matcher(path, "target_modules")?,
        };
        let exclude = match &self.exclude_modules {
            None => Matcher::Names(Vec::new()),
            Some(names) => names.matcher(path, "exclude_modules")?,
        };
        let patterns = self.layers_pattern.as_ref().map_or(&[][..], OneOrMany::list);
        let numbered: Vec<Regex> = match patterns {
            [] => vec![regex(path, "layers_pattern", r"^.*?\.[^.]*\.(\d+)\.")?],
            patterns => patterns
                .iter()
                .map(|p| regex(path, "layers_pattern", &format!(r"^(?:.*?\.)?(?:{p})\.(\d+)\.")))
                .collect::<Result<_>>()?,
        };
        Ok(Targets { target, exclude, layers, numbered })
    }
}

/// Nothing is said with it.
fn is_empty(v: &Value) -> bool {
    match v {
        Value::Null | Value::Bool(false) => true,
        Value::String(v) => v.is_empty(),
        Value::Array(v) => v.is_empty(),
        Value::Object(v) => v.is_empty(),
        _ => false,
    }
}

fn regex(path: &Path, key: &str, pattern: &str) -> Result<Regex> {
    Regex::new(pattern).map_err(|e| Error::file(path, format!("{key} is no regular expression: {e}")))
}

/// Which modules are meant.
struct Targets<'a> {
    target: Matcher<'a>,
    exclude: Matcher<'a>,
    /// Only these layers, which `numbered` finds in a name.
    layers: Option<&'a [usize]>,
    numbered: Vec<Regex>,
}

impl Targets<'_> {
    fn has(&self, module: &str) -> bool {
        if self.exclude.has(module) || !self.target.has(module) {
            return false;
        }
        // A name in full selects its module whatever its layer.
        let (Some(layers), false) = (self.layers, self.target.names_in_full(module)) else { return true };
        let layer = self.numbered.iter().find_map(|r| r.captures(module).ok()??.get(1)?.as_str().parse().ok());
        layer.is_some_and(|l: usize| layers.contains(&l))
    }
}

enum Matcher<'a> {
    /// Names, or the ends of names.
    Names(Vec<&'a str>),
    /// A regular expression for the whole name.
    Pattern(Regex),
}

impl Matcher<'_> {
    fn has(&self, module: &str) -> bool {
        match self {
            Matcher::Names(names) => names.iter().any(|n| ends_with(module, n)),
            Matcher::Pattern(regex) => regex.is_match(module).unwrap_or(false),
        }
    }

    fn names_in_full(&self, module: &str) -> bool {
        matches!(self, Matcher::Names(names) if names.contains(&module))
    }
}

/// `name` is `end`, or its last parts are.
fn ends_with(name: &str, end: &str) -> bool {
    name.strip_suffix(end).is_some_and(|rest| rest.is_empty() || rest.ends_with('.'))
}

/// A list of names, or one regular expression.
#[derive(Deserialize)]
#[serde(untagged)]
enum Names {
    One(String),
    Many(Vec<String>),
}

impl Names {
    fn matcher(&self, path: &Path, key: &str) -> Result<Matcher<'_>> {
        match self {
            Names::One(pattern) if pattern.is_empty() => Ok(Matcher::Names(Vec::new())),
            Names::One(pattern) => regex(path, key, &format!("^(?:{pattern})$")).map(Matcher::Pattern),
            Names::Many(names) => Ok(Matcher::Names(names.iter().map(String::as_str).collect())),
        }
    }
}

#[derive(Deserialize)]
#[serde(untagged)]
enum OneOrMany<T> {
    Many(Vec<T>),
    One(T),
}

impl<T> OneOrMany<T> {
    fn list(&self) -> &[T] {
        match self {
            OneOrMany::Many(list) => list,
            OneOrMany::One(one) => std::slice::from_ref(one),
        }
    }
}

/// Values under regular expressions for the end of a name, in the order of the file: the first that matches counts.
struct Patterns<T>(Vec<(String, T)>);

impl<T: Copy> Patterns<T> {
    fn compile(&self, path: &Path, key: &str) -> Result<Compiled<T>> {
        let one =
            |(pattern, value): &(String, T)| Ok((regex(path, key, &format!(r"^(?:.*\.)?(?:{pattern})$"))?, *value));
        self.0.iter().map(one).collect::<Result<_>>().map(Compiled)
    }
}

struct Compiled<T>(Vec<(Regex, T)>);

impl<T: Copy> Compiled<T> {
    fn first(&self, module: &str) -> Option<T> {
        self.0.iter().find(|(regex, _)| regex.is_match(module).unwrap_or(false)).map(|(_, value)| *value)
    }
}

impl<'de, T: Deserialize<'de>> Deserialize<'de> for Patterns<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Ordered<T>(PhantomData<T>);
        impl<'de, T: Deserialize<'de>> Visitor<'de> for Ordered<T> {
            type Value = Patterns<T>;
            fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
                f.write_str("an object of patterns and numbers")
            }
            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Patterns<T>, A::Error> {
                let mut list = Vec::new();
                while let Some(entry) = map.next_entry()? {
                    list.push(entry);
                }
                Ok(Patterns(list))
            }
        }
        deserializer.deserialize_map(Ordered(PhantomData))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `name:rank:alpha` of the modules that a configuration with these keys changes, in a model of three layers; or the error.
    fn modules(keys: &str) -> Result<Vec<String>, String> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("adapter_config.json");
        let text = format!(r#"{{"peft_type": "LORA", "r": 4, "lora_alpha": 8, "bias": "none", {keys}}}"#);
        std::fs::write(&path, text).unwrap();
        let config = r#"{"model_type": "llama", "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3,
            "num_attention_heads": 2, "vocab_size": 100}"#;
        let config = Config::from_json(Path::new("config.json"), config, None).unwrap();
        let named = AdapterConfig::read(&path).and_then(|a| a.modules(&path, &config)).map_err(|e| e.to_string())?;
        let short = |name: &str| name.replace("model.layers.", "").replace("self_attn.", "").replace("mlp.", "");
        Ok(named.iter().map(|(n, m)| format!("{}:{}:{}", short(n), m.rank, m.scale * m.rank as f64)).collect())
    }

    fn names(keys: &str) -> String {
        let all = modules(keys).unwrap_or_else(|e| panic!("{keys}: {e}"));
        all.iter().map(|m| m.split(':').next().unwrap()).collect::<Vec<_>>().join(" ")
    }

    /// The verdicts are those of PEFT 0.21's `check_target_module_exists`.
    #[test]
    fn targets_are_pefts() {
        let q = "0.q_proj 1.q_proj 2.q_proj";
        for (keys, want) in [
            (r#""target_modules": ["q_proj"]"#, q),
            (r#""target_modules": null"#, "0.q_proj 0.v_proj 1.q_proj 1.v_proj 2.q_proj 2.v_proj"),
            (r#""target_modules": ["q_proj", "query_key_value"]"#, q), // names of another architecture
            (r#""target_modules": ["proj"]"#, ""),                     // ends at a dot
            (r#""target_modules": ["self_attn.q_proj"]"#, q),
            (
                r#""target_modules": ["model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj"]"#,
                "0.q_proj 1.q_proj",
            ),
            (r#""target_modules": "model\\.layers\\.[01]\\.self_attn\\.q_proj""#, "0.q_proj 1.q_proj"),
            (r#""target_modules": ".*q_proj|.*layers\\.2.*k_proj""#, "0.q_proj 1.q_proj 2.k_proj 2.q_proj"),
            (r#""target_modules": "q_proj""#, ""), // the whole name
            (r#""target_modules": ".*layers\\.(?!1).*\\.q_proj""#, "0.q_proj 2.q_proj"), // Python's look-ahead
            (
                r#""target_modules": ["q_proj"], "exclude_modules": ["model.layers.0.self_attn.q_proj"]"#,
                "1.q_proj 2.q_proj",
            ),
            (r#""target_modules": ["q_proj"], "exclude_modules": ["q_proj"]"#, ""),
            (r#""target_modules": ["q_proj"], "exclude_modules": ".*\\.[02]\\..*""#, "1.q_proj"),
            (r#""target_modules": ["q_proj"], "layers_to_transform": [0, 2]"#, "0.q_proj 2.q_proj"),
            (r#""target_modules": ["q_proj"], "layers_to_transform": 1"#, "1.q_proj"),
            (r#""target_modules": ["q_proj"], "layers_to_transform": []"#, q),
            (r#""target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": "layers""#, "1.q_proj"),
            (
                r#""target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": ["h", "layers"]"#,
                "1.q_proj",
            ),
            (r#""target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": ["h"]"#, ""),
            (
                r#""target_modules": ["model.layers.0.self_attn.q_proj", "q_proj"], "layers_to_transform": [1]"#,
                "0.q_proj 1.q_proj",
            ),
        ] {
            assert_eq!(names(keys), want, "{keys}");
        }
        assert_eq!(modules(r#""target_modules": "all-linear""#).unwrap().len(), 21);
    }

    #[test]
    fn ranks_and_alphas_are_those_of_the_first_pattern_that_matches() {
        let of = |keys: &str| modules(&format!(r#""target_modules": ["q_proj", "v_proj"], {keys}"#)).unwrap();
        let all = |one: &str| {
            (0..3).flat_map(|l| [format!("{l}.q_proj:{one}"), format!("{l}.v_proj:4:8")]).collect::<Vec<_>>()
        };
        assert_eq!(of(r#""rank_pattern": {}, "alpha_pattern": null"#), all("4:8"));
        assert_eq!(of(r#""rank_pattern": {"q_proj": 16}"#), all("16:8"));
        assert_eq!(of(r#""rank_pattern": {"q_proj": 16}, "alpha_pattern": {"self_attn.q_proj": 2.5}"#), all("16:2.5"));
        assert_eq!(of(r#""rank_pattern": {"_proj": 16, "proj": 2}"#), all("4:8"), "a pattern begins at a dot");
        let one = of(
            r#""rank_pattern": {"layers\\.[12]\\.self_attn\\.q_proj": 2, "^model.layers.1.self_attn.q_proj": 3, "q_proj": 5}"#,
        );
        assert_eq!(one[0], "0.q_proj:5:8");
        assert_eq!((one[2].as_str(), one[4].as_str()), ("1.q_proj:2:8", "2.q_proj:2:8"), "the order of the file");
        let one = of(r#""rank_pattern": {"q_proj": 5, "^model.layers.1.self_attn.q_proj": 3}"#);
        assert_eq!(one[2], "1.q_proj:5:8");
        let scaled =
            modules(r#""target_modules": ["q_proj"], "use_rslora": true, "rank_pattern": {"q_proj": 16}"#).unwrap();
        assert_eq!(scaled[0], "0.q_proj:16:32", "8 / sqrt(16) * 16");
    }

    #[test]
    fn keys_that_are_not_known_to_be_harmless_are_refused_by_name() {
        let values = ["[403, 407]", "true", "{\"a\": 1}", "0.5", "\"yes\""];
        let keys =
            ["alora_invocation_tokens", "use_dora", "kasa_config", "arrow_config", "target_parameters", "a_new_key"];
        for (key, value) in keys.iter().flat_map(|k| values.map(|v| (*k, v))) {
            let error = modules(&format!(r#""target_modules": ["q_proj"], "{key}": {value}"#)).unwrap_err();
            assert!(error.contains(&format!("{key} is ")), "{error}");
        }
        for (key, empty) in keys.iter().flat_map(|k| ["null", "false", "[]", "{}", "\"\""].map(|v| (*k, v))) {
            assert!(modules(&format!(r#""target_modules": ["q_proj"], "{key}": {empty}"#)).is_ok(), "{key} {empty}");
        }
        for key in HARMLESS {
            assert!(modules(&format!(r#""target_modules": ["q_proj"], "{key}": "x""#)).is_ok(), "{key}");
        }
        for (keys, word) in [
            (r#""target_modules": ["q_proj", "embed_tokens"]"#, "target_modules names model.embed_tokens"),
            (r#""target_modules": ".*""#, "target_modules names model.embed_tokens"),
            (r#""target_modules": ["lm_head"]"#, "target_modules names lm_head"),
            (r#""target_modules": "(""#, "target_modules is no regular expression"),
            (r#""target_modules": ["q_proj"], "rank_pattern": {"(": 1}"#, "rank_pattern is no regular expression"),
            (r#""target_modules": ["q_proj"], "rank_pattern": {"q_proj": 0}"#, "q_proj is 0"),
            (r#""target_modules": ".*q_proj", "layers_to_transform": [0]"#, "layers_to_transform"),
            (r#""target_modules": ["q_proj"], "init_lora_weights": "pissa_niter_4""#, "pissa_niter_4"),
            (r#""target_modules": ["q_proj"], "init_lora_weights": "lora_ga""#, "lora_ga"),
        ] {
            let error = modules(keys).expect_err(keys);
            assert!(error.contains(word), "{word} in {error}");
        }
    }
}
