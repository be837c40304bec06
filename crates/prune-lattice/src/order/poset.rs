//! The partial order of reachability: strongly connected components, transitive closure, irreducible elements.
//!
//! `x ≤ y` where `y` can be reached from `x`. Neurons of one cycle are one element (a class). The closure goes through the
//! components sinks first and ORs the up-sets of immediate successors only (Habib, Morvan, Rampon 1993 use the same
//! reduction). Irreducibility in the Dedekind–MacNeille completion is read off the order itself; the completion, which can
//! have 2^(n/2) elements, is never built.

use super::{
    bits::{self, BitMatrix},
    scc::{self, Components},
};

/// A finite poset of classes of neurons, as two relations of n²/8 bytes each.
#[derive(Debug, Clone)]
pub struct Poset {
    classes: Components,
    up: BitMatrix,
    down: BitMatrix,
}

impl Poset {
    /// The reachability order of a digraph whose row `j` holds the targets of `j`. Loops do not matter.
    pub fn of_digraph(graph: &BitMatrix) -> Self {
        let classes = scc::components(graph);
        let n = classes.sizes.len();
        let mut up = BitMatrix::new(n, n);
        for j in 0..graph.rows() {
            let row = up.row_mut(classes.of[j]);
            for i in graph.row_ones(j) {
                let c = classes.of[i];
                row[c / 64] |= 1 << (c % 64);
            }
        }
        close(&mut up);
        let down = up.transpose();
        Self { classes, up, down }
    }

    /// Number of elements (classes).
    pub fn len(&self) -> usize {
        self.up.rows()
    }

    /// Whether there are no elements.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Class of each neuron and size of each class. Classes are numbered so that `x < y` implies `x > y` as numbers.
    pub fn classes(&self) -> &Components {
        &self.classes
    }

    /// Row `x` holds the elements `≥ x`.
    pub fn up(&self) -> &BitMatrix {
        &self.up
    }

    /// Row `x` holds the elements `≤ x`.
    pub fn down(&self) -> &BitMatrix {
        &self.down
    }

    /// Bytes of the two relations: n²/4, with rows in whole words of 64 bits.
    pub fn bytes(&self) -> usize {
        self.up.bytes() + self.down.bytes()
    }

    /// The elements that are meet-irreducible in the Dedekind–MacNeille completion: `x` is one iff the down-sets of the
    /// elements above it intersect in more than the down-set of `x`. A greatest element is not (the empty intersection is
    /// everything, which is its down-set).
    pub fn meet_irreducible(&self) -> Vec<bool> {
        irreducible(&self.up, &self.down, bits::highest)
    }

    /// The join-irreducible elements: the meet-irreducible ones of the reversed order.
    pub fn join_irreducible(&self) -> Vec<bool> {
        irreducible(&self.down, &self.up, bits::lowest)
    }

    /// The upper covers of every element: the edges of the Hasse diagram, as (lower, upper) pairs of classes.
    pub fn covers(&self) -> Vec<(usize, usize)> {
        let mut pairs = Vec::new();
        let mut above = vec![0; self.up.row(0).len()];
        for x in 0..self.len() {
            above.copy_from_slice(self.up.row(x));
            above[x / 64] &= !(1 << (x % 64));
            while let Some(y) = bits::highest(&above) {
                pairs.push((x, y));
                bits::and_not(&mut above, self.up.row(y));
            }
        }
        pairs
    }

    /// The verdict of a neuron's class, for every neuron.
    pub fn per_neuron(&self, per_class: &[bool]) -> Vec<bool> {
        self.classes.of.iter().map(|&c| per_class[c]).collect()
    }
}

/// Reflexive transitive closure of an acyclic relation whose edges all go to smaller numbers (or loops).
fn close(up: &mut BitMatrix) {
    let mut edges = vec![0u64; up.cols().div_ceil(64)];
    for c in 0..up.rows() {
        let row = up.row_mut(c);
        edges.copy_from_slice(row);
        row.fill(0);
        row[c / 64] = 1 << (c % 64);
        // Descending: a successor that a nearer one reaches is already there and costs nothing.
        for word in (0..=c / 64).rev() {
            loop {
                let todo = edges[word] & !up.row(c)[word];
                if todo == 0 {
                    break;
                }
                let d = word * 64 + 63 - todo.leading_zeros() as usize;
                let (row, successor) = up.row_pair(c, d);
                bits::or(&mut row[..=word], &successor[..=word]);
            }
        }
    }
}

/// `x` is irreducible iff the intersection of `opposite[y]` over the covers `y` of `x` differs from `opposite[x]`.
/// `nearest` picks an element of a set of strict successors that is a cover.
fn irreducible(
    toward: &BitMatrix,
    opposite: &BitMatrix,
    nearest: fn(&[u64]) -> Option<usize>,
) -> Vec<bool> {
    let n = toward.rows();
    let sizes: Vec<usize> = (0..n).map(|x| bits::count(opposite.row(x))).collect();
    let words = n.div_ceil(64);
    let (mut candidates, mut meet) = (vec![0u64; words], vec![0u64; words]);
    (0..n)
        .map(|x| {
            let own = sizes[x];
            candidates.copy_from_slice(toward.row(x));
            candidates[x / 64] &= !(1 << (x % 64));
            let Some(first) = nearest(&candidates) else {
                // The empty intersection is everything.
                return own != n;
            };
            bits::and_not(&mut candidates, toward.row(first));
            meet.copy_from_slice(opposite.row(first));
            let mut size = sizes[first];
            while size != own {
                let Some(y) = nearest(&candidates) else { break };
                bits::and_not(&mut candidates, toward.row(y));
                size = bits::and_count(&mut meet, opposite.row(y));
            }
            size != own
        })
        .collect()
}
