//! Methods for mixtures by name.

use super::compensation::NoExpertCompensation;
use super::fewer::{FewerExperts, check_rank, fewer, fewer_with_terms};
use super::joint::{Joint, JointData, JointOptions, joint};
use super::merge::check_width;
use super::method::{
    ExpertMethod, HcSmoe, MSmoe, RandomExperts, Reap, Reconstruct, Representative, Stun,
};
use super::neurons::{NeuronOptions, narrow};
use super::select::{Outcome, plan};
use super::{ExpertCompensation, ExpertOptions, ExpertPlan, ExpertRefits, Keep, LayerExperts};
use crate::compensation::check_ridge;
use crate::{Error, Result};
use causal_lm::{Decoder, Progress};
use serde::{Deserialize, Serialize};

/// One way to make a mixture smaller, or cheaper to run.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct ExpertRecipe {
    /// Its name in tables.
    pub name: String,
    /// What it does.
    pub change: Change,
    /// How experts are narrowed, where they are.
    pub neurons: NeuronOptions,
    /// Whether experts are dropped from a layer by what it reads behind the pruned layers before it.
    #[serde(default)]
    pub progressive: bool,
}

/// What a recipe does.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub enum Change {
    /// Drops or merges experts.
    Experts(ExpertMethod, ExpertCompensation),
    /// Narrows all experts.
    Neurons,
    /// Both, under one budget.
    Joint(ExpertMethod, Joint),
    /// Sends each token to fewer experts.
    Fewer(FewerExperts),
    /// The same with a linear term of this rank beside the experts of each layer, which no stock format holds.
    FewerWithTerms(usize),
}

/// The rank of linear terms unless another is asked for.
const TERM_RANK: usize = 16;

/// What a recipe asks for.
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub enum Aim {
    /// This share of the experts' weights less.
    Ratio(f64),
    /// So many experts for each token.
    Chosen(usize),
}

/// Methods that are more than the choice of experts to drop.
const MORE: [&str; 11] = [
    "stun-reap",
    "hc-smoe-tied",
    "m-smoe-tied",
    "neurons",
    "joint",
    "joint-by-layer",
    "topk-plain",
    "topk-scale",
    "topk-expert-scale",
    "topk-channel-scale",
    "topk-lowrank",
];

impl ExpertRecipe {
    /// Names that [`ExpertRecipe::named`] knows.
    pub fn names() -> impl Iterator<Item = &'static str> {
        ExpertMethod::NAMES.iter().copied().chain(MORE)
    }

    /// A method as its authors define it, without compensation; `seed` is that of `random`.
    pub fn named(name: &str, seed: u64) -> Option<Self> {
        let none = ExpertCompensation::from(NoExpertCompensation);
        let change = match name {
            "random" => Change::Experts(RandomExperts { seed }.into(), none),
            "stun-reap" => {
                let representative = Representative::Reap;
                let stun = Stun {
                    representative,
                    ..Stun::default()
                };
                Change::Experts(stun.into(), none)
            }
            "hc-smoe-tied" => {
                let tied = HcSmoe {
                    tied: true,
                    ..HcSmoe::default()
                };
                Change::Experts(tied.into(), none)
            }
            "m-smoe-tied" => {
                let tied = MSmoe {
                    tied: true,
                    ..MSmoe::default()
                };
                Change::Experts(tied.into(), none)
            }
            "neurons" => Change::Neurons,
            "joint" => Change::Joint(Reap.into(), Joint::Uniform),
            "joint-by-layer" => Change::Joint(Reap.into(), Joint::ByLayer),
            "topk-plain" => Change::Fewer(FewerExperts::Plain),
            "topk-scale" => Change::Fewer(FewerExperts::Scale),
            "topk-expert-scale" => Change::Fewer(FewerExperts::ExpertScale),
            "topk-channel-scale" => Change::Fewer(FewerExperts::ChannelScale),
            "topk-lowrank" => Change::FewerWithTerms(TERM_RANK),
            other => Change::Experts(ExpertMethod::named(other)?, none),
        };
        Some(Self {
            name: name.into(),
            change,
            neurons: NeuronOptions::default(),
            progressive: false,
        })
    }

    /// The same with what makes up for dropped experts; methods that drop none are as they were.
    pub fn compensation(mut self, compensation: impl Into<ExpertCompensation>) -> Self {
        if let Change::Experts(_, now) = &mut self.change {
            *now = compensation.into();
        }
        self
    }

    /// The same with every layer calibrated behind the pruned ones, dropping and narrowing alike, or on the dense model.
    pub fn progressive(mut self, progressive: bool) -> Self {
        self.progressive = progressive;
        self.neurons.progressive = progressive;
        self
    }

    /// Whether what it does to a layer depends on what the layer reads, so that it can be done behind the pruned layers.
    /// Those that send tokens to fewer experts are fitted to the dense model.
    pub fn reads_layers(&self) -> bool {
        match self.change {
            Change::Experts(method, compensation) => {
                let fits = !matches!(compensation, ExpertCompensation::Nothing(_));
                fits || method.reads_layers()
            }
            Change::Neurons => self.neurons.reads_tokens(),
            Change::Joint(..) => true,
            Change::Fewer(_) | Change::FewerWithTerms(_) => false,
        }
    }

    /// The rank of the linear terms that it adds; `None` where it adds none, and checkpoints hold all that it makes.
    pub fn term_rank(&self) -> Option<usize> {
        match self.change {
            Change::FewerWithTerms(rank) => Some(rank),
            _ => None,
        }
    }

    /// The same with linear terms of this rank, where it adds some.
    pub fn with_term_rank(mut self, rank: usize) -> Self {
        if let Change::FewerWithTerms(now) = &mut self.change {
            *now = rank;
        }
        self
    }

    /// The same with these clusters of STUN averaged, which its name tells; methods without such clusters are as they were.
    pub fn reconstruct(mut self, reconstruct: Reconstruct) -> Self {
        if let Change::Experts(method, _) = &mut self.change
            && let Some(stun) = method.stun_mut()
        {
            stun.reconstruct = reconstruct;
            if reconstruct != Reconstruct::Never {
                self.name = format!("{}+averaged-{}", self.name, reconstruct.name());
            }
        }
        self
    }

    /// Whether it makes clusters that can be averaged.
    pub fn reconstructs(&self) -> bool {
        matches!(&self.change, Change::Experts(method, _) if method.stun().is_some())
    }

    /// The same with this seed, where it draws.
    pub fn seed(mut self, seed: u64) -> Self {
        if let Change::Experts(method @ ExpertMethod::Random(_), _) = &mut self.change {
            *method = RandomExperts { seed }.into();
        }
        self
    }

    /// Whether it draws, so that runs with several seeds say more.
    pub fn draws(&self) -> bool {
        matches!(self.change, Change::Experts(ExpertMethod::Random(_), _))
    }

    /// Whether it is there to be compared with: experts at random, or by how often or with which weight they are chosen.
    pub fn is_control(&self) -> bool {
        use ExpertMethod::{Frequency, GateSum, ProbSum, Random};
        matches!(
            self.change,
            Change::Experts(Random(_) | Frequency(_) | GateSum(_) | ProbSum(_), _)
                | Change::Fewer(FewerExperts::Plain)
                | Change::FewerWithTerms(_)
        )
    }

    /// Whether it removes neurons of experts, whose down projections it refits where [`NeuronOptions::refit`] is on.
    pub fn narrows(&self) -> bool {
        matches!(self.change, Change::Neurons | Change::Joint(..))
    }

    /// Whether it drops or merges experts and nothing else.
    pub fn drops(&self) -> bool {
        matches!(self.change, Change::Experts(..))
    }

    /// Whether it merges experts, which are then not gone.
    pub fn merges(&self) -> bool {
        use ExpertMethod::{HcSmoe, MSmoe};
        matches!(self.change, Change::Experts(HcSmoe(_) | MSmoe(_), _))
    }

    /// Whether all router rows stay, which are to share experts or stand for constants: only this workspace and the folder's loader
    /// open the result.
    pub fn keeps_rows(&self) -> bool {
        match self.change {
            Change::Experts(method, compensation) => {
                let options = ExpertOptions::new(method, Keep::Without(0.0));
                options.compensation(compensation).keeps_rows()
            }
            _ => false,
        }
    }

    /// Whether it makes tokens cheaper and the model no smaller.
    pub fn is_fewer(&self) -> bool {
        matches!(self.change, Change::Fewer(_) | Change::FewerWithTerms(_))
    }

    /// Refuses what cannot be asked of this model, before anything is computed: parameters out of range, experts narrower
    /// than the alignment, fewer experts than each token goes to, clusters of STUN that cannot be averaged.
    ///
    /// # Errors
    /// [`Error::Option`], [`Error::Ratio`], [`Error::Width`], [`Error::Experts`], [`Error::Unsupported`], and causal-lm's error for a
    /// model whose router rows share experts already.
    pub fn check(&self, decoder: &Decoder<'_>, aim: Aim) -> Result<()> {
        decoder.config().refuse_expert_map("pruning experts")?;
        let mixtures = decoder.config().mixtures.iter().enumerate();
        let mixtures = mixtures.filter_map(|(layer, mixture)| Some((layer, (*mixture)?)));
        match (self.change, aim) {
            (Change::Experts(method, compensation), Aim::Ratio(ratio)) => {
                let stun = method.stun();
                let averages = stun.is_some_and(|stun| stun.reconstruct != Reconstruct::Never);
                if averages && !matches!(compensation, ExpertCompensation::Nothing(_)) {
                    return Err(Error::Unsupported {
                        method: "a compensation beside averaged experts",
                        model_type: decoder.config().model_type,
                        reason: "it stands for experts that are gone or needs the outputs of those that stay, and averaged ones are neither gone nor run",
                    });
                }
                let options = ExpertOptions::new(method, Keep::Without(ratio));
                let options = options.compensation(compensation);
                for (layer, mixture) in mixtures {
                    let kept = options.kept(layer, mixture)?;
                    if kept < mixture.experts && method.aligns(kept) {
                        check_width(decoder, mixture.width)?;
                    }
                }
                Ok(())
            }
            (Change::Neurons | Change::Joint(..), Aim::Ratio(ratio)) => {
                check_ridge(self.neurons.ridge)?;
                self.neurons.check()?;
                for (layer, mixture) in mixtures {
                    self.neurons.width(layer, mixture.width, 1.0 - ratio)?;
                }
                Ok(())
            }
            (Change::FewerWithTerms(rank), _) => check_rank(rank, decoder.config().hidden),
            _ => Ok(()),
        }
    }

    /// Makes the plan.
    ///
    /// # Errors
    /// [`Error::Option`] for an aim that the recipe does not have, and what planning reports.
    pub fn plan(
        &self,
        decoder: &Decoder<'_>,
        data: JointData<'_>,
        aim: Aim,
        progress: &dyn Progress,
    ) -> Result<(Outcome, Option<ExpertRefits>)> {
        let windows = data.calibration;
        let none = |method: ExpertMethod| {
            let options = ExpertOptions::new(method, Keep::Without(0.0));
            options.progressive(self.progressive)
        };
        match (self.change, aim) {
            (Change::Experts(method, compensation), Aim::Ratio(ratio)) => {
                let options = none(method).keeping(Keep::Without(ratio));
                let options = options.compensation(compensation);
                Ok((plan(decoder, windows, &options, progress)?, None))
            }
            (Change::Neurons, Aim::Ratio(ratio)) => {
                let mixtures = decoder.config().mixtures.iter().enumerate();
                let width = |(layer, mixture): (usize, &Option<_>)| {
                    let mixture: causal_lm::config::Mixture = (*mixture)?;
                    Some(self.neurons.width(layer, mixture.width, 1.0 - ratio))
                };
                let widths = mixtures.map(|of| width(of).transpose());
                let widths: Vec<Option<usize>> = widths.collect::<Result<_>>()?;
                let refits = ExpertRefits::new(data.dir);
                let mut outcome = plan(decoder, windows, &none(Reap.into()), progress)?;
                let options = (&self.neurons, &refits);
                let whole = (&outcome.plan, &widths[..]);
                outcome.plan = narrow(decoder, windows, whole, options, progress)?;
                outcome.plan.method = None;
                Ok((outcome, Some(refits)))
            }
            (Change::Joint(method, shape), Aim::Ratio(ratio)) => {
                let options = JointOptions::new(none(method), self.neurons, ratio).joint(shape);
                let (outcome, refits) = joint(decoder, data, &options, progress)?;
                Ok((outcome, Some(refits)))
            }
            (Change::Fewer(factors), Aim::Chosen(chosen)) => {
                let plan = fewer(decoder, windows, chosen, factors, progress)?;
                Ok((Outcome::of(plan), None))
            }
            (Change::FewerWithTerms(rank), Aim::Chosen(chosen)) => {
                let (plan, terms) = fewer_with_terms(decoder, windows, chosen, rank, progress)?;
                let outcome = Outcome {
                    terms,
                    ..Outcome::of(plan)
                };
                Ok((outcome, None))
            }
            (_, Aim::Ratio(ratio)) => Err(Error::Option {
                option: "ratio",
                value: ratio,
                expected: "a number of experts for each token is expected",
            }),
            (_, Aim::Chosen(chosen)) => Err(Error::Option {
                option: "chosen",
                value: chosen as f64,
                expected: "a ratio is expected",
            }),
        }
    }
}

impl Outcome {
    /// A plan of which nothing else is known.
    fn of(plan: ExpertPlan) -> Self {
        Self {
            plan,
            layers: vec![],
            divergence: None,
            terms: vec![],
        }
    }
}

impl ExpertPlan {
    /// The plan that changes nothing.
    pub fn whole(decoder: &Decoder<'_>) -> Self {
        let mixtures = decoder.config().mixtures.iter();
        let keep = |mixture: &Option<causal_lm::config::Mixture>| {
            let experts = (*mixture)?.experts;
            Some(LayerExperts::keep(experts, (0..experts).collect()))
        };
        Self {
            layers: mixtures.map(keep).collect(),
            ..Self::default()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_name_gives_a_recipe_of_that_name() {
        for name in ExpertRecipe::names() {
            let recipe = ExpertRecipe::named(name, 3).unwrap();
            assert_eq!(recipe.name, name);
            let json = serde_json::to_string(&recipe).unwrap();
            assert_eq!(serde_json::from_str::<ExpertRecipe>(&json).unwrap(), recipe);
        }
        assert_eq!(ExpertRecipe::named("no-such-method", 0), None);
        let random = ExpertRecipe::named("random", 1).unwrap();
        assert_eq!(
            random.clone().seed(2),
            ExpertRecipe::named("random", 2).unwrap()
        );
        assert!(random.draws() && random.is_control());
    }
}
