//! The sites of a search over widths: the sublayers of all blocks, made from a store of levels.

use super::fitness::{Place, Sites};
use super::levels::LevelStore;
use super::variant::Half;
use crate::Result;
use crate::ranking::Ranking;
use causal_lm::{Block, Widths};

/// Sublayers at the widths of a store: a choice is a number of steps of the ranking.
pub(crate) struct Sublayers<'a> {
    rankings: Vec<&'a Ranking>,
    places: Vec<Place>,
    store: &'a LevelStore,
    /// Of the dense blocks.
    widths: &'a [Widths],
}

impl<'a> Sublayers<'a> {
    /// One site for each ranking, in the order of the layers, attention first.
    pub(crate) fn new(
        rankings: Vec<&'a Ranking>,
        store: &'a LevelStore,
        widths: &'a [Widths],
    ) -> Self {
        Self {
            places: rankings.iter().map(|r| Place::Block(r.layer)).collect(),
            rankings,
            store,
            widths,
        }
    }
}

impl Sites for Sublayers<'_> {
    fn places(&self) -> &[Place] {
        &self.places
    }

    fn half(&self, block: &Block, site: usize, choice: usize) -> Result<Half> {
        let ranking = self.rankings[site];
        let kept = self.store.load(ranking, choice)?;
        Half::new(block, self.widths[block.layer], ranking, kept)
    }
}
