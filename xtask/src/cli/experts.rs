//! The flags of what compresses the experts of a mixture by the tokens that they see.

use std::num::NonZeroUsize;

use clap::Args;
use lowrank_eora::experts::GramOptions;
use prune_structured::experts::ExpertRecipe;

use super::values::{given, positive, tokens};

/// How the tokens of an expert count, of which most see few.
#[derive(Args)]
#[command(next_help_heading = "Statistics of experts")]
pub(super) struct ExpertArgs {
    /// Mixtures: tokens of an expert's pool, those that came closest to choosing it, towards which its own are drawn where its
    /// neurons or its down projection are fitted [default: 1024]
    #[arg(long, value_name = "N", value_parser = positive)]
    pool_tokens: Option<NonZeroUsize>,
    /// Mixtures: weight of an expert's pool beside its own tokens, in tokens; 0 for its own alone [default: the width of what is
    /// read where neurons are refitted, else a quarter of it]
    #[arg(long, value_name = "N", value_parser = tokens)]
    expert_prior: Option<f64>,
    /// Mixtures: let the tokens of an expert count alike, instead of by the squares of their gates
    #[arg(long)]
    no_gate_weight: bool,
}

impl ExpertArgs {
    /// The flags that were given.
    pub(super) fn asked(&self) -> Vec<&'static str> {
        given([
            ("--pool-tokens", self.pool_tokens.is_some()),
            ("--expert-prior", self.expert_prior.is_some()),
            ("--no-gate-weight", self.no_gate_weight),
        ])
    }

    /// How tokens count where experts are compressed.
    pub(super) fn grams(&self) -> GramOptions {
        let mut grams = GramOptions::default();
        grams.pool_tokens = self
            .pool_tokens
            .map_or(grams.pool_tokens, NonZeroUsize::get);
        grams.prior = self.expert_prior;
        grams.gate_weight = !self.no_gate_weight;
        grams
    }

    /// Sets the same where experts are narrowed.
    pub(super) fn change(&self, recipe: &mut ExpertRecipe) {
        let grams = self.grams();
        recipe.neurons.pool_tokens = grams.pool_tokens;
        recipe.neurons.prior = grams.prior;
        recipe.neurons.gate_weight = grams.gate_weight;
    }
}
