//! The flags of `eval structured`.

mod search;

use std::num::NonZeroUsize;
use std::path::PathBuf;

use causal_lm::names::ExpertLayout;
use clap::builder::{PossibleValue, PossibleValuesParser, TypedValueParser};
use clap::{Args, ValueEnum};
use eval_report::cells::Shard;
use lowrank_eora::compress::Compressor;
use lowrank_eora::experts::Owl;
use prune_structured::experts::method::Reconstruct;
use prune_structured::experts::{ExpertCompensation, ExpertRecipe};
use prune_structured::gguf::Precision;
use prune_structured::score::Random;
use prune_structured::{
    Allocation, AttentionUnit, Compensation, DEFAULT_RIDGE, Form, Recipe, Score,
};
use tensor_io::WriteOptions;
use toy_lm::bundled::CALIBRATION;

use super::experts::ExpertArgs;
use super::names::Known;
use super::values::{given, positive, ratio, seeds};
use super::weights::CalibrationArithmetic;
use super::{TextArgs, bundled};
use crate::suites::structured::{self, ExpertMethods, Named};

#[derive(Args)]
pub(super) struct StructuredArgs {
    #[command(flatten)]
    text: TextArgs,
    /// Text to calibrate on, or a part of one, such as FILE[0..80%]; must differ from --text
    #[arg(long, value_name = "FILE", default_value_os_t = bundled(CALIBRATION))]
    calib: PathBuf,
    /// Windows to calibrate on, sampled with --seed
    #[arg(long, value_name = "N", default_value = "128", value_parser = positive)]
    calib_samples: NonZeroUsize,
    /// Compute only part I of N of the calibration statistics, into the folder of --cells; when all parts are there, runs of
    /// the same command with this folder merge them instead of calibrating
    #[arg(long, value_name = "I/N")]
    pub(super) calib_shard: Option<Shard>,
    /// Arithmetic of calibration and of what is measured
    #[arg(long, value_enum, value_name = "NAME", default_value_t)]
    pub(super) arithmetic: CalibrationArithmetic,
    /// Methods, separated by commas. Dense models: those of score and allocation. Mixtures of experts: those that drop, merge
    /// or narrow experts; topk-* rows are measured once, at every smaller number of experts for a token, topk-lowrank in memory alone,
    /// as no format holds it [default: rd-dp; for
    /// mixtures neurons]
    #[arg(long, value_delimiter = ',', value_name = "M[,M..]", value_parser = Known::new(methods()))]
    method: Vec<String>,
    /// Fractions of the prunable parameters to remove, separated by commas; of a mixture those of its experts
    #[arg(long, default_value = "0.2", value_delimiter = ',', value_name = "R[,R..]", value_parser = ratio)]
    ratio: Vec<f64>,
    /// Write the pruned checkpoint to this folder; several go to subfolders METHOD-RATIO, or METHOD-RATIO-seedN for random
    /// methods and searches
    #[arg(long, value_name = "DIR")]
    save: Option<PathBuf>,
    /// Replace existing output at --save and --save-plans
    #[arg(long)]
    overwrite: bool,
    /// Also export each saved checkpoint into its folder, formats separated by commas: model-PRECISION.gguf for
    /// llama.cpp, or a folder nemotron-nas for vLLM
    #[arg(
        long,
        value_delimiter = ',',
        value_name = "E[,E..]",
        requires = "save",
        conflicts_with = "masked",
        value_parser = exports()
    )]
    export: Vec<structured::Export>,
    /// Write each plan (the units that are kept) to this folder as METHOD-RATIO.json or METHOD-RATIO-seedN.json
    #[arg(long, value_name = "DIR")]
    save_plans: Option<PathBuf>,
    /// Maximum shard size in bytes
    #[arg(
        long,
        value_name = "N",
        default_value = "5000000000",
        requires = "save"
    )]
    max_shard_bytes: u64,
    /// Keep the dense shapes and write zeros for removed weights
    #[arg(long)]
    masked: bool,
    /// Only make and show the plans, including the search of tyr; write and evaluate nothing
    #[arg(long)]
    dry_run: bool,
    /// Seeds of random methods and searches, counted from --seed [default: 3]
    #[arg(long, value_name = "N", value_parser = seeds)]
    seeds: Option<NonZeroUsize>,
    /// Mixtures: also compress all experts, by compressors of `eval lowrank` separated by commas, each as NAME or NAME+eora-RANK
    #[arg(long, value_delimiter = ',', value_name = "C[,C..]", value_parser = compressor)]
    quantise: Vec<(Compressor, usize)>,
    /// Mixtures: also compress the experts that each method leaves, in rows of their own; compressors as for --quantise
    #[arg(long, value_delimiter = ',', value_name = "C[,C..]", value_parser = compressor)]
    then: Vec<(Compressor, usize)>,
    /// Mixtures: compressors that prune a share of the weights take less from layers with more outliers (OWL)
    #[arg(long)]
    owl: bool,
    /// Mixtures: calibrate each layer behind the pruned layers before it, not on the dense model
    #[arg(long)]
    progressive: bool,
    /// Mixtures: clusters of stun, stun-reap and stun-compat that are averaged, router rows included, instead of keeping one of their
    /// members [default: never]
    #[arg(long, value_enum, value_name = "WHICH")]
    reconstruct: Option<ReconstructArg>,
    /// Mixtures: rank of the linear term that topk-lowrank adds beside the experts of each layer [default: 16]
    #[arg(long, value_name = "R", value_parser = positive)]
    topk_rank: Option<NonZeroUsize>,
    /// Mixtures: how saved checkpoints hold experts [default: as the model does]
    #[arg(long, value_enum, value_name = "HOW", requires = "save")]
    layout: Option<LayoutArg>,
    #[command(flatten)]
    experts: ExpertArgs,
    #[command(flatten)]
    change: RecipeArgs,
    #[command(flatten)]
    search: search::SearchArgs,
}

#[derive(Clone, Copy, ValueEnum)]
enum LayoutArg {
    /// Tensors of its own for each expert, which older transformers and vLLM's own classes read
    PerExpert,
    /// One tensor for all experts of a layer
    Fused,
}

#[derive(Clone, Copy, ValueEnum)]
enum ReconstructArg {
    /// None
    Never,
    /// All of layers that keep at most two experts, as STUN's program does
    FewClusters,
    /// Those of fewer than three members, as STUN's paper is summarised
    SmallClusters,
}

impl From<ReconstructArg> for Reconstruct {
    fn from(which: ReconstructArg) -> Self {
        match which {
            ReconstructArg::Never => Self::Never,
            ReconstructArg::FewClusters => Self::FewClusters,
            ReconstructArg::SmallClusters => Self::SmallClusters,
        }
    }
}

/// The methods that are recommended by what was measured: one for dense models, one for mixtures.
const RECOMMENDED: [&str; 2] = ["rd-dp", "neurons"];

/// Names of methods for dense models and for mixtures, each once.
fn methods() -> Vec<&'static str> {
    let own = ExpertRecipe::names().filter(|name| !Recipe::NAMES.contains(name));
    Recipe::NAMES.into_iter().chain(own).collect()
}

/// A compressor of experts, and the rank of its correction.
fn compressor(text: &str) -> Result<(Compressor, usize), String> {
    let (name, rank) = match text.rsplit_once("+eora-") {
        Some((name, rank)) => (name, rank.parse().map_err(|e| format!("rank {rank}: {e}"))?),
        None => (text, 0),
    };
    let compressor = super::names::parse(name, Compressor::WORDS)?;
    Ok((compressor, rank))
}

/// Changes to every method of the run.
#[derive(Args)]
#[command(next_help_heading = "Changes to the methods")]
struct RecipeArgs {
    /// Score of units [default: the method's]
    #[arg(long, value_parser = Known::new(names(Score::NAMES, "flap-compat")))]
    score: Option<String>,
    /// How the budget is divided over layers [default: the method's]
    #[arg(long, value_parser = Known::new(names(&names(Allocation::NAMES, "flap-compat"), "searched")))]
    allocation: Option<String>,
    /// What compensates for removed units, several separated by commas; auto: the method's own, which for flap is bias
    /// where the architecture can store one, else least squares; for dropped experts none. novice: a constant in the place of each
    /// dropped expert, whose router row stays
    #[arg(
        long,
        value_delimiter = ',',
        value_name = "C[,C..]",
        default_value = AUTO,
        value_parser = Known::new([&[AUTO], Compensation::NAMES, &OF_EXPERTS].concat())
    )]
    compensate: Vec<String>,
    /// Maximum fraction removed from any sublayer [structprune, structprune-softmax; default: 1]
    #[arg(long, value_name = "R")]
    max_ratio: Option<f64>,
    /// Temperature of the softmax over energies; small values prune mostly the sublayers of least energy
    /// [structprune-softmax; default: 1]
    #[arg(long, value_name = "T")]
    temperature: Option<f64>,
    /// Rounds of the alternating refinement [default: 1]
    #[arg(long, value_name = "N", value_parser = positive)]
    rounds: Option<NonZeroUsize>,
    /// Damping of least squares and of the alternating refinement, relative to the mean diagonal [default: 0.01]
    #[arg(long, value_name = "X")]
    ridge: Option<f64>,
    /// Unit of attention [default: KV groups where there are at least 4, else query heads]
    #[arg(long, value_enum)]
    attention_unit: Option<AttentionUnitArg>,
    /// Minimum KV groups per layer, or query heads per group [default: 1; flap-compat: 0]
    #[arg(long, value_name = "N")]
    min_attention: Option<usize>,
    /// Minimum neurons per layer [default: 1; flap-compat: 0]
    #[arg(long, value_name = "N")]
    min_neurons: Option<usize>,
    /// Round the number of neurons to a multiple of N
    #[arg(long, value_name = "N", value_parser = positive)]
    align: Option<NonZeroUsize>,
    /// Use the same widths in every layer, so that stock runtimes load the result
    #[arg(long)]
    uniform: bool,
}

/// GGUF files by the precision of their matrices.
const GGUF: [&str; 13] = [
    "gguf:f32",
    "gguf:f16",
    "gguf:bf16",
    "gguf:q8_0",
    "gguf:q5_1",
    "gguf:q5_0",
    "gguf:q4_1",
    "gguf:q4_0",
    "gguf:q6_k",
    "gguf:q5_k",
    "gguf:q4_k",
    "gguf:q3_k",
    "gguf:q2_k",
];

/// What a checkpoint may be exported as; `gguf` alone has floats of 16 bits.
fn exports() -> impl TypedValueParser<Value = structured::Export> {
    let gguf = GGUF.map(|name| match name {
        "gguf:f16" => PossibleValue::new(name).alias("gguf"),
        _ => PossibleValue::new(name),
    });
    let others = [PossibleValue::new("nemotron-nas")];
    PossibleValuesParser::new(gguf.into_iter().chain(others)).map(|name| {
        let at = GGUF.iter().position(|known| *known == name);
        match (at, name.as_str()) {
            (Some(at), _) => structured::Export::Gguf(Precision::ALL[at]),
            (None, "gguf") => structured::Export::Gguf(Precision::F16),
            (None, _) => structured::Export::NemotronNas,
        }
    })
}

/// Leaves a method its own compensation.
const AUTO: &str = "auto";
/// What compensates for dropped experts alone: a factor for each that stays, or a constant for each that goes.
const OF_EXPERTS: [&str; 2] = ["expert-scale", "novice"];

/// All of `names` but one.
fn names(names: &[&'static str], but: &str) -> Vec<&'static str> {
    names.iter().copied().filter(|name| *name != but).collect()
}

#[derive(Clone, Copy, ValueEnum)]
enum AttentionUnitArg {
    KvGroup,
    QueryHead,
}

impl RecipeArgs {
    /// The flags that were given and that some methods alone read.
    fn asked(&self) -> Vec<&'static str> {
        given([
            ("--score", self.score.is_some()),
            ("--allocation", self.allocation.is_some()),
            ("--max-ratio", self.max_ratio.is_some()),
            ("--temperature", self.temperature.is_some()),
            ("--rounds", self.rounds.is_some()),
            ("--ridge", self.ridge.is_some()),
            ("--attention-unit", self.attention_unit.is_some()),
            ("--min-attention", self.min_attention.is_some()),
            ("--min-neurons", self.min_neurons.is_some()),
            ("--align", self.align.is_some()),
            ("--uniform", self.uniform),
        ])
    }

    fn ridge(&self) -> f64 {
        self.ridge.unwrap_or(DEFAULT_RIDGE)
    }

    /// The variants of one method: one for each compensation, named after it where there are several.
    fn variants(&self, name: &str, seed: u64) -> Vec<Recipe> {
        let several = self.compensate.len() > 1;
        let variant = |compensate: &String| {
            let mut recipe = Recipe::named(name, seed)?;
            if OF_EXPERTS.contains(&compensate.as_str()) {
                return None;
            }
            self.change(&mut recipe, seed);
            if compensate != AUTO {
                recipe.compensation = self.compensation(compensate);
            }
            if several {
                recipe.name = format!("{name}+{compensate}");
            }
            Some(recipe)
        };
        self.compensate.iter().filter_map(variant).collect()
    }

    /// The variants of one method for mixtures: with and without what makes up for experts, or a refit of narrower ones.
    fn expert_variants(&self, name: &str, seed: u64) -> Vec<ExpertRecipe> {
        let several = self.compensate.len() > 1;
        let is_plain = |compensate: &String| compensate == AUTO;
        let variant = |compensate: &String| {
            let mut recipe = ExpertRecipe::named(name, seed)?;
            recipe.neurons.align = self.align.map_or(recipe.neurons.align, NonZeroUsize::get);
            recipe.neurons.ridge = self.ridge();
            recipe.neurons.refit = compensate != "none";
            if let Some(score) = self.score.as_deref().and_then(Score::named) {
                recipe.neurons.score = score;
            }
            match compensate.as_str() {
                of_experts if OF_EXPERTS.contains(&of_experts) => {
                    // Merged experts are neither run nor gone while a plan is made.
                    if !recipe.drops() || recipe.merges() {
                        return None;
                    }
                    recipe.name = format!("{name}+{of_experts}");
                    Some(recipe.compensation(ExpertCompensation::named(of_experts)?))
                }
                AUTO => Some(recipe),
                "none" | "least-squares" if recipe.narrows() => {
                    if several {
                        recipe.name = format!("{name}+{compensate}");
                    }
                    Some(recipe)
                }
                // Methods that drop whole experts compensate for nothing as they are.
                "none" if !self.compensate.iter().any(is_plain) => Some(recipe),
                _ => None,
            }
        };
        self.compensate.iter().filter_map(variant).collect()
    }

    /// The compensation of this name with the flags' parameters.
    fn compensation(&self, name: &str) -> Option<Compensation> {
        let mut compensation = Compensation::named(name)?;
        self.change_compensation(&mut compensation);
        Some(compensation)
    }

    fn change_compensation(&self, compensation: &mut Compensation) {
        match compensation {
            Compensation::LeastSquares(of) => of.ridge = self.ridge.unwrap_or(of.ridge),
            Compensation::Alternating(of) => {
                of.ridge = self.ridge.unwrap_or(of.ridge);
                of.rounds = self.rounds.map_or(of.rounds, NonZeroUsize::get);
            }
            _ => {}
        }
    }

    fn change(&self, recipe: &mut Recipe, seed: u64) {
        if let Some(score) = self.score.as_deref().and_then(Score::named) {
            recipe.score = match score {
                Score::Random(_) => Random { seed }.into(),
                other => other,
            };
        }
        if let Some(allocation) = self.allocation.as_deref().and_then(Allocation::named) {
            recipe.allocation = allocation;
        }
        match &mut recipe.allocation {
            Allocation::Softmax(softmax) => {
                softmax.temperature = self.temperature.unwrap_or(softmax.temperature);
                softmax.max_ratio = self.max_ratio.unwrap_or(softmax.max_ratio);
            }
            Allocation::ClosedForm(closed) => {
                closed.max_ratio = self.max_ratio.unwrap_or(closed.max_ratio);
            }
            _ => {}
        }
        // The compensation of the method itself takes the flags too.
        if let Some(compensation) = &mut recipe.compensation {
            self.change_compensation(compensation);
        }
        if let Some(unit) = self.attention_unit {
            recipe.shape.attention_unit = Some(match unit {
                AttentionUnitArg::KvGroup => AttentionUnit::KvGroup,
                AttentionUnitArg::QueryHead => AttentionUnit::QueryHead,
            });
        }
        let shape = &mut recipe.shape;
        shape.min_attention = self.min_attention.unwrap_or(shape.min_attention);
        shape.min_neurons = self.min_neurons.unwrap_or(shape.min_neurons);
        shape.align_neurons = self.align.map_or(shape.align_neurons, NonZeroUsize::get);
        shape.uniform |= self.uniform;
    }
}

impl StructuredArgs {
    pub(super) fn config(self, seed: u64) -> structured::Config {
        let mut asked = self.change.asked();
        asked.extend(self.search.asked());
        asked.extend(given([
            ("--quantise", !self.quantise.is_empty()),
            ("--then", !self.then.is_empty()),
            ("--owl", self.owl),
            ("--progressive", self.progressive),
            ("--reconstruct", self.reconstruct.is_some()),
            ("--topk-rank", self.topk_rank.is_some()),
            ("--layout", self.layout.is_some()),
            ("--seeds", self.seeds.is_some()),
        ]));
        asked.extend(self.experts.asked());
        let names: Vec<&str> = match self.method[..] {
            [] => RECOMMENDED.to_vec(),
            _ => self.method.iter().map(String::as_str).collect(),
        };
        let variants = |name: &&str| self.change.variants(name, seed);
        let mut recipes: Vec<Recipe> = names.iter().flat_map(variants).collect();
        recipes.iter_mut().for_each(|r| self.search.change(r));
        let reconstruct = self
            .reconstruct
            .map_or(Reconstruct::Never, Reconstruct::from);
        let variants = |name: &&str| {
            let variants = self.change.expert_variants(name, seed).into_iter();
            let variants = variants.map(|recipe| recipe.progressive(self.progressive));
            variants.map(|recipe| recipe.reconstruct(reconstruct))
        };
        let mut of_mixtures: Vec<ExpertRecipe> = names.iter().flat_map(variants).collect();
        of_mixtures.iter_mut().for_each(|r| self.experts.change(r));
        if let Some(rank) = self.topk_rank {
            let ranked = of_mixtures.into_iter();
            of_mixtures = ranked.map(|r| r.with_term_rank(rank.get())).collect();
        }
        let experts = ExpertMethods {
            recipes: of_mixtures,
            compressors: self.quantise,
            then: self.then,
            owl: self.owl.then(Owl::default),
            grams: self.experts.grams(),
            layout: self.layout.map(|layout| match layout {
                LayoutArg::PerExpert => ExpertLayout::Alone,
                LayoutArg::Fused => ExpertLayout::Fused,
            }),
        };
        structured::Config {
            perplexity: self.text.into(),
            calib: self.calib,
            calib_samples: self.calib_samples.get(),
            calib_shard: self.calib_shard,
            recipes,
            experts,
            ratios: self.ratio,
            save: self.save,
            form: if self.masked {
                Form::Masked
            } else {
                Form::Sliced
            },
            write: WriteOptions::default()
                .with_overwrite(self.overwrite)
                .with_max_shard_bytes(self.max_shard_bytes),
            exports: self.export,
            save_plans: self.save_plans,
            dry_run: self.dry_run,
            search: self.search.config(seed),
            seeds: self.seeds.map_or(3, NonZeroUsize::get) as u64,
            asked,
            named: Named {
                methods: self.method,
                compensations: match self.change.compensate[..] == [AUTO] {
                    true => Vec::new(),
                    false => self.change.compensate,
                },
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_precision_can_be_exported_by_its_name() {
        for (name, precision) in GGUF.into_iter().zip(Precision::ALL) {
            assert_eq!(name, format!("gguf:{}", precision.name()));
        }
    }
}
