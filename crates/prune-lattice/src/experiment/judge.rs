//! How good a network is: by its own read-out, or by whatever reads it.

use crate::{
    data::Dataset,
    error::Result,
    rnn::{BlockRnn, Evaluation, Rnn, evaluate, evaluate_blocks},
};

/// How the quality of a network is measured.
pub(super) trait Judge: Sync {
    /// On the test split.
    fn test(&self, network: &Judged<'_>) -> Result<Evaluation>;
    /// On the validation split.
    fn valid(&self, network: &Judged<'_>) -> Result<Evaluation>;
    /// On the test split by block kernels, where these can run the network.
    fn test_blocks(&self, network: &BlockRnn) -> Result<Option<Evaluation>>;
}

/// A network to be judged.
pub(super) struct Judged<'a> {
    pub(super) rnn: &'a Rnn,
    /// Which neurons of the network before pruning it has, where the others were merged into them.
    pub(super) merged: Option<&'a [Vec<bool>]>,
}

/// By the network's own read-out.
impl Judge for Dataset {
    fn test(&self, network: &Judged<'_>) -> Result<Evaluation> {
        evaluate(network.rnn, &self.test)
    }

    fn valid(&self, network: &Judged<'_>) -> Result<Evaluation> {
        evaluate(network.rnn, &self.valid)
    }

    fn test_blocks(&self, network: &BlockRnn) -> Result<Option<Evaluation>> {
        evaluate_blocks(network, &self.test).map(Some)
    }
}
