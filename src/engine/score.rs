//! Scores given text: the log-probabilities of continuations after a context. The rules for where a continuation begins
//! are those of lm-evaluation-harness, and so are the windows in which a text longer than the context is scored.
//!
//! ```
//! use aoji::{Device, Engine, Options, score::{Request, first_token}};
//!
//! # fn main() -> aoji::Result<()> {
//! let engine = Engine::open("demo", &Options { device: Device::Cpu, ..Options::default() })?;
//! let first = first_token(&engine)?;
//! let r = Request::encode(engine.tokenizer()?, "피보나치 수열은", &[" 수를 더한", " 하늘이"], true, first)?;
//! let scores = engine.score(&r.context, &r.continuations)?;
//! assert!(scores.continuations[0].sum() > scores.continuations[1].sum());
//! # Ok(())
//! # }
//! ```

pub use crate::engine::timeline::TokenScore;
use crate::{
    engine::load::Engine,
    error::{Error, Result},
    text::Tokenizer,
};

/// Result of [`crate::Session::score`].
#[derive(Debug, Clone, PartialEq)]
pub struct Scores {
    /// In the order in which the continuations were given.
    pub continuations: Vec<Continuation>,
    /// Tokens that went through the model.
    pub computed: usize,
}

/// The scores of one continuation's tokens.
#[derive(Debug, Clone, PartialEq)]
pub struct Continuation(pub Vec<TokenScore>);

impl Continuation {
    /// Log-probability of the whole continuation, summed in f64.
    pub fn sum(&self) -> f64 {
        self.0.iter().map(|t| f64::from(t.logprob)).sum()
    }

    /// Whether greedy decoding would have given exactly this continuation.
    pub fn greedy(&self) -> bool {
        self.0.iter().all(|t| t.greedy)
    }
}

/// Continuations as a tree. The root stands for the prefix, and each path from it is the beginning of one or more
/// continuations.
pub(crate) struct Trie {
    nodes: Vec<Node>,
}

struct Node {
    token: u32,
    parent: usize,
    depth: usize,
    children: Vec<usize>,
    score: TokenScore,
}

impl Trie {
    pub fn new<T: AsRef<[u32]>>(continuations: &[T]) -> Trie {
        let node = |token, parent, depth| Node {
            token,
            parent,
            depth,
            children: Vec::new(),
            score: TokenScore { logprob: 0.0, greedy: false },
        };
        let mut trie = Trie { nodes: vec![node(0, 0, 0)] };
        for c in continuations {
            let mut at = 0;
            for &token in c.as_ref() {
                at = trie.child(at, token).unwrap_or_else(|| {
                    let (new, depth) = (trie.nodes.len(), trie.nodes[at].depth + 1);
                    trie.nodes.push(node(token, at, depth));
                    trie.nodes[at].children.push(new);
                    new
                });
            }
        }
        trie
    }

    fn child(&self, node: usize, token: u32) -> Option<usize> {
        self.nodes[node].children.iter().copied().find(|&c| self.nodes[c].token == token)
    }

    /// Every node that has children, in chains from parent to child. The first chain is the trunk, which begins at the
    /// root; the others are branches, each of which begins at a child of a node of the trunk. The branch that leaves
    /// the trunk last comes first, so that one after the other could take the trunk's place. Nodes that several
    /// branches share are in each of them.
    pub fn branches(&self) -> (Vec<usize>, Vec<Vec<usize>>) {
        let inner = |node: usize| {
            let children = self.nodes[node].children.iter().copied();
            children.filter(|&c| !self.nodes[c].children.is_empty()).collect::<Vec<_>>()
        };
        let (mut trunk, mut leaves, mut waiting) = (vec![0], Vec::new(), Vec::new());
        while let [next, others @ ..] = &inner(trunk[trunk.len() - 1])[..] {
            waiting.extend(others.iter().rev());
            trunk.push(*next);
        }
        while let Some(node) = waiting.pop() {
            match &inner(node)[..] {
                [] => leaves.push(node),
                children => waiting.extend(children.iter().rev()),
            }
        }
        let path = |leaf: usize| {
            let up = std::iter::successors(Some(leaf), |&n| Some(self.nodes[n].parent));
            let mut path: Vec<usize> = up.take_while(|n| !trunk.contains(n)).collect();
            path.reverse();
            path
        };
        let branches = leaves.into_iter().map(path).collect();
        (trunk, branches)
    }

    /// Tokens of the nodes; the root has none.
    pub fn tokens(&self, chain: &[usize]) -> Vec<u32> {
        chain.iter().filter(|&&n| n > 0).map(|&n| self.nodes[n].token).collect()
    }

    pub fn depth(&self, node: usize) -> usize {
        self.nodes[node].depth
    }

    /// The tokens that may follow a node.
    pub fn targets(&self, node: usize) -> Vec<u32> {
        self.nodes[node].children.iter().map(|&c| self.nodes[c].token).collect()
    }

    /// Stores the scores of the tokens that may follow a node.
    pub fn set(&mut self, node: usize, scores: &[TokenScore]) {
        for (child, score) in self.nodes[node].children.clone().into_iter().zip(scores) {
            self.nodes[child].score = *score;
        }
    }

    pub fn scores<T: AsRef<[u32]>>(&self, continuations: &[T]) -> Vec<Continuation> {
        let path = |c: &T| {
            let mut at = 0;
            let step = |&token: &u32| {
                at = self.child(at, token).expect("the tree was made of these continuations");
                self.nodes[at].score
            };
            Continuation(c.as_ref().iter().map(step).collect())
        };
        continuations.iter().map(path).collect()
    }
}

/// A context and its continuations, as token ids.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Request {
    /// The given tokens; never empty.
    pub context: Vec<u32>,
    /// The continuations that are scored, each by itself.
    pub continuations: Vec<Vec<u32>>,
}

impl Request {
    /// Encodes as lm-evaluation-harness does: white space at the end of the context goes to the continuation, both are
    /// encoded together, and as many tokens as the context alone has are taken off the front. With `special`, BOS is
    /// added where the tokenizer's own rule says so. A context without tokens becomes `first`; see [`first_token`].
    pub fn encode<T: AsRef<str>>(
        tokenizer: &Tokenizer,
        context: &str,
        continuations: &[T],
        special: bool,
        first: u32,
    ) -> Result<Request> {
        let before = tokenizer.encode(context.trim_end_matches(is_python_space), special)?;
        let encode = |c: &T| {
            let whole = tokenizer.encode(&format!("{context}{}", c.as_ref()), special)?;
            let continuation = whole.get(before.len()..).unwrap_or_default();
            Ok(if before.is_empty() {
                continuation.strip_prefix(&[first]).unwrap_or(continuation)
            } else {
                continuation
            }
            .to_vec())
        };
        let continuations = continuations.iter().map(encode).collect::<Result<_>>()?;
        Ok(Request { context: if before.is_empty() { vec![first] } else { before }, continuations })
    }

    /// The tokens of all continuations, each counted together with its context: the work that is asked for.
    pub fn tokens(&self) -> usize {
        self.continuations.iter().map(|c| self.context.len() + c.len()).sum()
    }

    /// How many positions it needs. The last token of a continuation is not computed.
    pub fn positions(&self) -> usize {
        let longest = self.continuations.iter().map(Vec::len).max().unwrap_or(0);
        self.context.len() + longest.saturating_sub(1)
    }

    /// The same continuations with contexts cut on the left so that `max` positions are enough. Each keeps as much
    /// context as it has room for, so contexts that were cut are no longer shared.
    ///
    /// # Errors
    /// `Context` when a continuation alone does not fit.
    pub fn cut_left(self, max: usize) -> Result<Vec<Request>> {
        if self.positions() <= max {
            return Ok(vec![self]);
        }
        let cut = |c: &Vec<u32>| {
            if c.len() > max {
                return Err(Error::Context { needed: c.len(), max });
            }
            let keep = self.context.len().min(max + 1 - c.len());
            let context = self.context[self.context.len() - keep..].to_vec();
            Ok(Request { context, continuations: vec![c.clone()] })
        };
        self.continuations.iter().map(cut).collect()
    }
}

/// `str.isspace` of Python: Unicode's white space and four separators of ASCII.
fn is_python_space(c: char) -> bool {
    c.is_whitespace() || ('\x1c'..='\x1f').contains(&c)
}

/// How many words a text has, as lm-evaluation-harness counts them for its perplexity per word: the parts between runs
/// of white space, so one more than there are runs.
pub fn words(text: &str) -> usize {
    text.split(is_python_space).filter(|part| !part.is_empty()).count()
        + usize::from(text.starts_with(is_python_space) || text.is_empty())
        + usize::from(text.ends_with(is_python_space))
}

/// The token that is given before a text when nothing else is: BOS where the model has one, else its end-of-text token.
pub fn first_token(engine: &Engine) -> Result<u32> {
    let config = engine.config();
    let bos = engine.tokenizer().ok().and_then(Tokenizer::bos).or(config.bos);
    let none = || Error::Input("the model names neither a BOS nor an end-of-text token to put before a text".into());
    bos.or(config.eos.first().copied()).ok_or_else(none)
}

/// A part of a sequence: tokens `from..end` are scored given `begin..from`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Window {
    /// First token seen.
    pub begin: usize,
    /// First token scored; above `begin`.
    pub from: usize,
    /// One past the last token scored.
    pub end: usize,
}

impl Window {
    /// lm-evaluation-harness's rolling windows over `len` tokens, of which the first is only given. Each other token is
    /// scored once, in blocks of `max`, with as much text before the block as fits a pass of `max` tokens.
    pub fn rolling(len: usize, max: usize) -> Vec<Window> {
        let window = |from: usize| {
            let end = (from + max).min(len);
            Window { begin: end.saturating_sub(max + 1), from, end }
        };
        (1..len).step_by(max.max(1)).map(window).collect()
    }

    /// Windows of `max` tokens, one beginning every `stride` tokens, as in Hugging Face's guide to perplexity. Each
    /// scores the tokens that the window before did not; the first token of a window is never scored.
    pub fn strided(len: usize, max: usize, stride: usize) -> Vec<Window> {
        let (mut windows, mut done) = (Vec::new(), 0);
        for begin in (0..len).step_by(stride.max(1)) {
            let end = (begin + max).min(len);
            let from = done.max(begin + 1);
            if from < end {
                windows.push(Window { begin, from, end });
            }
            done = end;
            if end == len {
                break;
            }
        }
        windows
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn continuations_share_what_they_begin_with() {
        let trie = Trie::new(&[vec![7, 1, 2, 3], vec![7, 9], vec![5], vec![7, 1, 4, 6], vec![]]);
        let (trunk, branches) = trie.branches();
        assert_eq!(trie.tokens(&trunk), [7, 1, 2]); // 9, 3, 5 and 6 are only looked up
        assert_eq!(branches.iter().map(|b| trie.tokens(b)).collect::<Vec<_>>(), [[4]]);
        assert_eq!(trie.depth(branches[0][0]), 3);
        assert_eq!([trie.targets(0), trie.targets(trunk[1])], [[7, 5], [1, 9]]);
        assert_eq!(trie.targets(trunk[2]), [2, 4]);
    }

    #[test]
    fn branches_leave_the_trunk_the_last_first() {
        let all = [vec![1, 2, 3, 0], vec![8, 8, 5, 0], vec![1, 9, 0], vec![8, 8, 6, 7, 0], vec![1, 2, 4, 0]];
        let trie = Trie::new(&all);
        let (trunk, branches) = trie.branches();
        assert_eq!(trie.tokens(&trunk), [1, 2, 3]);
        let tokens: Vec<Vec<u32>> = branches.iter().map(|b| trie.tokens(b)).collect();
        assert_eq!(tokens, [vec![4], vec![9], vec![8, 8, 5], vec![8, 8, 6, 7]]);
    }

    #[test]
    fn nothing_to_score_still_computes_the_prefix() {
        assert_eq!(Trie::new::<Vec<u32>>(&[]).branches(), (vec![0], vec![]));
    }

    #[test]
    fn contexts_are_cut_on_the_left() {
        let r = Request { context: vec![1, 2, 3, 4], continuations: vec![vec![5, 6], vec![7]] };
        assert_eq!((r.tokens(), r.positions()), (11, 5));
        let contexts = |max| r.clone().cut_left(max).map(|v| v.into_iter().map(|r| r.context).collect::<Vec<_>>());
        assert_eq!(contexts(5).unwrap(), [[1, 2, 3, 4]]);
        assert_eq!(contexts(3).unwrap(), [vec![3, 4], vec![2, 3, 4]]);
        assert_eq!(contexts(2).unwrap(), [vec![4], vec![3, 4]]);
        assert!(contexts(1).unwrap_err().to_string().contains("2 tokens do not fit"));
    }

    /// `len(re.split(r"\s+", text))` of Python.
    #[test]
    fn words_are_counted_as_by_the_harness() {
        let counts = ["a b", " a  b", "a\n", "", "\u{a0}", "a\x1cb c"].map(words);
        assert_eq!(counts, [2, 3, 2, 1, 2, 3]);
    }

    fn windows(all: &[Window]) -> Vec<(usize, usize, usize)> {
        all.iter().map(|w| (w.begin, w.from, w.end)).collect()
    }

    /// The examples of lm-evaluation-harness's own tests, with the prefix token at 0.
    #[test]
    fn rolling_windows_are_those_of_the_harness() {
        assert_eq!(windows(&Window::rolling(1, 4)), []);
        assert_eq!(windows(&Window::rolling(4, 10)), [(0, 1, 4)]);
        assert_eq!(windows(&Window::rolling(11, 4)), [(0, 1, 5), (4, 5, 9), (6, 9, 11)]);
    }

    #[test]
    fn strided_windows_score_each_token_once() {
        assert_eq!(windows(&Window::strided(10, 4, 2)), [(0, 1, 4), (2, 4, 6), (4, 6, 8), (6, 8, 10)]);
        assert_eq!(windows(&Window::strided(7, 3, 3)), [(0, 1, 3), (3, 4, 6)]); // token 6 would stand alone
        assert_eq!(windows(&Window::strided(5, 9, 2)), [(0, 1, 5)]);
    }
}
