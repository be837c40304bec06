//! The runs of all suites: for each crate the method that it is for and baselines at the same budget, in about a minute.

use ::frontier::Baseline;
use anyhow::{Context, Result};
use eval_report::{Budget, DENSE, format};
use lowrank_eora::compress::Compressor;
use lowrank_eora::repair::Method;
use prune_lattice::experiment::{ExperimentConfig, Repair, Treatment};
use prune_lattice::prune::Method as LatticeMethod;
use prune_lattice::tasks::Task;
use prune_structured::{Compensation, Recipe};

use super::inputs::Inputs;
use super::preset::{Flags, Preset, Shown, Verdict, path};
use crate::settings::Settings;
use crate::suite::Suite;
use crate::suites::frontier::Memory;
use crate::suites::kv::policy::{ALPHA, Choice, PromptRule};
use crate::suites::{chain, frontier, kv, lattice, lowrank, structured};

/// Windows to calibrate on.
const CALIBRATION: usize = 32;

/// Recurrent networks of each task.
const NETWORKS: u64 = 3;

/// All of them, in the order of the report.
pub(crate) fn all(inputs: &Inputs, settings: &Settings) -> Result<Vec<Preset>> {
    Ok(vec![
        frontier(inputs, settings),
        structured(inputs, settings)?,
        lowrank(inputs, settings)?,
        kv(inputs, settings)?,
        lattice(inputs, settings),
        chain(inputs, settings)?,
    ])
}

fn frontier(inputs: &Inputs, settings: &Settings) -> Preset {
    // Enough to place treatments of the bundled model, in half a minute.
    const COARSE: usize = 512;
    const FINE: usize = 2048;
    const ROUNDS: usize = 1;
    let percents = [50.0, 35.0];
    let memory: Vec<Memory> = percents.map(Memory::Percent).to_vec();
    let mut config = frontier::Config::new(inputs.text.clone(), inputs.calib.clone());
    config.calib_samples = CALIBRATION;
    config.memory = memory.clone();
    config.options.coarse_tokens = COARSE;
    config.options.fine_tokens = FINE;
    config.options.rounds = ROUNDS;
    let shown = |method: &str, percent: f64| Shown {
        budget: Some(Budget::Share(percent / 100.0)),
        ..Shown::new(format!("{method}, {percent} % of the memory"), method)
    };
    let uniform = Baseline::UniformWidth.name();
    let shown = vec![
        shown(frontier::JOINT, 50.0),
        shown(uniform, 50.0),
        shown(frontier::JOINT, 35.0),
    ];
    Preset {
        crate_name: "frontier",
        name: "frontier",
        flags: Flags::of_text(inputs, settings)
            .with("--calib", path(&inputs.calib))
            .with("--calib-samples", CALIBRATION)
            .with_all("--memory", &memory)
            .with("--coarse-tokens", COARSE)
            .with("--fine-tokens", FINE)
            .with("--rounds", ROUNDS)
            .finish(settings),
        suite: Suite::Frontier(Box::new(config)),
        verdict: Verdict::new(frontier::JOINT, &shown, &[[0, 1]]),
        shown,
    }
}

fn structured(inputs: &Inputs, settings: &Settings) -> Result<Preset> {
    let methods = ["rd-dp", "flap", "wanda-sp", "magnitude", "random"];
    let ratios = vec![0.125, 0.25, 0.5];
    let recipes = methods
        .iter()
        .map(|name| {
            let mut recipe =
                Recipe::named(name, settings.seed).with_context(|| format!("no method {name}"))?;
            recipe.compensation = Some(Compensation::LEAST_SQUARES);
            Ok(recipe)
        })
        .collect::<Result<Vec<Recipe>>>()?;
    let at = 0.25;
    let shown = |method: &str| Shown {
        ratio: Some(at),
        ..Shown::new(format!("{method}, {} pruned", percent(at)), method)
    };
    let shown = vec![
        Shown::new("original model", DENSE),
        shown("rd-dp"),
        // The paper's.
        shown("flap"),
        shown("magnitude"),
        shown("random"),
    ];
    Ok(Preset {
        crate_name: "prune-structured",
        name: "structured",
        flags: Flags::of_text(inputs, settings)
            .with("--calib", path(&inputs.calib))
            .with("--calib-samples", CALIBRATION)
            .with_all("--method", methods)
            .with_all("--ratio", &ratios)
            .with("--compensate", "least-squares")
            .finish(settings),
        suite: Suite::Structured(Box::new(structured::Config {
            calib_samples: CALIBRATION,
            recipes,
            ratios,
            named: structured::Named {
                methods: methods.map(String::from).to_vec(),
                compensations: vec!["least-squares".into()],
            },
            ..structured::Config::new(inputs.text.clone(), inputs.calib.clone(), settings.seed)
        })),
        verdict: Verdict::new("rd-dp", &shown, &[[1, 3], [2, 3]]),
        shown,
    })
}

fn lowrank(inputs: &Inputs, settings: &Settings) -> Result<Preset> {
    const RANK: usize = 8;
    const HELD_OUT: usize = 8;
    // Quantisation first: it keeps more for its bytes than sparsity.
    let compressors = ["gptq-int3", "wanda-2:4"]
        .iter()
        .map(|name| Ok(name.parse()?))
        .collect::<Result<Vec<Compressor>>>()?;
    let methods = vec![Some(Method::Eora), Some(Method::Svd), None];
    let name = |method: &Option<Method>| lowrank::method_name(*method);
    let shown = |(compressor, method): (&Compressor, &Option<Method>)| Shown {
        compress: Some(compressor.to_string()),
        ..Shown::new(
            match method {
                None => format!("{compressor}, not repaired"),
                Some(method) => format!("{compressor}, {method} of rank {RANK}"),
            },
            name(method),
        )
    };
    let shown: Vec<Shown> = compressors
        .iter()
        .flat_map(|compressor| methods.iter().map(move |method| (compressor, method)))
        .map(shown)
        .collect();
    Ok(Preset {
        crate_name: "lowrank-eora",
        name: "lowrank",
        flags: Flags::of_text(inputs, settings)
            .with("--calib", path(&inputs.calib))
            .with("--calib-samples", CALIBRATION)
            .with("--held-out-samples", HELD_OUT)
            .with_all("--compress", &compressors)
            .with_all("--method", methods.iter().map(name))
            .with("--rank", RANK)
            .finish(settings),
        // EoRA beside plain SVD, for each compressor.
        verdict: Verdict::new("eora", &shown, &[[0, 1], [3, 4]]),
        shown,
        suite: Suite::Lowrank(Box::new(lowrank::Config {
            calib_samples: CALIBRATION,
            held_out_samples: HELD_OUT,
            compressors,
            methods,
            ranks: vec![RANK],
            ..lowrank::Config::new(inputs.text.clone(), inputs.calib.clone())
        })),
    })
}

fn kv(inputs: &Inputs, settings: &Settings) -> Result<Preset> {
    let names = ["lazy", "lazy-guarded", "h2o", "tova", "streaming", "random"];
    let budgets = vec![Budget::Share(0.25), Budget::Share(0.5)];
    let policies = names
        .iter()
        .map(|name| {
            Choice::named(name, PromptRule::Evict, ALPHA)
                .with_context(|| format!("no policy {name}"))
        })
        .collect::<Result<Vec<Choice>>>()?;
    let at = 0.25;
    let shown = |policy: &str| Shown {
        budget: Some(Budget::Share(at)),
        ..Shown::new(format!("{policy}, {} of the window", percent(at)), policy)
    };
    let shown = vec![
        Shown::new("full cache, decoding", kv::FULL),
        // What is recommended where int8 is too large, the paper's, and a draw.
        Shown::new("every token, in 4 bits", "full+int4"),
        shown("lazy"),
        shown("random"),
    ];
    Ok(Preset {
        crate_name: "kv-lazy",
        name: "kv",
        flags: Flags::of_text(inputs, settings)
            .with_all("--policy", names)
            .with_all("--budget", budgets.iter().map(|b| kv::policy::label(*b)))
            .with("--prompt-rule", PromptRule::Evict.name())
            .finish(settings),
        suite: Suite::Kv(kv::Config {
            policies,
            budgets,
            prompt_rule: PromptRule::Evict,
            ..kv::Config::on_text(inputs.text.clone())
        }),
        verdict: Verdict::new(
            "every token in int8, in int4 where that is too large, and keydiff on top of it for prompts",
            &shown,
            &[[1, 2], [2, 3]],
        ),
        shown,
    })
}

fn lattice(_: &Inputs, settings: &Settings) -> Preset {
    let tasks = vec![Task::Reber, Task::Mod(3)];
    let methods = [
        LatticeMethod::Span,
        LatticeMethod::LatticeContext,
        LatticeMethod::Strength,
        LatticeMethod::Magnitude,
        LatticeMethod::Random,
    ];
    let sparsities = vec![0.5, 0.75, 0.9];
    let at = 0.75;
    let shown = |method: LatticeMethod, repair: Repair| {
        let name = Treatment::new(method, repair);
        Shown {
            sparsity: Some(at),
            repair: Some(repair.name()),
            ..Shown::new(format!("{name}, {} pruned", percent(at)), method.name())
        }
    };
    let shown = vec![
        Shown::new("dense LSTM", DENSE),
        // What is recommended, what the paper proposes, what both must beat.
        shown(LatticeMethod::Span, Repair::Merge),
        shown(LatticeMethod::LatticeContext, Repair::None),
        shown(LatticeMethod::Magnitude, Repair::Refit),
        shown(LatticeMethod::Random, Repair::Refit),
    ];
    Preset {
        crate_name: "prune-lattice",
        name: "lattice",
        flags: Flags::default()
            .with_all("--task", &tasks)
            .with_all("--method", methods.map(LatticeMethod::name))
            .with_all("--sparsity", &sparsities)
            .with("--seeds", NETWORKS)
            .finish(settings),
        suite: Suite::Lattice(Box::new(lattice::Config::new(
            ExperimentConfig::default().with(|config| {
                config.tasks = tasks;
                config.methods = methods.to_vec();
                config.sparsities = sparsities;
            }),
            settings.seed,
            NETWORKS,
        ))),
        verdict: Verdict::new("span + merge", &shown, &[[1, 3], [1, 4], [2, 4]]),
        shown,
    }
}

fn chain(inputs: &Inputs, settings: &Settings) -> Result<Preset> {
    let config = chain::Config {
        calib_samples: CALIBRATION,
        ..chain::Config::new(inputs.text.clone(), inputs.calib.clone())?
    };
    let [methods, not_quantised, baselines] = config.wholes()?;
    let shown = vec![
        Shown::new("original model, decoding", DENSE),
        // One of the two, as the model's heads admit.
        Shown::new("the whole chain", methods.clone()),
        Shown::new("the whole chain", not_quantised),
        Shown::new("a chain of baselines", baselines),
    ];
    Ok(Preset {
        crate_name: "all in a chain",
        name: chain::SUITE,
        flags: Flags::of_text(inputs, settings)
            .with("--calib", path(&inputs.calib))
            .with("--calib-samples", CALIBRATION)
            .finish(settings),
        suite: Suite::Chain(config),
        verdict: Verdict::new(methods, &shown, &[[1, 3]]),
        shown,
    })
}

/// A fraction as `25 %`.
fn percent(share: f64) -> String {
    format!("{} %", format::tick(100.0 * share))
}
