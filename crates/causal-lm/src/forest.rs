//! Sequences that begin alike, packed one after the other without padding.
//!
//! A [`Tree`] is a trunk and branches that each continue it alone, as the choices of a question continue the question.
//! The trunk's tokens stand in the batch once, followed by those of each branch; a [`Forest`] is several trees side by
//! side. Everything in a block but attention works on tokens one by one and does not notice; attention lets a token
//! see its own branch and the trunk before it.

use crate::Result;
use candle_core::Tensor;
use kv_lazy::attention::Scores;
use rayon::prelude::*;

/// Lengths of a trunk and of the branches that continue it, in tokens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tree {
    /// Tokens of the trunk, at least one.
    pub trunk: usize,
    /// Tokens of each branch, at least one.
    pub branches: Vec<usize>,
}

/// Trees side by side in one batch entry.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Forest {
    /// The trees in the order of their tokens.
    pub trees: Vec<Tree>,
}

impl Tree {
    /// Tokens of the trunk and all branches.
    pub fn tokens(&self) -> usize {
        self.trunk + self.branches.iter().sum::<usize>()
    }

    /// The position of each token in its own sequence: every branch goes on where the trunk ends.
    pub fn positions(&self) -> impl Iterator<Item = usize> {
        let branch = |&len: &usize| self.trunk..self.trunk + len;
        (0..self.trunk).chain(self.branches.iter().flat_map(branch))
    }
}

impl Forest {
    /// Tokens of all trees.
    pub fn tokens(&self) -> usize {
        self.trees.iter().map(Tree::tokens).sum()
    }

    /// Causal attention within each branch and its trunk: `q` `[1, heads, tokens, head_dim]`, `k` and `v` with
    /// `kv_heads`; the result has the shape of `q`.
    pub(crate) fn attend(
        &self,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        scores: Scores,
        sliding_window: Option<usize>,
    ) -> Result<Tensor> {
        let starts = self.trees.iter().scan(0, |next, tree| {
            let start = *next;
            *next += tree.tokens();
            Some((start, tree))
        });
        let of_tree = |(start, tree): (usize, &Tree)| -> Result<Vec<Tensor>> {
            let cut = |x: &Tensor, at: usize, len: usize| x.narrow(2, at, len);
            let prefill = kv_lazy::attention::prefill;
            let (q_trunk, k_trunk, v_trunk) = (
                cut(q, start, tree.trunk)?,
                cut(k, start, tree.trunk)?,
                cut(v, start, tree.trunk)?,
            );
            let trunk = prefill(&q_trunk, &k_trunk, &v_trunk, scores, 0, sliding_window)?;
            let mut parts = vec![trunk];
            let mut at = start + tree.trunk;
            for &len in &tree.branches {
                let q = cut(q, at, len)?;
                let k = Tensor::cat(&[&k_trunk, &cut(k, at, len)?], 2)?;
                let v = Tensor::cat(&[&v_trunk, &cut(v, at, len)?], 2)?;
                parts.push(prefill(&q, &k, &v, scores, tree.trunk, sliding_window)?);
                at += len;
            }
            Ok(parts)
        };
        let starts: Vec<_> = starts.collect();
        let parts: Vec<Vec<Tensor>> = starts.into_par_iter().map(of_tree).collect::<Result<_>>()?;
        Ok(Tensor::cat(&parts.concat(), 2)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn branches_go_on_where_the_trunk_ends() {
        let tree = Tree {
            trunk: 3,
            branches: vec![2, 1],
        };
        assert_eq!(tree.positions().collect::<Vec<_>>(), [0, 1, 2, 3, 4, 3]);
        assert_eq!(tree.tokens(), 6);
    }
}
