//! Measures what the matrices of a model are multiplied with on a text, so that [quantizing](crate::quantize) can weigh the errors of
//! their weights by it.

use crate::{
    backend::{Backend, DECODE_ROWS, cpu::Cpu, observe::Observe},
    engine::{Device, Opened, Options},
    error::{Error, Result},
    files::{
        ModelFiles, Startup,
        quantize::{self, Inputs},
    },
    model::{
        Changes, Kept, Model, Rows, Scratch,
        kv::Kv,
        plan::{Plan, Wanted},
    },
    ops::KvDtype,
};
use half::bf16;
use std::num::NonZeroUsize;

/// Tokens that the model sees at once.
pub const WINDOW: usize = 512;
/// Fewest tokens from which a mean is taken.
pub const LEAST: usize = 256;

/// Runs the model, with its adapters added and bf16 activations, over texts in windows of [`WINDOW`] tokens: the mean square of what each
/// column of each matrix is multiplied with. The embedding has none unless it is also the head: of it, rows are looked up. `progress` gets
/// the tokens done, and all.
///
/// On the CPU the numbers depend on model and texts alone, on a GPU also on its products.
///
/// ```no_run
/// # fn main() -> aoji::Result<()> {
/// # let text = String::new();
/// let files = aoji::ModelFiles::open("models/llama")?;
/// let inputs = aoji::calibration::calibrate(&files, &[text], aoji::Device::Auto, None, &mut |_, _| {})?;
/// let quantize = aoji::quantize::Options { inputs, .."q4_k".parse().expect("a format") };
/// let engine = aoji::Engine::load(files, &aoji::Options { quantize: Some(quantize), ..Default::default() }, &mut |_, _| {})?;
/// # Ok(()) }
/// ```
///
/// # Errors
/// `Unsupported` for a model that is quantized already; `Input` for one without a tokenizer, for texts of fewer than [`LEAST`] tokens or
/// with a token that the model does not know, and where it computes no finite numbers; `Memory` when it does not fit the device; `NoGpu`.
pub fn calibrate(
    files: &ModelFiles,
    texts: &[String],
    device: Device,
    threads: Option<NonZeroUsize>,
    progress: &mut dyn FnMut(usize, usize),
) -> Result<Inputs> {
    quantize::expect_plain(&files.weights)?;
    let tokens = tokens(files, texts)?;
    let options = Options { device, ..Options::default() };
    match Opened::open(&options, &Startup::begin())? {
        Opened::Cpu(_) => run(Cpu::<bf16>::open(threads)?, files, &tokens, progress),
        #[cfg(feature = "cuda")]
        Opened::Cuda(cuda) => run(*cuda, files, &tokens, progress),
    }
}

/// The tokens of each text.
fn tokens(files: &ModelFiles, texts: &[String]) -> Result<Vec<Vec<u32>>> {
    let none = || Error::Input("the model has no tokenizer.json: a calibration text cannot be read without one".into());
    let tokenizer = files.tokenizer.as_ref().ok_or_else(none)?;
    let tokens = texts.iter().map(|text| tokenizer.encode(text, true)).collect::<Result<Vec<_>>>()?;
    let n: usize = tokens.iter().map(Vec::len).sum();
    if n < LEAST {
        return Err(Error::Input(format!(
            "the calibration text has {n} tokens: at least {LEAST} are needed, and some thousand are good, of the kind that the model will read"
        )));
    }
    match tokens.iter().flatten().find(|t| **t as usize >= files.config.vocab) {
        Some(t) => Err(Error::Input(format!(
            "the calibration text has token {t}, which is not below the vocabulary's {}",
            files.config.vocab
        ))),
        None => Ok(tokens),
    }
}

/// All tokens through the model.
fn run<B: Backend>(
    b: B,
    files: &ModelFiles,
    texts: &[Vec<u32>],
    progress: &mut dyn FnMut(usize, usize),
) -> Result<Inputs> {
    let (config, b) = (&files.config, Observe::new(b));
    b.supports(config)?;
    let longest = texts.iter().map(Vec::len).max().unwrap_or(1).min(WINDOW).min(config.max_seq);
    let wanted = Wanted { context: Some(longest), sequences: 1, cache_tokens: None, kv: KvDtype::Auto };
    let changes = Changes { lora: &files.lora, ..Changes::default() };
    let kept = Kept::of::<Observe<B>>(config, &files.weights, changes);
    Plan::choose::<Observe<B>>(config, kept, wanted, b.free_memory()?)?;
    b.expect_rows(config, longest)?;
    let model = Model::load(&b, config, &files.weights, changes, longest, &mut |_| {})?;
    let mut s = Scratch::new(&b, config, longest.max(DECODE_ROWS), 1, longest)?;
    let (mut kv, mut at) = (Kv::new(&b, config, KvDtype::Auto, 1, longest)?, Rows::new(&b, longest)?);
    let head = model.lm_head.as_ref().unwrap_or(&model.embed);
    let (mut done, total) = (0, texts.iter().map(Vec::len).sum());
    for tokens in texts.iter().flat_map(|text| text.chunks(longest)) {
        let rows = tokens.len();
        let places: Vec<u32> = (0..rows).map(|pos| kv.place(0, pos)).collect();
        at.set(&b, tokens, &places)?;
        model.forward(&b, &mut s, &mut kv, &at, rows, rows)?;
        model.final_norm(&b, &mut s, 0, rows)?; // what the head is given; its product is not needed
        b.see(rows, &s.xb, head)?;
        done += rows;
        progress(done, total);
    }
    b.inputs()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::files::weights::Tensor;
    use std::slice;

    /// A text of the demo's kind, of some hundred tokens.
    fn text() -> String {
        include_str!("../../assets/demo/questions.jsonl").lines().take(40).collect::<Vec<_>>().join("\n")
    }

    /// The mean squares of the embedding's rows after the first norm are those that q, k and v of the first layer get; the other
    /// matrices have theirs too, one a column.
    #[test]
    fn inputs_of_each_matrix() {
        let files = ModelFiles::open("demo").unwrap();
        let text = text();
        let mut calls = 0;
        let mut progress = |done, total| calls += usize::from(done <= total);
        let inputs = calibrate(&files, slice::from_ref(&text), Device::Cpu, None, &mut progress).unwrap();
        let tokens = files.tokenizer.as_ref().unwrap().encode(&text, true).unwrap();
        assert_eq!(calls, tokens.len().div_ceil(WINDOW), "a call a window");
        for t in files.weights.tensors() {
            let inputs = inputs.get(t.name()).map(<[f32]>::len);
            assert_eq!(inputs, (t.rows() > 1).then(|| t.cols()), "{}", t.name());
        }
        let layer = &files.weights.layers[0];
        let of = |t: &Tensor| inputs.get(t.name()).unwrap();
        assert!(
            of(&layer.wq) == of(&layer.wk) && of(&layer.wq) == of(&layer.wv) && of(&layer.w_gate) == of(&layer.w_up)
        );
        let (embed, gain, dim) = (files.weights.embed.to_f32(), layer.attn_norm.to_f32(), files.config.dim);
        let mut want = vec![0f64; dim];
        for &token in &tokens {
            let x = &embed[token as usize * dim..][..dim];
            let mean = x.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>() / dim as f64;
            let scale = 1.0 / (mean + files.config.norm_eps as f64).sqrt();
            let squares = x.iter().zip(&gain).map(|(x, g)| (f64::from(x * g) * scale).powi(2) / tokens.len() as f64);
            want.iter_mut().zip(squares).for_each(|(sum, x)| *sum += x);
        }
        for (i, (got, want)) in of(&layer.wq).iter().zip(&want).enumerate() {
            assert!((f64::from(*got) / want - 1.0).abs() < 0.01, "column {i}: {got}, expected {want}");
        }
        let again = calibrate(&files, &[text], Device::Cpu, NonZeroUsize::new(1), &mut |_, _| {}).unwrap();
        assert_eq!(inputs, again, "threads change nothing");
    }

    #[test]
    fn what_cannot_be_calibrated() {
        let files = ModelFiles::open("demo").unwrap();
        let fails = |files: &ModelFiles, texts: &[&str], words: &[&str]| {
            let texts: Vec<String> = texts.iter().map(|text| text.to_string()).collect();
            let error = calibrate(files, &texts, Device::Cpu, None, &mut |_, _| {}).unwrap_err().to_string();
            words.iter().for_each(|word| assert!(error.contains(word), "{error:?} lacks {word:?}"));
        };
        fails(&files, &[], &["0 tokens", "at least 256"]);
        fails(&files, &["하늘은", ""], &["tokens", "at least 256"]);
        let bare = ModelFiles { tokenizer: None, ..ModelFiles::open("demo").unwrap() };
        fails(&bare, &["하늘은"], &["tokenizer.json"]);
    }
}
