//! Pages and sequences of the batch's jobs: who gets some, and who is put back when there are none left.

use super::{Batch, prompt::Filling, text::Text};
use crate::{backend::DECODE_ROWS, error::Result, model::kv::pages_for, ops::PAGE};

/// A running text has pages for this many next tokens where the pool has some: all that may be enqueued ahead, and all guesses.
const AHEAD: usize = DECODE_ROWS;

impl Batch {
    /// The jobs that have a sequence.
    fn texts(&self) -> impl Iterator<Item = &Text> {
        self.running.iter().chain(self.filling.as_ref().map(|f| &f.text))
    }

    /// Gives the next job a sequence and pages for its tokens so far, if no other prompt is being computed.
    pub(super) fn admit(&mut self) -> Result<()> {
        if self.filling.is_some() {
            return Ok(());
        }
        let free = (0..self.options.sequences).find(|s| self.texts().all(|t| t.sequence != *s));
        let (Some(sequence), Some(text)) = (free, self.queue.front()) else { return Ok(()) };
        let mut found = self.pool.find(&text.prompt, text.reusable());
        let shared = found.pages.len();
        let wanted = pages_for(text.len()) - shared;
        // Those that run want another page each before long, and so does this one: if there are none, it had better wait.
        let soon = match self.running.is_empty() {
            true => 0,
            false => self.running.iter().chain([text]).filter(|t| t.grows()).count(),
        };
        self.pool.share(&found.pages);
        // The page to copy from is kept while others are taken. Where it is the very page that is missing, its tokens are computed
        // instead: in a cache of one context nobody else has a page to give back, and the job would wait for ever.
        if let Some((page, _)) = found.rest {
            self.pool.share(&[page]);
            if self.pool.available() < wanted + soon {
                self.pool.give_back(&[page]);
                found.rest = None;
            }
        }
        if self.pool.available() < wanted + soon {
            self.pool.give_back(&found.pages);
            debug_assert!(
                !self.running.is_empty(),
                "job {:?} waits for pages, and nobody has any to give back",
                text.id
            );
            return Ok(()); // until others end
        }
        let reused = found.tokens();
        let mut pages = found.pages;
        pages.extend((0..wanted).map_while(|_| self.pool.take()));
        if let Some((page, _)) = found.rest {
            self.timeline.copy_page(pages[shared], page)?;
            self.pool.give_back(&[page]);
        }
        let Some(mut text) = self.queue.pop_front() else { return Ok(()) };
        self.timeline.set_pages(sequence, 0, &pages)?;
        (text.pages, text.held) = (pages, shared);
        text.begin(sequence, reused, self.options.max_tokens, self.companion.as_ref());
        self.filling = Some(Filling::new(text));
        Ok(())
    }

    /// Lets later prompts find what is computed of a prompt.
    pub(super) fn hold(&mut self, text: &mut Text) {
        if text.prompt.len() <= DECODE_ROWS {
            return; // the kernels of a step computed it
        }
        for (i, tokens) in text.prompt.chunks(PAGE).enumerate().skip(text.held) {
            let before = i.checked_sub(1).map(|i| text.pages[i]);
            if i * PAGE + tokens.len() > text.pos || !self.pool.hold(before, text.pages[i], tokens) {
                return;
            }
            text.held += 1;
        }
    }

    /// Gives a running text pages for its next tokens. If there is none even for the very next one and that `must` have a page, the
    /// job that came last is put back, and the result is `false`.
    pub(super) fn cover(&mut self, i: usize, must: bool) -> Result<bool> {
        let text = &mut self.running[i];
        let (had, wanted) = (text.pages.len(), pages_for(text.pos + text.writer.left().min(AHEAD)));
        text.pages.extend((had..wanted).map_while(|_| self.pool.take()));
        if text.pages.len() > had {
            self.timeline.set_pages(text.sequence, had, &text.pages[had..])?;
        }
        if !must || text.room() > 0 {
            return Ok(true);
        }
        self.put_back_last();
        Ok(false)
    }

    /// The job that came last gives up its sequence and pages and waits in front of all others. Its prompt and its answer so far are
    /// computed again later, by the same kernels. The jobs before it go on, so the first one always comes to its end.
    fn put_back_last(&mut self) {
        let Some(last) = self.texts().map(|t| t.id).max() else { return };
        let text = match self.filling.take_if(|f| f.text.id == last) {
            Some(filling) => Some(filling.text),
            None => self.running.iter().position(|t| t.id == last).map(|i| self.running.remove(i)),
        };
        let Some(mut text) = text else { return };
        self.pool.give_back(&std::mem::take(&mut text.pages));
        self.put_back += 1;
        self.queue.push_front(text);
    }

    /// To verify that what is put back goes on with the same bits: from now on somebody is put back after every so many steps.
    pub(crate) fn try_put_backs(&mut self, every: usize) {
        self.trial = Some((every, 0));
    }

    /// Puts somebody back if it is time for that. In between, everybody who runs gets a token.
    pub(super) fn try_put_back(&mut self) {
        let Some((every, steps)) = &mut self.trial else { return };
        *steps += usize::from(!self.running.is_empty());
        if *steps > *every {
            *steps = 0;
            self.put_back_last();
        }
    }

    /// A running text is no longer wanted.
    pub(super) fn end(&mut self, i: usize) {
        let text = self.running.remove(i);
        self.pool.give_back(&text.pages);
    }
}

impl Text {
    /// Whether it may need more pages than it has, or than its tokens so far need.
    fn grows(&self) -> bool {
        let next = usize::from(!self.is_told()); // its first token is chosen without being computed
        pages_for(self.len() + self.writer.left().saturating_sub(next)) > self.pages.len().max(pages_for(self.len()))
    }

    /// How many tokens from its last one on have pages.
    pub fn room(&self) -> usize {
        (self.pages.len() * PAGE).saturating_sub(self.pos)
    }
}
