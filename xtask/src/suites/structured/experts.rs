//! Mixtures: dropping, merging and narrowing experts, and the same bytes spent on bits of their weights.

mod planned;
mod table;
mod terms;

use std::path::Path;

use anyhow::{Context, Result, ensure};
use causal_lm::{Decoder, Windows};
use eval_report::{Axis, DENSE, Plot, Reference, Row, Section, Series, Stopwatch, mean_over_seeds};
use lm_eval::ScoredWindows;
use lowrank_eora::compress::Compressor;
use lowrank_eora::experts::{RepairedExperts, repair_experts};
use prune_structured::experts::{
    Aim, ExpertCost, ExpertOptions, ExpertPlan, ExpertRecipe, ExpertSettings, JointData, Keep,
    LayerStatistics, Outcome, method, plan, router_map, write,
};
use prune_structured::{Compensation, Loading};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use tensor_io::Checkpoint;

use super::cells::{export, survived, time_blocks};
use super::config::{Config, ExpertMethods};
use crate::bar::Bar;
use crate::settings::{Settings, part};
use crate::suites::damping;
use crate::suites::perplexity::{self, Protocol, file_name};
use crate::suites::sizes::decoded_bytes;
pub(super) use planned::{aims, label, planned};
use planned::{beside, saved, seeds};
use table::{cell_name, counts, ids, layers, section};

/// What all rows share.
pub(super) struct Suite<'a> {
    pub(super) settings: &'a Settings,
    pub(super) config: &'a Config,
    pub(super) decoder: &'a Decoder<'a>,
    pub(super) protocol: &'a Protocol,
    pub(super) calibration: &'a Windows,
    pub(super) compared: &'a Windows,
    pub(super) evaluation: &'a ScoredWindows,
    pub(super) scratch: &'a Path,
}

/// How often each expert is chosen, by layer, in a model.
#[derive(Serialize, Deserialize)]
struct Load {
    name: String,
    layers: Vec<(usize, LayerStatistics)>,
}

/// What was measured beside the rows.
#[derive(Default, Serialize, Deserialize)]
struct Pictures {
    loads: Vec<Load>,
    /// Clusters of experts by layer, of the first method that has some.
    clusters: Vec<(usize, Vec<Vec<usize>>)>,
    clustered_by: String,
}

impl Pictures {
    /// Adds what another cell measured.
    fn add(&mut self, other: Self) {
        self.loads.extend(other.loads);
        if self.clusters.is_empty() {
            (self.clusters, self.clustered_by) = (other.clusters, other.clustered_by);
        }
    }
}

impl Suite<'_> {
    /// Prune by every method at every ratio and measure each.
    pub(super) fn run(&self) -> Result<Vec<Section>> {
        let ExpertMethods {
            recipes,
            compressors,
            ..
        } = &self.config.experts;
        let mut rows = Vec::new();
        let mut failures = Vec::new();
        let mut pictures = Pictures::default();
        // The rows of a cell, unless another process measures it, and its pictures.
        let mut take = |cell: &str, measure: &dyn Fn(&mut Pictures) -> Result<Vec<Row>>| {
            let taken = self.settings.cells.get(cell, || {
                let mut pictures = Pictures::default();
                anyhow::Ok((measure(&mut pictures)?, pictures))
            });
            match taken.with_context(|| cell.to_owned()) {
                Ok(Some((of_cell, its))) => {
                    rows.extend(of_cell);
                    pictures.add(its);
                }
                Ok(None) => {}
                Err(error) => failures.push(error),
            }
        };
        if !self.config.dry_run {
            take(DENSE, &|pictures| Ok(vec![self.dense(pictures)?]));
        }
        let cells: Vec<(&ExpertRecipe, Aim)> = recipes
            .iter()
            .flat_map(|recipe| {
                let aims = aims(self.config, self.decoder, recipe).into_iter();
                aims.map(move |aim| (recipe, aim))
            })
            .collect();
        let bar = self
            .settings
            .bar("pruning", (cells.len() + compressors.len()) as u64);
        for (recipe, aim) in cells {
            let name = cell_name(recipe, None, aim);
            bar.set_label(name.clone());
            take(&name, &|pictures| {
                self.measure(recipe, aim, (pictures, &bar))
            });
            bar.inc(1);
        }
        if !self.config.dry_run {
            for &(compressor, rank) in compressors {
                let name = label((compressor, rank));
                bar.set_label(name.clone());
                take(&name, &|_| {
                    Ok(vec![self.compressed(compressor, rank, &bar)?])
                });
                bar.inc(1);
            }
        }
        bar.finish();
        let failures = survived(&rows, failures, &self.config.perplexity.model)?;
        if self.settings.is_part() {
            return Ok(part(failures));
        }
        self.compare_with_dense(&mut rows)?;
        let mut section = section(self.config.dry_run, rows, self.plots(&pictures)?);
        section.failures = failures;
        if self.config.experts.is_progressive() {
            section = section.fact(
                "calibrated on",
                "activations behind the pruned layers; rows of topk on those of the dense model",
            );
        }
        Ok(vec![
            self.protocol
                .facts(
                    section,
                    &self.config.perplexity.text,
                    self.evaluation.count(),
                    self.evaluation.targets(),
                )
                .fact("calibration text", file_name(&self.config.calib))
                .fact("calibration windows", self.calibration.count()),
        ])
    }

    fn dense(&self, pictures: &mut Pictures) -> Result<Row> {
        let bar = self.settings.bar(DENSE, 0);
        let mut row = Row::new("structured", DENSE);
        perplexity::measure(self.decoder, self.evaluation, &mut row, &bar)?;
        time_blocks(&[self.decoder], self.evaluation.inputs())?[0].fill(&mut row);
        let whole = ExpertPlan::whole(self.decoder);
        let cost = ExpertCost::of(self.decoder, &whole)?;
        row.params = Some(cost.parameters);
        row.bytes = Some(cost.bytes);
        row.extra.insert("params_active".into(), json!(cost.active));
        row.extra
            .insert("experts".into(), json!(counts(self.decoder, &whole)));
        pictures.loads.push(self.load(self.decoder, DENSE, &bar)?);
        bar.finish();
        Ok(row)
    }

    /// How often each expert of a model is chosen on the calibration windows.
    fn load(&self, decoder: &Decoder<'_>, name: &str, bar: &Bar) -> Result<Load> {
        let options = ExpertOptions::new(method::Frequency, Keep::Without(0.0));
        let found = plan(decoder, self.calibration, &options, bar)?;
        let layers = found.layers.into_iter();
        Ok(Load {
            name: name.into(),
            layers: layers
                .map(|layer| (layer.layer, layer.statistics))
                .collect(),
        })
    }

    fn measure(
        &self,
        recipe: &ExpertRecipe,
        aim: Aim,
        (pictures, bar): (&mut Pictures, &Bar),
    ) -> Result<Vec<Row>> {
        let seeds = seeds(self.settings, self.config, recipe);
        let rows = seeds.into_iter().map(|seed| {
            let recipe = match seed {
                Some(seed) => recipe.clone().seed(seed),
                None => recipe.clone(),
            };
            self.measure_one(&recipe, seed, aim, (pictures, bar))
        });
        let by_seed = rows.collect::<Result<Vec<Vec<Row>>>>()?;
        let count = by_seed.first().map_or(0, Vec::len);
        (0..count)
            .map(|at| {
                let of_seeds: Vec<Row> = by_seed.iter().map(|rows| rows[at].clone()).collect();
                Ok(mean_over_seeds(&of_seeds)?)
            })
            .collect()
    }

    fn measure_one(
        &self,
        recipe: &ExpertRecipe,
        seed: Option<u64>,
        aim: Aim,
        (pictures, bar): (&mut Pictures, &Bar),
    ) -> Result<Vec<Row>> {
        let watch = Stopwatch::start();
        let cell = cell_name(recipe, seed, aim);
        let dir = self.scratch.join(format!("{cell}-weights"));
        std::fs::create_dir_all(&dir).with_context(|| dir.display().to_string())?;
        let data = JointData {
            calibration: self.calibration,
            search: self.compared,
            dir: &dir,
        };
        let planning = bar.nested("planning", 0);
        let (outcome, refits) = recipe.plan(self.decoder, data, aim, &planning)?;
        planning.finish();
        let mut row = self.described(recipe, aim, &outcome)?;
        if pictures.clusters.is_empty() {
            let layers = outcome
                .layers
                .iter()
                .filter(|layer| !layer.clusters.is_empty());
            let clusters = layers.map(|layer| (layer.layer, layer.clusters.clone()));
            pictures.clusters = clusters.collect();
            pictures.clustered_by = cell.clone();
        }
        if let Some(path) = self.config.saved_plan(&cell) {
            outcome.plan.save(path).context("--save-plans")?;
        }
        if self.config.dry_run {
            watch.stop(&mut row);
            return Ok(vec![row]);
        }
        let saved = saved(self.config, self.decoder, &cell);
        let folder = saved.unwrap_or_else(|| self.scratch.join(&cell));
        let writing = bar.nested("writing", 0);
        let settings = ExpertSettings::default()
            .refits(refits.as_ref())
            .layout(self.config.experts.layout)
            .files(self.config.write.clone());
        write(self.decoder, &outcome.plan, &folder, &settings, &writing)?;
        writing.finish();
        watch.stop(&mut row);
        let pruning = (row.seconds, row.peak_rss_bytes);

        let checkpoint = Checkpoint::open(&folder)?;
        let pruned = perplexity::open(self.settings, &checkpoint)?;
        let pruned = terms::attached(pruned, &outcome)?;
        ensure!(
            (
                Some(checkpoint.parameters()),
                Some(checkpoint.total_bytes())
            ) == (row.params, row.bytes),
            "{}: the shards hold other parameters than the plan counts",
            folder.display()
        );
        let steps = bar.nested("perplexity", 0);
        perplexity::measure(&pruned, self.evaluation, &mut row, &steps)?;
        steps.finish();
        terms::count(&mut row, &outcome);
        let times = time_blocks(&[self.decoder, &pruned], self.evaluation.inputs())?;
        times[1].fill_beside(&times[0], &mut row);
        let last = self.config.ratios.last().copied();
        let has_own_rows = !pruned.config().has_expert_map();
        if seed.is_none() && !recipe.is_fewer() && row.ratio == last && has_own_rows {
            pictures.loads.push(self.load(&pruned, &cell, bar)?);
        }
        export(self.config, &pruned, &folder, (&mut row, bar))?;
        // The row's time and memory are those of making the smaller model; its speed is that of running it.
        (row.seconds, row.peak_rss_bytes) = pruning;
        let mut rows = vec![row];
        if !recipe.is_fewer() {
            for &then in &self.config.experts.then {
                let row = self.then(&pruned, &rows[0], (&cell, then), bar);
                rows.push(row.with_context(|| label(then))?);
            }
        }
        self.forget(&folder)?;
        std::fs::remove_dir_all(&dir).with_context(|| dir.display().to_string())?;
        Ok(rows)
    }

    /// A row of a pruned model whose experts are compressed too; `row` is that of the pruned model.
    fn then(
        &self,
        pruned: &Decoder<'_>,
        row: &Row,
        (cell, then): (&str, (Compressor, usize)),
        bar: &Bar,
    ) -> Result<Row> {
        let name = label(then);
        let cell = format!("{cell}+{name}");
        let folder = beside(self.config, &cell).unwrap_or_else(|| self.scratch.join(&cell));
        let mut compressed = row.clone();
        compressed.method = format!("{}+{name}", row.method);
        compressed.layers.clear();
        let found = self.compress(pruned, then, &folder, (&mut compressed, bar))?;
        let dense = ExpertCost::of(self.decoder, &ExpertPlan::whole(self.decoder))?;
        // Constants in the place of experts stay as they are.
        let checkpoint = pruned.checkpoint();
        let novices = checkpoint.names();
        let novices = novices.filter(|name| name.ends_with(".novices.weight"));
        let novices = decoded_bytes(checkpoint, novices)?;
        let left = found.expert_bytes + novices;
        let removed = 1.0 - left as f64 / dense.expert_bytes as f64;
        compressed.ratio = Some(removed);
        compressed.extra.insert("removed".into(), json!(removed));
        Ok(compressed)
    }

    fn forget(&self, folder: &Path) -> Result<()> {
        if self.config.save.is_none() {
            std::fs::remove_dir_all(folder).with_context(|| folder.display().to_string())?;
        }
        Ok(())
    }

    /// What a row says of a plan.
    fn described(&self, recipe: &ExpertRecipe, aim: Aim, outcome: &Outcome) -> Result<Row> {
        let plan = &outcome.plan;
        let cost = ExpertCost::of(self.decoder, plan)?;
        let dense = ExpertCost::of(self.decoder, &ExpertPlan::whole(self.decoder))?;
        let name = match aim {
            Aim::Chosen(chosen) => format!("{}, {chosen} for each token", recipe.name),
            _ => recipe.name.clone(),
        };
        let mut row = Row::new("structured", name);
        row.ratio = match aim {
            Aim::Ratio(ratio) => Some(ratio),
            _ => None,
        };
        (row.params, row.bytes) = (Some(cost.parameters), Some(cost.bytes));
        row.layers = layers(self.decoder, outcome);
        if recipe.is_control() {
            row = row.control();
        }
        let mut extra = |name: &str, value: Value| row.extra.insert(name.into(), value);
        extra("experts", json!(counts(self.decoder, plan)));
        extra("params_active", json!(cost.active));
        let removed = 1.0 - cost.expert_bytes as f64 / dense.expert_bytes as f64;
        extra("removed", json!(removed));
        if !outcome.layers.is_empty() {
            let promoted = outcome
                .layers
                .iter()
                .map(|layer| layer.promoted)
                .sum::<f64>();
            extra("promoted", json!(promoted / outcome.layers.len() as f64));
            let tokens = outcome
                .layers
                .iter()
                .map(|l| l.statistics.tokens_per_expert());
            let (least, median): (Vec<usize>, Vec<usize>) = tokens.unzip();
            extra("least_tokens", json!(least.iter().min()));
            extra("median_tokens", json!(median.iter().min()));
            let unseen = outcome.layers.iter().map(|l| l.statistics.rarer_than(1));
            extra("unseen_experts", json!(unseen.sum::<usize>()));
        }
        if let Some(divergence) = outcome.divergence {
            extra("kl", json!(divergence));
        }
        let compensation = match recipe.narrows() && recipe.neurons.refit {
            true => Compensation::LEAST_SQUARES.name(),
            false => plan.compensation.name(),
        };
        let compensation = match recipe.term_rank() {
            Some(rank) => format!("factor, term of rank {rank}"),
            None => compensation.replace('-', " "),
        };
        extra("compensation", json!(compensation));
        let loading = match (recipe.term_rank(), plan.loading(self.decoder)) {
            (Some(_), _) => "memory alone",
            (None, Loading::Stock) => "stock",
            _ => "loader",
        };
        extra("loads_in", json!(loading));
        Ok(row)
    }

    /// A row of all experts compressed.
    fn compressed(&self, compressor: Compressor, rank: usize, bar: &Bar) -> Result<Row> {
        let name = label((compressor, rank));
        let mut row = Row::new("structured", &name).control();
        let folder = beside(self.config, &name).unwrap_or_else(|| self.scratch.join(&name));
        let dense = ExpertCost::of(self.decoder, &ExpertPlan::whole(self.decoder))?;
        row.params = Some(dense.parameters);
        let whole = json!(counts(self.decoder, &ExpertPlan::whole(self.decoder)));
        row.extra.insert("experts".into(), whole);
        row.extra
            .insert("params_active".into(), json!(dense.active));
        let then = (compressor, rank);
        let found = self.compress(self.decoder, then, &folder, (&mut row, bar))?;
        let removed = 1.0 - found.expert_bytes as f64 / found.expert_bytes_dense as f64;
        row.ratio = Some(removed);
        row.extra.insert("removed".into(), json!(removed));
        Ok(row)
    }

    /// Compresses all experts of a model into `folder` and measures the result.
    fn compress(
        &self,
        decoder: &Decoder<'_>,
        (compressor, rank): (Compressor, usize),
        folder: &Path,
        (row, bar): (&mut Row, &Bar),
    ) -> Result<RepairedExperts> {
        let watch = Stopwatch::start();
        let repair = self.config.experts.repair((compressor, rank));
        let repair = repair.files(self.config.write.clone());
        let steps = bar.nested("experts", 0);
        let found = repair_experts(decoder, self.calibration, &repair, folder, &steps)?;
        steps.finish();
        watch.stop(row);
        let making = (row.seconds, row.peak_rss_bytes);
        row.loss = Some(found.loss());
        let mut extra = |name: &str, value: Value| row.extra.insert(name.into(), value);
        extra("rerouted", json!(found.rerouted));
        let unseen = found.experts.iter().filter(|expert| expert.tokens == 0);
        extra("unseen_experts", json!(unseen.count()));
        extra(
            "compensation",
            json!(if rank > 0 { "eora" } else { "none" }),
        );
        let name = compressor.to_string();
        damping::report(row, &name, found.linears, found.damping);
        let checkpoint = Checkpoint::open(folder)?;
        let compressed = perplexity::open(self.settings, &checkpoint)?;
        let steps = bar.nested("perplexity", 0);
        perplexity::measure(&compressed, self.evaluation, row, &steps)?;
        steps.finish();
        // Weights are dense in the file that was measured.
        row.tokens_per_second = None;
        // As the experts are counted, decoded where the model is stored in blocks.
        let whole = decoded_bytes(decoder.checkpoint(), decoder.checkpoint().names())?;
        row.bytes = Some(whole - found.expert_bytes_dense + found.expert_bytes);
        if self.config.save.is_some() {
            // Floats, whatever the format of the compressor takes.
            let written = json!({ "compressed": checkpoint.total_bytes() });
            row.extra.insert("bytes_saved".into(), written);
        }
        (row.seconds, row.peak_rss_bytes) = making;
        self.forget(folder)?;
        Ok(found)
    }

    fn compare_with_dense(&self, rows: &mut [Row]) -> Result<()> {
        let whole = ExpertCost::of(self.decoder, &ExpertPlan::whole(self.decoder))?;
        let dense = rows.iter().find(|row| row.method == DENSE).cloned();
        for row in rows {
            row.model = Some(file_name(&self.config.perplexity.model));
            row.params_dense = Some(whole.parameters);
            row.bytes_dense = Some(whole.bytes);
            if let Some(dense) = &dense {
                row.perplexity_dense = dense.perplexity;
                let speed = row.tokens_per_second_dense.or(dense.tokens_per_second);
                row.tokens_per_second_dense = speed;
            }
        }
        Ok(())
    }

    fn plots(&self, pictures: &Pictures) -> Result<Vec<Plot>> {
        let mut plots = Vec::new();
        let spread = |load: &Load| Series {
            name: load.name.clone(),
            points: load
                .layers
                .iter()
                .map(|(layer, statistics)| (*layer as f64, statistics.imbalance()).into())
                .collect(),
            control: false,
        };
        if !pictures.loads.is_empty() {
            plots.push(Plot {
                title: "Routing load by layer".into(),
                x: Axis::linear("layer"),
                y: Axis::linear("tokens of the most used expert, in equal shares"),
                series: pictures.loads.iter().map(spread).collect(),
                reference: Some(Reference {
                    name: "equal use".into(),
                    y: 1.0,
                }),
            });
        }
        for (layer, clusters) in &pictures.clusters {
            let map = router_map(self.decoder, *layer)?;
            let series = clusters.iter().enumerate().map(|(number, cluster)| Series {
                name: format!("cluster {number}: {}", ids(cluster)),
                points: cluster
                    .iter()
                    .map(|&e| (map[e][0], map[e][1]).into())
                    .collect(),
                control: cluster.len() == 1,
            });
            plots.push(Plot {
                title: format!(
                    "Clusters of experts in layer {layer} ({})",
                    pictures.clustered_by
                ),
                x: Axis::linear("first principal component of router rows"),
                y: Axis::linear("second"),
                series: series.collect(),
                reference: None,
            });
        }
        Ok(plots)
    }
}
