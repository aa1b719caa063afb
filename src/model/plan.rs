//! The memory that a model needs, computed before anything is allocated.

use crate::{
    backend::{Backend, DECODE_ROWS, SamplerState},
    error::{Error, Result},
    files::config::Config,
    model::{
        Kept, LOGIT_ROWS, Scratch,
        kv::{Kv, pages_for},
    },
    ops::{KvDtype, PAGE},
};
use std::{fmt, ops::RangeInclusive};

/// How many sequences there may be.
pub(crate) const SEQUENCES: RangeInclusive<usize> = 1..=64;

/// Bytes that a model and its sequences need on their device.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize)]
pub struct Plan {
    /// Tokens of context that the other numbers are for.
    pub context: usize,
    /// Number of sequences that they are for.
    pub sequences: usize,
    /// Tokens whose keys and values there is room for, of all sequences together: whole pages.
    pub cache_tokens: usize,
    /// Weights, once. For quantized ones that stay quantized, also room for one matrix in 16 bits.
    pub weights: u64,
    /// The part of them that the CPU reads in their mapped file. It needs no memory: the system drops and reads it again as it must.
    pub in_file: u64,
    /// KV cache of the sequences.
    pub kv: u64,
    /// How keys and values are stored in it.
    pub kv_dtype: KvDtype,
    /// Activations and logits of a step, what its products need, and the sequences' samplers.
    pub scratch: u64,
    /// Free memory of the device, where it is limited.
    pub free: Option<u64>,
}

/// What is asked of a plan.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Wanted {
    /// Tokens of context; if absent, the longest that fits, up to the model's maximum.
    pub context: Option<usize>,
    pub sequences: usize,
    /// Tokens of the cache; if absent, those of [`whole_sequences`], or as many of these as fit.
    pub cache_tokens: Option<usize>,
    pub kv: KvDtype,
}

/// For how many of these sequences a whole context each is reserved if nobody says how large the cache is: as many as a step has rows.
/// Seldom are all sequences as long as they may become, so more can share that.
pub fn whole_sequences(sequences: usize) -> usize {
    sequences.min(DECODE_ROWS)
}

impl Plan {
    /// What this many sequences of `context` tokens need, with a cache of `cache_tokens` tokens; if absent, one for
    /// [`whole_sequences`].
    pub fn new<B: Backend>(
        config: &Config,
        weights: u64,
        kv_dtype: KvDtype,
        context: usize,
        sequences: usize,
        cache_tokens: Option<usize>,
        free: Option<u64>,
    ) -> Plan {
        let table = (context * config.head_dim * 4) as u64;
        let sampler = SamplerState::<B>::bytes(config.vocab, sequences);
        let rows = B::CHUNK.min(context);
        let products = B::workspace_bytes(config, rows);
        let pages = 4 * (sequences * pages_for(context)) as u64;
        let scratch = Scratch::<B>::bytes(config, rows, LOGIT_ROWS, context) + table + sampler + products + pages;
        let (one, all) = (pages_for(context), sequences * pages_for(context));
        let cache = cache_tokens.map_or(whole_sequences(sequences) * one, |tokens| pages_for(tokens).clamp(one, all));
        let cache_tokens = cache * PAGE;
        let kv = Kv::<B>::bytes(config, kv_dtype, cache_tokens);
        Plan { context, sequences, cache_tokens, weights, in_file: 0, kv, kv_dtype, scratch, free }
    }

    /// The sum of all.
    pub fn total(&self) -> u64 {
        self.weights + self.kv + self.scratch
    }

    /// The part that is allocated only by sessions and batches, after the model was loaded.
    pub(crate) fn of_sequences(&self) -> u64 {
        self.kv + self.scratch
    }

    /// The sum of all that needs memory.
    fn needed(&self) -> u64 {
        self.total() - self.in_file
    }

    /// Whether the device has room, with a margin for the driver's own use.
    pub fn fits(&self) -> bool {
        self.free.is_none_or(|free| self.needed() + (256 << 20).min(free / 16) <= free)
    }

    /// The plan for what is wanted. A context that nobody asked for is the longest of which one sequence fits; then the cache gets what
    /// is left, up to what is wanted. On a backend that [overcommits](Backend::OVERCOMMITS) a cache that somebody asked for need not fit.
    pub(crate) fn choose<B: Backend>(config: &Config, kept: Kept, wanted: Wanted, free: Option<u64>) -> Result<Plan> {
        let Wanted { context: asked, sequences, cache_tokens, kv } = wanted;
        if !SEQUENCES.contains(&sequences) {
            let (least, most) = SEQUENCES.into_inner();
            return Err(Error::Input(format!("room for {sequences} sequences: allowed is {least} to {most}")));
        }
        if let Some(n) = asked.filter(|n| *n == 0 || *n > config.max_seq) {
            return Err(Error::Input(format!("a context of {n} tokens: the model allows 1 to {}", config.max_seq)));
        }
        if let Some(n) = cache_tokens.filter(|n| *n < asked.unwrap_or(1)) {
            let asked = asked.unwrap_or(1);
            return Err(Error::Input(format!("a cache of {n} tokens has no room for one sequence of {asked}")));
        }
        let weights = kept.bytes(config);
        let plan = |context, cache| Plan {
            in_file: kept.in_file.min(weights),
            ..Plan::new::<B>(config, weights, kv, context, sequences, cache, free)
        };
        let longest = asked.unwrap_or(config.max_seq).min(cache_tokens.unwrap_or(usize::MAX));
        let whole = plan(longest, cache_tokens);
        if whole.fits() {
            return Ok(whole);
        }
        let least = |context| plan(context, cache_tokens.or(Some(context)));
        let context = largest(0, longest, |context| least(context).fits());
        if context < if asked.is_some() { longest } else { 512.min(longest) } {
            // The cache takes memory as it is used. So a long context works as long as texts are short, and who asks for one by number
            // may know that they will be; by default none is longer than what fits when it is full.
            if B::OVERCOMMITS
                && (asked.is_some() || cache_tokens.is_some())
                && (Plan { kv: 0, ..least(longest) }).fits()
            {
                return Ok(least(longest));
            }
            let of = |tokens: usize| plan(longest.min(tokens), Some(tokens));
            let most = pages_for(cache_tokens.unwrap_or(0));
            let cache = largest(0, most, |pages| of(pages * PAGE).fits()) * PAGE;
            return Err(Error::Memory(format!(
                "{}; {}",
                least(longest),
                match (cache_tokens, context, cache) {
                    (_, 1.., _) => format!("a context of {context} tokens would fit"),
                    (Some(_), _, 1..) => format!("a cache of {cache} tokens would fit"),
                    _ => "not even the weights fit".into(),
                }
            )));
        }
        if cache_tokens.is_some() {
            return Ok(plan(context, cache_tokens));
        }
        let (one, all) = (pages_for(context), whole_sequences(sequences) * pages_for(context));
        let pages = largest(one, all, |pages| plan(context, Some(pages * PAGE)).fits());
        Ok(plan(context, Some(pages * PAGE)))
    }
}

/// The largest number from `low` up to `high` for which this is true; `low` if there is none. Where it is false, it is for larger ones.
fn largest(mut low: usize, high: usize, is_true: impl Fn(usize) -> bool) -> usize {
    let mut high = high + 1;
    while high - low > 1 {
        let middle = (low + high) / 2;
        if is_true(middle) { low = middle } else { high = middle }
    }
    low
}

impl fmt::Display for Plan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let gib = |b: u64| format!("{:.2} GiB", b as f64 / (1u64 << 30) as f64);
        let kind = if self.kv_dtype == KvDtype::Auto { "" } else { " (fp8)" };
        write!(f, "weights {}", gib(self.weights - self.in_file))?;
        if self.in_file > 0 {
            write!(f, " (and {} in the mapped file)", gib(self.in_file))?;
        }
        write!(f, " + KV cache{kind} {} for ", gib(self.kv))?;
        match self.sequences {
            1 => write!(f, "{} tokens", self.context)?,
            n => write!(f, "{} tokens of {n} sequences of up to {}", self.cache_tokens, self.context)?,
        }
        write!(f, " + scratch {} = {}", gib(self.scratch), gib(self.needed()))?;
        self.free.map_or(Ok(()), |free| write!(f, ", free {}", gib(free)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::{count::Count, cpu::Cpu};
    use half::bf16;

    fn choose(
        context: Option<usize>,
        sequences: usize,
        cache_tokens: Option<usize>,
        free: Option<u64>,
    ) -> Result<Plan> {
        let json = crate::files::synth::preset("llama3-8b").unwrap();
        let config = Config::from_json(std::path::Path::new("config.json"), &json, None).unwrap();
        let wanted = Wanted { context, sequences, cache_tokens, kv: KvDtype::Auto };
        Plan::choose::<Count>(&config, Kept::default(), wanted, free)
    }

    const GIB: u64 = 1 << 30;

    #[test]
    fn a_cache_of_fp8_has_129_bytes_for_256() {
        let json = crate::files::synth::preset("llama3-8b").unwrap();
        let config = Config::from_json(std::path::Path::new("config.json"), &json, None).unwrap();
        let plan = |kv| Plan::new::<Count>(&config, config.weight_bytes(), kv, 8192, 1, None, None);
        let [auto, fp8] = KvDtype::ALL.map(plan);
        assert_eq!((auto.kv, fp8.kv), (GIB, GIB / 256 * 129));
        assert_eq!((auto.weights, auto.scratch), (fp8.weights, fp8.scratch));
        assert!(fp8.to_string().contains("KV cache (fp8) 0.50 GiB for 8192 tokens"), "{fp8}");
    }

    #[test]
    fn the_cache_takes_what_is_wanted_or_what_is_left() {
        let of = |p: Plan| (p.context, p.sequences, p.cache_tokens);
        assert_eq!(of(choose(None, 1, None, None).unwrap()), (8192, 1, 8192));
        assert_eq!(of(choose(None, 64, None, None).unwrap()), (8192, 64, 16 * 8192), "sixteen whole ones");
        assert_eq!(of(choose(Some(100), 64, Some(1000), None).unwrap()), (100, 64, 1024));
        assert_eq!(
            of(choose(None, 64, Some(1000), None).unwrap()),
            (1000, 64, 1024),
            "no sequence is longer than the cache"
        );
        assert_eq!(
            of(choose(Some(100), 2, Some(1 << 20), None).unwrap()),
            (100, 2, 256),
            "no more than there is use for"
        );

        let all = choose(None, 16, None, None).unwrap();
        let fits = |p: &Plan| p.fits() && p.total() + p.kv / p.cache_tokens as u64 * 64 > p.free.unwrap() - GIB / 4;
        let some = choose(None, 16, None, Some(all.total() - GIB)).unwrap();
        assert!(some.context == 8192 && some.cache_tokens < all.cache_tokens && fits(&some), "{some}");
        let one = choose(None, 16, None, Some(all.weights + GIB)).unwrap();
        assert!((512..8192).contains(&one.context) && one.cache_tokens == one.context.next_multiple_of(64), "{one}");
    }

    #[test]
    fn what_does_not_fit_is_said_with_what_would() {
        let text = |r: Result<Plan>| r.unwrap_err().to_string();
        let weights = choose(None, 1, None, None).unwrap().weights;
        let e = text(choose(Some(8192), 8, None, Some(weights + GIB)));
        assert!(e.contains("8192 tokens of 8 sequences of up to 8192") && e.contains("tokens would fit"), "{e}");
        assert!(text(choose(None, 8, None, Some(weights))).ends_with("not even the weights fit"));
        let e = text(choose(Some(64), 8, Some(400), Some(weights)));
        assert!(e.ends_with("not even the weights fit"), "{e}");
        let e = text(choose(Some(8192), 8, Some(8191), None));
        assert!(e.contains("a cache of 8191 tokens has no room for one sequence of 8192"), "{e}");
        for n in [0, 65, 1 << 63, usize::MAX] {
            let e = text(choose(None, n, Some(512), None));
            assert!(e.ends_with(&format!("room for {n} sequences: allowed is 1 to 64")), "{e}");
        }
    }

    /// On a CPU the weights are in their file, and only a cache that is written takes memory.
    #[test]
    fn what_is_asked_of_a_cpu_may_be_more_than_is_free() {
        let json = crate::files::synth::preset("llama3-8b").unwrap();
        let config = Config::from_json(std::path::Path::new("config.json"), &json, None).unwrap();
        let choose = |in_file, context, cache_tokens, free| {
            let wanted = Wanted { context, sequences: 8, cache_tokens, kv: KvDtype::Auto };
            Plan::choose::<Cpu<bf16>>(&config, Kept { in_file, ..Kept::default() }, wanted, Some(free))
        };
        let all = config.weight_bytes();
        let of = |p: &Plan| (p.context, p.cache_tokens, p.fits());
        assert_eq!(of(&choose(all, None, None, 16 * GIB).unwrap()), (8192, 8 * 8192, true), "without the weights");
        // what nobody asked for fits, and what somebody asked for is there, with no more than was asked
        let short = choose(all, None, None, GIB).unwrap();
        assert!((512..8192).contains(&short.context) && short.fits(), "{short}");
        assert_eq!(of(&choose(all, Some(8192), None, GIB).unwrap()), (8192, 8192, false));
        assert_eq!(of(&choose(all, Some(8192), Some(16384), GIB).unwrap()), (8192, 16384, false));
        assert!(choose(all, None, Some(16384), GIB).unwrap().fits(), "a context that nobody asked for is shorter");
        let text = short.to_string();
        assert!(text.starts_with("weights 0.00 GiB (and 14.96 GiB in the mapped file) + KV cache 0."), "{text}");
        // converted weights are written, all of them
        let e = choose(0, Some(8192), None, 15 * GIB).unwrap_err().to_string();
        assert!(e.ends_with("not even the weights fit"), "{e}");
        assert_eq!(of(&choose(all / 2, Some(8192), None, 8 * GIB).unwrap()), (8192, 8192, false));
    }

    #[test]
    fn the_largest() {
        assert_eq!([largest(0, 9, |n| n <= 4), largest(0, 9, |_| true), largest(3, 9, |_| false)], [4, 9, 3]);
    }
}
