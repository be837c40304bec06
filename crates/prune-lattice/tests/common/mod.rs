//! Networks that several tests are about.

use prune_lattice::{
    Cell,
    rnn::{InputKind, Rnn, RnnConfig},
};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

pub(crate) fn network(cell: Cell, input: InputKind, hidden: &[usize], outputs: usize) -> Rnn {
    let mut rnn = Rnn::new(RnnConfig::new(cell, input, hidden.to_vec(), outputs), 3).unwrap();
    let mut rng = ChaCha8Rng::seed_from_u64(9);
    rnn.params_mut()
        .iter_mut()
        .flat_map(|p| &mut p.data)
        .for_each(|v| *v += rng.random_range(-0.3..0.3));
    rnn
}

pub(crate) const INPUTS: [InputKind; 3] = [
    InputKind::OneHot { vocab: 5 },
    InputKind::Embedding { vocab: 5, dim: 3 },
    InputKind::Dense { dim: 4 },
];
