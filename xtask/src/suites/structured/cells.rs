//! The rows of dense models: a plan, the checkpoint that it makes, and what that is worth.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Error, Result};
use causal_lm::{BATCH_TOKENS, Decoder, Hidden, NoTap, Windows};
use eval_report::{DENSE, ROUNDS, Rounds, Row, Stopwatch, mean_over_seeds};
use lm_eval::ScoredWindows;
use prune_structured::gguf::{self, ExportOptions};
use prune_structured::output::Refits;
use prune_structured::stats::Needs;
use prune_structured::{
    Calibration, Collect, Compensation, Cost, Loading, Plan, Recipe, nemotron, structprune,
};
use serde_json::json;
use tensor_io::atomic::{read_sealed_json, write_sealed_json};
use tensor_io::gguf::Gguf;
use tensor_io::{Checkpoint, ContentHash};

use super::config::{Config, Draw, Export};
use super::search::{self, Curves};
use super::table::{is_control, layers};
use crate::bar::Bar;
use crate::model::naming;
use crate::settings::{Settings, one_line};
use crate::suites::perplexity;

/// What all cells of the table share.
pub(super) struct Cells<'a> {
    pub(super) settings: &'a Settings,
    pub(super) config: &'a Config,
    pub(super) decoder: &'a Decoder<'a>,
    pub(super) calibration: &'a Windows,
    pub(super) evaluation: &'a ScoredWindows,
    pub(super) compared: &'a Windows,
    pub(super) scratch: &'a Path,
}

/// What is measured before any ratio is asked for.
#[derive(Clone, Copy)]
pub(super) struct Inputs<'a> {
    pub(super) calibration: &'a Calibration,
    /// Where the recipe, or what its search starts from, allocates by measured curves.
    pub(super) curves: Option<&'a Curves>,
}

impl Cells<'_> {
    /// What any of the methods reads.
    pub(super) fn needs(&self) -> Needs {
        // Plans without refits are written from the model alone.
        let needs = self
            .config
            .recipes
            .iter()
            .map(|recipe| match self.config.dry_run {
                true => recipe.needs_for_plan(),
                false => recipe.needs(self.decoder),
            });
        needs.fold(Needs::default(), |all, needs| all | needs)
    }

    /// One pass of `windows` that collects it, Gram matrices in `dir`.
    pub(super) fn calibrate(
        &self,
        windows: &Windows,
        dir: &Path,
        bar: &Bar,
    ) -> Result<Calibration> {
        let collect = Collect::new(self.needs(), dir);
        Ok(Calibration::run(self.decoder, windows, &collect, bar)?)
    }

    fn maker<'a>(&'a self, calibration: &'a Calibration) -> search::Maker<'a> {
        search::Maker {
            decoder: self.decoder,
            config: &self.config.search,
            windows: self.calibration,
            search: self.compared,
            calibration,
        }
    }

    /// The curves that a method reads: those that another process of the same run has measured, or else measured here and kept
    /// for others where cells are.
    pub(super) fn curves(
        &self,
        calibration: &Calibration,
        recipe: &Recipe,
        bar: &Bar,
    ) -> Result<Option<Curves>> {
        let Some(recipe) = self.config.search.measures_for(recipe) else {
            return Ok(None);
        };
        let kept = self.settings.cells.dir().map(|dir| {
            let hash = ContentHash::of(format!("{recipe:?}").as_bytes()).to_u64();
            dir.join("curves").join(format!("{hash:016x}.json"))
        });
        if let Some(path) = &kept
            && let Some(curves) = read_sealed_json(path).context("--cells")?
        {
            return Ok(Some(curves));
        }
        let folder = self.scratch.join("curves");
        let curves = self.maker(calibration).curves(&recipe, &folder, bar)?;
        if let Some(path) = &kept
            && curves.is_finite()
        {
            let parent = path.parent().unwrap_or(path);
            std::fs::create_dir_all(parent).with_context(|| parent.display().to_string())?;
            write_sealed_json(path, &curves).context("--cells")?;
        }
        Ok(Some(curves))
    }

    /// One row: a method at one ratio, over several draws where it is random.
    pub(super) fn measure(
        &self,
        inputs: Inputs<'_>,
        recipe: &Recipe,
        ratio: f64,
        bar: &Bar,
    ) -> Result<Row> {
        let rows = self
            .config
            .draws(recipe)
            .iter()
            .map(|draw| {
                let row = self.measure_one(inputs, draw, ratio, bar)?;
                self.forget_search(draw, ratio)?;
                Ok(row)
            })
            .collect::<Result<Vec<Row>>>()?;
        Ok(mean_over_seeds(&rows)?)
    }

    fn search_folder(&self, draw: &Draw, ratio: f64) -> PathBuf {
        let folder = self.config.search.resume.as_deref().unwrap_or(self.scratch);
        folder.join(format!("search-{}", draw.name(ratio)))
    }

    /// Removes the state of a search that nobody will resume: levels and Gram matrices are larger than the model.
    fn forget_search(&self, draw: &Draw, ratio: f64) -> Result<()> {
        let folder = self.search_folder(draw, ratio);
        if self.config.search.resume.is_none() && folder.exists() {
            std::fs::remove_dir_all(&folder).with_context(|| folder.display().to_string())?;
        }
        Ok(())
    }

    /// The plan of a draw, and the statistics that go with it where they are not the dense model's.
    fn plan(
        &self,
        inputs: Inputs<'_>,
        draw: &Draw,
        ratio: f64,
        (row, bar): (&mut Row, &Bar),
    ) -> Result<(Plan, Option<Calibration>)> {
        let recipe = &draw.recipe;
        let maker = self.maker(inputs.calibration);
        if !search::searches(recipe) {
            return Ok((maker.plan(recipe, inputs.curves, ratio, bar)?, None));
        }
        let folder = self.search_folder(draw, ratio);
        let seed = draw.seed.unwrap_or_default();
        let found = maker.search(recipe, inputs.curves, (ratio, seed), &folder, bar)?;
        if let Some(kl) = found.kl {
            row.extra.insert("kl".into(), json!(kl));
        }
        if found.candidate_tokens > 0 {
            let rate = found.candidate_tokens as f64 / found.seconds;
            row.extra
                .insert("candidate_tokens_per_second".into(), json!(rate));
        }
        Ok((found.plan, Some(found.calibration)))
    }

    fn measure_one(&self, inputs: Inputs<'_>, draw: &Draw, ratio: f64, bar: &Bar) -> Result<Row> {
        let watch = Stopwatch::start();
        let recipe = &draw.recipe;
        let mut row = Row::new("structured", &recipe.name);
        let (plan, searched) = self.plan(inputs, draw, ratio, (&mut row, bar))?;
        let calibration = searched.as_ref().unwrap_or(inputs.calibration);
        let cost = Cost::of(self.decoder, &plan)?;
        row = Row {
            ratio: Some(ratio),
            params: Some(cost.total_after().parameters),
            bytes: Some(cost.total_after().bytes),
            layers: layers(&plan, &cost),
            ..row
        };
        if is_control(recipe) {
            row = row.control();
        }
        let removable: u64 = cost.before.iter().map(|block| block.parameters).sum();
        let left: u64 = cost.after.iter().map(|block| block.parameters).sum();
        row.extra.insert(
            "removed".into(),
            json!(1.0 - left as f64 / removable as f64),
        );
        row.extra.insert(
            "flops_per_token".into(),
            json!(cost.total_after().flops_per_token),
        );
        row.extra.insert(
            "flops_per_token_dense".into(),
            json!(cost.total_before().flops_per_token),
        );
        row.extra.insert(
            "compensation".into(),
            json!(plan.compensation.name().replace('-', " ")),
        );
        row.extra.insert(
            "loads_in".into(),
            json!(match Loading::of(self.decoder, &plan, self.config.form) {
                Loading::Stock => "stock",
                _ => "loader",
            }),
        );
        for export in &self.config.exports {
            // Known only now; writing and evaluating would come before the export.
            export
                .check(self.decoder, &plan.widths())
                .context("--export")?;
        }
        // A dry run shows widths, which the refinement leaves as they are.
        let (plan, refits) = match self.config.dry_run {
            true => (plan, None),
            false => self.refined(plan, bar)?,
        };
        if let Some(path) = self.config.saved_plan(&draw.name(ratio)) {
            plan.save(path).context("--save-plans")?;
        }
        // Each row says what its ratio alone would take.
        let measuring = inputs.curves.map_or(0.0, |curves| curves.seconds);
        if self.config.dry_run {
            watch.stop(&mut row);
            row.seconds += measuring;
            return Ok(row);
        }
        let own = self.scratch.join(draw.name(ratio));
        let folder = self.config.saved(draw, ratio).unwrap_or(own);
        let writing = bar.nested("writing", 0);
        let settings = prune_structured::Settings::new(calibration)
            .form(self.config.form)
            .refits(refits.as_ref())
            .files(self.config.write.clone());
        let written = prune_structured::write(self.decoder, &plan, &folder, &settings, &writing)?;
        writing.finish();
        watch.stop(&mut row);
        row.seconds += measuring;
        let pruning = (row.seconds, row.peak_rss_bytes);

        let checkpoint = Checkpoint::open(&folder)?;
        let pruned = perplexity::open(self.settings, &checkpoint)?;
        let steps = bar.nested("perplexity", 0);
        perplexity::measure(&pruned, self.evaluation, &mut row, &steps)?;
        steps.finish();
        let times = time_blocks(&[self.decoder, &pruned], self.evaluation.inputs())?;
        times[1].fill_beside(&times[0], &mut row);
        export(self.config, &pruned, &folder, (&mut row, bar))?;
        anyhow::ensure!(
            (Some(written.parameters), Some(written.bytes)) == (row.params, row.bytes),
            "{}: the shards hold other parameters than the plan counts",
            folder.display()
        );
        // The row's time and memory are those of making the smaller model; its speed is that of
        // running it.
        (row.seconds, row.peak_rss_bytes) = pruning;
        if self.config.save.is_none() {
            std::fs::remove_dir_all(&folder).with_context(|| folder.display().to_string())?;
        }
        Ok(row)
    }

    /// A plan whose compensation is the alternating refinement, after it, and where its weights are.
    fn refined(&self, plan: Plan, bar: &Bar) -> Result<(Plan, Option<Refits>)> {
        if !matches!(plan.compensation, Compensation::Alternating(_)) {
            return Ok((plan, None));
        }
        let refining = bar.nested("refining", 0);
        let windows = self.calibration;
        let (plan, refits) =
            structprune::refine(self.decoder, windows, &plan, self.scratch, &refining)?;
        Ok((plan, Some(refits)))
    }
}

/// Writes a saved checkpoint in other formats, and the size of each to its row.
pub(super) fn export(
    Config { exports, write, .. }: &Config,
    pruned: &Decoder<'_>,
    folder: &Path,
    (row, bar): (&mut Row, &Bar),
) -> Result<()> {
    for export in exports {
        let bar = bar.nested("export", 0);
        let (name, bytes) = match export {
            Export::Gguf(precision) => {
                let name = format!("model-{}.gguf", precision.name());
                let mut options = ExportOptions::from(*precision);
                options = options.with_provenance("method", &row.method);
                if let Some(ratio) = row.ratio {
                    options = options.with_provenance("ratio", ratio);
                }
                let path = folder.join(&name);
                gguf::export(pruned, options, &path, &bar)?;
                // Of its tensors, as all sizes of models are.
                let bytes = Gguf::open(&path)?.total_bytes();
                (name, bytes)
            }
            Export::NemotronNas => {
                let name = "nemotron-nas".to_string();
                let dst = folder.join(&name);
                let written = nemotron::export(pruned, dst, write, &bar)?;
                (name, written.bytes)
            }
        };
        row.extra.insert(format!("bytes_{name}"), json!(bytes));
    }
    Ok(())
}

/// The failures of cells as a report shows them, beside the rows of the others.
///
/// # Errors
/// The first of them where no cell but that of the dense model has any rows.
pub(super) fn survived(
    rows: &[Row],
    mut failures: Vec<Error>,
    model: &Path,
) -> Result<Vec<String>> {
    if rows.iter().all(|row| row.method == DENSE) && !failures.is_empty() {
        return Err(failures.swap_remove(0));
    }
    let failures = failures.into_iter().map(|error| naming(error, model));
    Ok(failures.map(|error| one_line(&error)).collect())
}

/// Times the blocks of models on one batch, in alternation block by block. Experts are in memory one at a time; loading them is not
/// part of the time.
pub(super) fn time_blocks(decoders: &[&Decoder<'_>], windows: &Windows) -> Result<Vec<Rounds>> {
    let batch = windows.first((BATCH_TOKENS / windows.window_len()).max(1));
    let layers = decoders[0].config().layers();
    let tokens = (batch.count() * batch.window_len()) as f64 / layers as f64;
    let mut times = vec![Rounds::default(); decoders.len()];
    let embed = |decoder: &&Decoder<'_>| Hidden::embed(decoder, &batch);
    let mut hidden = decoders.iter().map(embed).collect::<Result<Vec<_>, _>>()?;
    for layer in 0..layers {
        let mut frames = Vec::with_capacity(decoders.len());
        for decoder in decoders {
            frames.push(decoder.frame(layer)?);
            decoder.release(layer);
        }
        let inputs = hidden.clone();
        for _ in 0..ROUNDS {
            hidden = inputs.clone();
            for (at, decoder) in decoders.iter().enumerate() {
                let mut loading = Duration::ZERO;
                let mut expert = |id| {
                    let started = Instant::now();
                    let expert = decoder.expert(layer, id)?;
                    decoder.release_expert(layer, id);
                    loading += started.elapsed();
                    Ok(expert)
                };
                let started = Instant::now();
                hidden[at].advance_experts(&frames[at], &mut expert, &mut NoTap)?;
                times[at].add(tokens, started.elapsed().saturating_sub(loading));
            }
        }
    }
    Ok(times)
}
