//! Perplexity: windows over real texts against Hugging Face and lm-evaluation-harness.

use aoji::{
    Activations, Device, Engine, Options,
    score::{Window, first_token},
};
use serde_json::Value;

fn open(model: &str) -> Option<(Engine, Value)> {
    let (dir, golden) = (crate::common::model(model)?, crate::common::data(&format!("{model}/golden.json"))?);
    let options = Options { device: Device::Cpu, activations: Activations::F32, ..Options::default() };
    let golden = crate::golden::cut(&golden, 300); // several chunks
    Some((Engine::open(dir.to_str().unwrap(), &options).unwrap(), golden))
}

/// Log-probability and number of the tokens that the windows score.
fn score(engine: &Engine, tokens: &[u32], windows: &[Window]) -> (f64, usize) {
    let mut session = engine.session(tokens.len()).unwrap();
    let one = |w: &Window| {
        let scores = session.score(&tokens[w.begin..w.from], &[&tokens[w.from..w.end]]).unwrap();
        scores.continuations[0].sum()
    };
    (windows.iter().map(one).sum(), windows.iter().map(|w| w.end - w.from).sum())
}

/// The expected numbers are from lm-eval 0.4.13 (`HFLM.loglikelihood_rolling` with this `max_length`) and from the loop
/// of Hugging Face's guide to perplexity, on transformers 4.57.3 in float32, without BOS in the text.
#[test]
fn windows_score_as_hf_and_the_harness() {
    for (model, max, stride, rolling, strided) in [
        ("stories260K", 32, 12, -13.817097663879395, (-14.036750882863998, 43)),
        ("smollm2-135m", 16, 6, -71.52018547058105, (-64.42306780815125, 24)),
    ] {
        let Some((engine, golden)) = open(model) else { return };
        let text = golden["scores"][0]["text"].as_str().unwrap();
        let tokens = engine.tokenizer().unwrap().encode(text, false).unwrap();
        let first = [vec![first_token(&engine).unwrap()], tokens.clone()].concat();
        let (sum, n) = score(&engine, &first, &Window::rolling(first.len(), max));
        assert!((sum / rolling - 1.0).abs() < 1e-5, "{model}: rolling {sum}, the harness {rolling}");
        assert_eq!(n, tokens.len());
        let (sum, n) = score(&engine, &tokens, &Window::strided(tokens.len(), max, stride));
        assert!((sum / strided.0 - 1.0).abs() < 1e-5, "{model}: strided {sum}, HF {}", strided.0);
        assert_eq!(n, strided.1, "{model}");
    }
}

/// A text that fits one window has the perplexity that the goldens name, or of a long text the log-probabilities of its beginning.
#[test]
fn whole_texts_have_hfs_perplexity() {
    for model in ["stories260K", "smollm2-135m"] {
        let Some((engine, golden)) = open(model) else { return };
        for text in golden["scores"].as_array().unwrap() {
            let ids: Vec<u32> = text["ids"].as_array().unwrap().iter().map(|t| t.as_u64().unwrap() as u32).collect();
            let (sum, n) = score(&engine, &ids, &Window::strided(ids.len(), ids.len(), 1));
            let (ours, theirs) = ((-sum / n as f64).exp(), text["ppl"].as_f64().unwrap());
            assert_eq!(n, ids.len() - 1);
            assert!((ours / theirs - 1.0).abs() < 1e-5, "{model}: {ours}, HF {theirs}");
        }
    }
}
