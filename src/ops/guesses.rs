//! Rows that hold guesses, for the ops that choose tokens.
//!
//! Rows of one sequence are side by side. Each but the first has computed a guess of the token that the row before it chooses, so what
//! it chooses counts only if the guesses up to its own are right. Rows that do not count change nothing.

/// Knows which rows count, when they are gone through in order.
#[derive(Default)]
pub(crate) struct Counted {
    /// The sequence of the last row, and what it chose if it counts.
    last: Option<(usize, Option<u32>)>,
}

impl Counted {
    /// Whether the next row counts, which is of a sequence and has computed a token.
    pub fn next(&mut self, sequence: usize, computed: u32) -> bool {
        let counts = self.last.is_none_or(|(last, chosen)| last != sequence || chosen == Some(computed));
        self.last = Some((sequence, None));
        counts
    }

    /// The row counts, and chose a token.
    pub fn chose(&mut self, token: u32) {
        if let Some((_, chosen)) = &mut self.last {
            *chosen = Some(token);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::Counted;

    #[test]
    fn a_row_counts_while_guesses_are_right() {
        // sequence, computed, chosen
        let rows = [(4, 9, 1), (4, 1, 2), (4, 3, 3), (4, 3, 3), (2, 3, 5), (2, 5, 5), (4, 5, 8)];
        let mut counted = Counted::default();
        let counts = rows.map(|(sequence, computed, chosen)| {
            let counts = counted.next(sequence, computed);
            if counts {
                counted.chose(chosen);
            }
            counts
        });
        assert_eq!(counts, [true, true, false, false, true, true, true]);
    }
}
