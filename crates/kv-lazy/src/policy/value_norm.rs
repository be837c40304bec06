//! Any policy, sparing the tokens with the largest value norms.
//!
//! A few values of huge norm carry more of the output than their weights say; losing them sends generation into loops (VaSE,
//! arXiv 2606.03928). Norms are computed once per token, when it is first judged.

use super::{Clock, Needs, Phase, Place, Policy, Rows, Rule, Score};
use crate::error::Result;
use crate::store::Relocation;

/// Ranks the `count` largest value norms of a head above everything else.
#[derive(Debug, Clone)]
pub struct ValueNormGuard<P> {
    inner: P,
    count: usize,
    norms: Vec<Vec<f32>>,
}

impl<P> ValueNormGuard<P> {
    /// Spares `count` tokens per head.
    pub fn new(inner: P, count: usize) -> Self {
        Self {
            inner,
            count,
            norms: Vec::new(),
        }
    }
}

impl<P: Policy + Clone + 'static> Policy for ValueNormGuard<P> {
    fn name(&self) -> &'static str {
        self.inner.name()
    }
    fn needs(&self) -> Needs {
        self.inner.needs().with_values()
    }
    fn rule(&self, phase: Phase) -> Rule {
        // An overwritten slot would keep the norm of the token that left.
        let rule = self.inner.rule(phase);
        Rule {
            ahead: false,
            ..rule
        }
    }
    fn start(&mut self, place: Place) {
        self.norms = vec![Vec::new(); place.heads];
        self.inner.start(place);
    }
    fn score(
        &mut self,
        head: usize,
        rows: &dyn Rows,
        clock: &Clock,
        scores: &mut [Score],
    ) -> Result<()> {
        self.inner.score(head, rows, clock, scores)?;
        let norms = &mut self.norms[head];
        let new = rows.values(head, norms.len())?;
        norms.extend(
            new.chunks_exact(rows.head_dim())
                .map(|v| v.iter().map(|x| x * x).sum::<f32>()),
        );
        let mut order: Vec<usize> = (0..norms.len()).collect();
        if (1..order.len()).contains(&self.count) {
            order.select_nth_unstable_by(self.count - 1, |&a, &b| {
                norms[b].total_cmp(&norms[a]).then(a.cmp(&b))
            });
        }
        for &slot in order.iter().take(self.count) {
            scores[slot] = Score {
                value: f32::INFINITY,
                tie: u32::MAX,
            };
        }
        Ok(())
    }
    fn relocate(&mut self, head: usize, moves: &Relocation) {
        let norms = &mut self.norms[head];
        // Tokens that were never judged have no norm yet; they can only be the last ones.
        let known = norms.len();
        if moves.runs.iter().any(|run| run.from + run.count > known) || moves.len > known {
            norms.clear();
        } else {
            moves.apply(norms, 1);
        }
        self.inner.relocate(head, moves);
    }
    fn state_bytes(&self) -> usize {
        self.norms.iter().map(|n| n.len() * 4).sum::<usize>() + self.inner.state_bytes()
    }
    fn inner(&self) -> Option<&dyn Policy> {
        Some(&self.inner)
    }
    fn inner_mut(&mut self) -> Option<&mut dyn Policy> {
        Some(&mut self.inner)
    }
    fn boxed_clone(&self) -> Box<dyn Policy> {
        Box::new(self.clone())
    }
}
