//! The methods on top of one another: prune, quantise what is left, repair it at low rank, and evict from its cache.
//!
//! Every link is measured in the same way, by decoding text token by token, beside a chain of controls that removes as
//! much at every link without looking.

use std::path::Path;

use anyhow::{Context, Result};
use candle_core::DType;
use causal_lm::{Decoder, Model, Windows};
use eval_report::{
    Axis, Budget, Column, DENSE, Plot, Reference, Role, Row, Section, Series, Stopwatch,
    mean_over_seeds,
};
use lowrank_eora::compress::Compressor;
use lowrank_eora::output::{CheckpointOptions, Layout, Weights, write_checkpoint};
use lowrank_eora::repair::{Bytes, Method, Ranks, Repair, Repaired, Source, Texts};
use prune_structured::{Calibration, Collect, Compensation, NoProgress, Plan, Recipe};
use tensor_io::{Checkpoint, WriteOptions};

use super::inputs::Inputs;
use super::preset::Shown;
use crate::bar::Bar;
use crate::estimate::Probe;
use crate::scratch::Scratch;
use crate::settings::Settings;
use crate::suites::kv::perplexity::{Decoding, batch, prompt};
use crate::suites::kv::policy::{self, ALPHA, Choice, PromptRule};
use crate::suites::perplexity::{self, Protocol, file_name};

/// Name of the suite in rows.
pub(super) const SUITE: &str = "chain";
/// Share of the blocks' parameters that pruning removes.
const RATIO: f64 = 0.25;
/// Rank of the repair.
const RANK: usize = 8;
/// Share of the window that caches hold.
const BUDGET: f64 = 0.5;
/// Windows to calibrate on.
pub(super) const CALIBRATION: usize = 32;
/// Runs of the controls.
const DRAWS: u64 = 3;
/// Links and the measurement before them.
const STEPS: u64 = 5;

/// What each link does.
struct Links {
    prune: &'static str,
    quantise: &'static str,
    repair: Method,
    evict: &'static str,
    control: bool,
}

const METHODS: Links = Links {
    prune: "flap",
    quantise: "gptq-int4",
    repair: Method::Eora,
    evict: "lazy",
    control: false,
};

const CONTROLS: Links = Links {
    prune: "random",
    quantise: "rtn-int4",
    repair: Method::Svd,
    evict: "random",
    control: true,
};

impl Links {
    /// The method of the row after the last link.
    fn whole(&self) -> String {
        let links = [self.prune, self.quantise, self.repair.name(), self.evict];
        links.join(" + ")
    }
}

/// The rows of the summary: the original model, and both chains as a whole.
pub(super) fn shown() -> Vec<Shown> {
    vec![
        Shown::new("original model, decoding", DENSE),
        Shown::new("the four methods", METHODS.whole()),
        Shown::new("four baselines", CONTROLS.whole()),
    ]
}

/// About how long it takes with so many tokens to calibrate and to evaluate on.
pub(super) fn seconds(probe: &Probe, calibration: usize, evaluation: usize) -> f64 {
    let chains = 1 + DRAWS as usize;
    // Quantising and repairing are a walk each, behind one pass for pruning.
    let walk = 2.0 * probe.pass(calibration) + probe.grams(calibration, true) + probe.solves();
    let decoded = (1 + 4 * chains) * evaluation;
    probe.pass(calibration) + chains as f64 * 2.0 * (walk + probe.copy()) + probe.decode(decoded)
}

/// Run both chains.
pub(super) fn run(settings: &Settings, inputs: &Inputs) -> Result<Section> {
    let checkpoint = causal_lm::open(&inputs.text.model)?;
    let decoder = perplexity::open(settings, &checkpoint)?;
    let protocol = Protocol::new(settings, &inputs.text, &decoder)?;
    let evaluation = protocol.decoding(settings, &inputs.text.text)?;
    let calibration = protocol
        .calibration(&inputs.calib)?
        .sample(CALIBRATION, settings.seed);
    let scratch = Scratch::new()?;
    let bar = settings.bar("chain", 1 + STEPS * (1 + DRAWS));
    let collect = Collect::new(Compensation::LEAST_SQUARES.needs(), scratch.path());
    let statistics = Calibration::run(&decoder, &calibration, &collect, &NoProgress)?;
    bar.inc(1);
    let dense_model = Model::load(&decoder)?;
    let suite = Chain {
        settings,
        decoder: &decoder,
        dense: &dense_model,
        statistics: &statistics,
        calibration: &calibration,
        evaluation: &evaluation,
        scratch: scratch.path(),
        bar: &bar,
    };
    let mut rows = vec![suite.dense()?];
    rows.extend(suite.links(&METHODS, settings.seed)?);
    let draws = (settings.seed..settings.seed + DRAWS)
        .map(|seed| suite.links(&CONTROLS, seed))
        .collect::<Result<Vec<_>>>()?;
    for link in 0..draws[0].len() {
        let runs: Vec<Row> = draws.iter().map(|rows| rows[link].clone()).collect();
        rows.push(mean_over_seeds(&runs)?);
    }
    let dense = rows[0].clone();
    for row in &mut rows {
        row.model = Some(file_name(&inputs.text.model));
        row.perplexity_dense = dense.perplexity;
        row.bytes_dense = dense.bytes;
        row.params_dense = dense.params;
        row.kv_bytes_full = dense.kv_bytes;
        let speed = row.tokens_per_second_dense.or(dense.tokens_per_second);
        row.tokens_per_second_dense = speed;
    }
    let window = evaluation.window_len();
    Ok(protocol
        .facts(
            section(rows),
            &inputs.text.text,
            evaluation.count(),
            evaluation.targets(),
        )
        .fact("prefilled", prompt(window))
        .fact("calibration text", file_name(&inputs.calib))
        .fact("calibration windows", calibration.count())
        .fact("pruned", RATIO)
        .fact("rank", RANK)
        .fact("budget", BUDGET))
}

struct Chain<'a> {
    settings: &'a Settings,
    decoder: &'a Decoder<'a>,
    /// The dense model, to compare speeds with.
    dense: &'a Model<'a>,
    statistics: &'a Calibration,
    calibration: &'a Windows,
    evaluation: &'a Windows,
    scratch: &'a Path,
    bar: &'a Bar,
}

impl Chain<'_> {
    fn dense(&self) -> Result<Row> {
        let checkpoint = self.decoder.checkpoint();
        let row = Row {
            params: Some(checkpoint.parameters()),
            bytes: Some(checkpoint.total_bytes()),
            ..Row::new(SUITE, DENSE)
        };
        self.measure(self.decoder, row, None)
    }

    /// A row after each link.
    fn links(&self, links: &Links, seed: u64) -> Result<Vec<Row>> {
        let watch = Stopwatch::start();
        let row = |name: String, bytes: u64| {
            let row = Row {
                bytes: Some(bytes),
                ..Row::new(SUITE, name)
            };
            if links.control { row.control() } else { row }
        };
        let name = format!("{}-{seed}", links.prune);
        let pruned_folder = self.scratch.join(&name);
        self.prune(links, seed, &pruned_folder)?;
        let checkpoint = Checkpoint::open(&pruned_folder)?;
        let pruned = perplexity::open(self.settings, &checkpoint)?;
        let mut name = links.prune.to_owned();
        let bytes = checkpoint.total_bytes();
        let mut rows = vec![self.measure(&pruned, row(name.clone(), bytes), None)?];

        let compressor: Compressor = links.quantise.parse()?;
        let quantised = self.repair(&pruned, None, &compressor)?;
        name += &format!(" + {}", links.quantise);
        let cells = vec![(row(name.clone(), bytes), None)];
        rows.extend(self.merged(&pruned, &quantised, cells)?);

        let repaired = self.repair(&pruned, Some(links.repair), &quantised)?;
        let evict = Choice::named(links.evict, PromptRule::Evict, ALPHA);
        let evict = evict.with_context(|| format!("no policy {}", links.evict))?;
        name += &format!(" + {}", links.repair);
        let full = row(name.clone(), bytes);
        name += &format!(" + {}", links.evict);
        let evicting = Row {
            budget: Some(Budget::Share(BUDGET)),
            ..row(name, bytes)
        };
        let cells = vec![(full, None), (evicting, Some((&evict, seed)))];
        rows.extend(self.merged(&pruned, &repaired, cells)?);
        if let Some(last) = rows.last_mut() {
            watch.stop(last);
        }
        for folder in [&pruned_folder, quantised.folder(), repaired.folder()] {
            std::fs::remove_dir_all(folder).with_context(|| folder.display().to_string())?;
        }
        Ok(rows)
    }

    fn prune(&self, links: &Links, seed: u64, folder: &Path) -> Result<()> {
        self.bar.set_label(format!("{} at {RATIO}", links.prune));
        let recipe = Recipe::named(links.prune, seed);
        let mut recipe = recipe.with_context(|| format!("no method {}", links.prune))?;
        recipe.compensation = Some(Compensation::LEAST_SQUARES);
        let plan = Plan::make(self.decoder, self.statistics, &recipe, RATIO, &NoProgress)?;
        let settings = prune_structured::Settings::new(self.statistics);
        prune_structured::write(self.decoder, &plan, folder, &settings, &NoProgress)?;
        self.bar.inc(1);
        Ok(())
    }

    /// The linears of a pruned model compressed by `source`, and repaired by `method`.
    fn repair(
        &self,
        pruned: &Decoder<'_>,
        method: Option<Method>,
        source: &dyn Source,
    ) -> Result<Repaired> {
        let repair = Repair::default()
            .with_method(method)
            .with_ranks(Ranks::Constant(method.map_or(0, |_| RANK)));
        let name = method.map_or("quantised", Method::name);
        self.bar.set_label(name);
        let folder = self.scratch.join(name);
        let texts = Texts::new(self.calibration);
        let repaired = repair.run(pruned, source, texts, folder, &NoProgress)?;
        Ok(repaired)
    }

    /// The rows of a repaired model under caches; `row.bytes` comes in as the size before it was compressed.
    fn merged(
        &self,
        pruned: &Decoder<'_>,
        repaired: &Repaired,
        cells: Vec<(Row, Option<(&Choice, u64)>)>,
    ) -> Result<Vec<Row>> {
        let bytes: Bytes = repaired.reports().map(|report| report.bytes).sum();
        let folder = self.scratch.join("merged");
        let layout = Layout::Dense {
            dtype: Some(DType::F32),
        };
        let options = CheckpointOptions::new(Weights::Merged, layout).with_write(WriteOptions {
            overwrite: true,
            ..WriteOptions::default()
        });
        write_checkpoint(pruned, repaired, &folder, &options, &NoProgress)?;
        let checkpoint = Checkpoint::open(&folder)?;
        let decoder = perplexity::open(self.settings, &checkpoint)?;
        let rows = cells.into_iter().map(|(mut row, evict)| {
            row.bytes = row
                .bytes
                .map(|all| all - bytes.dense + bytes.compressed + bytes.factors);
            self.measure(&decoder, row, evict)
        });
        let rows = rows.collect::<Result<Vec<_>>>()?;
        std::fs::remove_dir_all(&folder).with_context(|| folder.display().to_string())?;
        Ok(rows)
    }

    /// Quality, bytes of cache and speed of decoding.
    fn measure(
        &self,
        decoder: &Decoder<'_>,
        row: Row,
        evict: Option<(&Choice, u64)>,
    ) -> Result<Row> {
        self.bar.set_label(row.method.clone());
        let model = Model::load(decoder)?;
        let window = self.evaluation.window_len();
        let budget = policy::tokens(Budget::Share(BUDGET), window);
        let cache = evict.map(|(choice, seed)| choice.cache(budget, seed));
        let batch = batch(decoder, window);
        let decoding = Decoding {
            model: &model,
            windows: self.evaluation,
            prompt: prompt(window),
            batch,
        };
        let steps = self.evaluation.count().div_ceil(batch) as u64;
        let nested = self.bar.nested("decoding", steps);
        let dense = (row.method != DENSE).then_some(self.dense);
        let row = decoding.measure(row, cache.as_ref(), dense, &nested)?;
        nested.finish();
        self.bar.inc(1);
        Ok(row)
    }
}

fn section(rows: Vec<Row>) -> Section {
    let all_bytes = |row: &Row| Some((row.bytes? + row.kv_bytes?) as f64 / f64::from(1 << 20));
    let series = |name: &str, control| {
        let of_chain = rows
            .iter()
            .filter(|row| row.method == DENSE || (row.role == Role::Control) == control);
        let mut points: Vec<_> = of_chain
            .filter_map(|row| Some((all_bytes(row)?, row.perplexity?).into()))
            .collect();
        points.reverse();
        Series {
            name: name.into(),
            points,
            control,
        }
    };
    let plots = vec![Plot {
        title: "Perplexity over bytes, link by link".into(),
        x: Axis::linear("weights and one sequence's cache (MiB)"),
        y: Axis::log("perplexity of decoded tokens"),
        series: vec![series("methods", false), series("controls", true)],
        reference: rows[0].perplexity.map(|y| Reference {
            name: DENSE.into(),
            y,
        }),
    }];
    Section {
        title: "Chain: prune, quantise, repair, evict".into(),
        prose: format!(
            "Each row adds a step to the one above it: {} % of the blocks' parameters are pruned with a least-squares refit, the remaining \
             linears are quantised to 4 bits, a correction of rank {RANK} repairs them, and the cache is limited to {} % of the window. The \
             baselines spend the same budgets: random units, rounding, plain SVD, random eviction. All rows decode the same text token by \
             token; only decoded tokens count. Sizes are those of packed weights on disk; the computation is in floats, so 4 bits save bytes \
             here and no time. Speed is that of all windows of a batch together, in alternation with the dense model.",
            100.0 * RATIO,
            100.0 * BUDGET
        ),
        columns: vec![
            Column::Method,
            Column::Perplexity,
            Column::PerplexityOverDense,
            Column::Bytes,
            Column::BytesOverDense,
            Column::KvBytes,
            Column::KvOverFull,
            Column::TokensPerSecond,
            Column::Speedup,
        ],
        rows,
        plots,
        ..Section::default()
    }
}
