//! Log-probabilities of generated tokens, computed on the host from logits that are read back from the device; only for
//! requests that ask for them.

use super::TokenLogprobs;

/// What `logits` say of `token` and of the `top` most likely tokens. A logit that is NaN counts as impossible.
pub fn token_logprobs(logits: &[f32], token: u32, top: usize) -> TokenLogprobs {
    let value = |x: f32| if x.is_nan() { f32::NEG_INFINITY } else { x };
    let largest = logits.iter().copied().map(value).fold(f32::NEG_INFINITY, f32::max);
    let sum: f64 = logits.iter().map(|&x| f64::from((value(x) - largest).exp())).sum();
    let norm = f64::from(largest) + sum.ln();
    let logprob = |id: u32| (f64::from(value(logits[id as usize])) - norm) as f32;
    // Highest value first; equal values in the order of their ids.
    let order = |a: &u32, b: &u32| {
        let [x, y] = [a, b].map(|id| value(logits[*id as usize]));
        y.total_cmp(&x).then(a.cmp(b))
    };
    let mut ids: Vec<u32> = (0..logits.len() as u32).collect();
    if top > 0 && top < ids.len() {
        ids.select_nth_unstable_by(top, order);
    }
    ids.truncate(top);
    ids.sort_unstable_by(order);
    TokenLogprobs { token, logprob: logprob(token), top: ids.into_iter().map(|id| (id, logprob(id))).collect() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn probabilities_add_up_and_the_most_likely_come_first() {
        let logits = [1.0, f32::NAN, 3.0, 3.0, f32::NEG_INFINITY, -2.0];
        let all = token_logprobs(&logits, 0, 6);
        let sum: f32 = all.top.iter().map(|(_, p)| p.exp()).sum();
        assert!((sum - 1.0).abs() < 1e-6, "{sum}");
        assert_eq!(all.top.iter().map(|(id, _)| *id).collect::<Vec<_>>(), [2, 3, 0, 5, 1, 4]);
        assert_eq!(all.logprob, all.top[2].1);
        let two = token_logprobs(&logits, 5, 2);
        assert_eq!((two.top, two.logprob), (all.top[..2].to_vec(), all.top[3].1));
        assert!(token_logprobs(&logits, 3, 0).top.is_empty());
    }
}
