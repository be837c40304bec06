//! Searched widths and rate-distortion allocation as their users see them.

#[path = "../common/mod.rs"]
mod common;
mod rate_distortion;

use candle_core::{DType, Device, Tensor};
use causal_lm::Windows;
use causal_lm::testing::TestModel;
use common::{KINDS, gap, logits, overwrite, tiny, windows};
use prune_structured::obs::{Problem, Rounds, Units, sweep};
use prune_structured::stats::{LayerStats, Needs, Part};
use prune_structured::tyr::{
    Accumulation, Data, Found, Options, Run, Sharing, Stage, Start, search,
};
use prune_structured::{
    Calibration, Cancelled, Collect, Cost, Error, Form, LayerPlan, NoProgress, Plan, Progress,
    Recipe, Score, Settings, write,
};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use tensor_io::Checkpoint;

fn tyr() -> Recipe {
    Recipe::named("tyr", 0).unwrap()
}

/// A search of seconds.
fn small() -> Options {
    let stage = |tokens, survivors| Stage { tokens, survivors };
    let mut options = Options::default();
    options.iterations = 2;
    options.generations = 3;
    options.offspring = 6;
    options.stages = vec![stage(32, 3), stage(64, 2), stage(96, 1)];
    options
}

/// [`small`] with changes.
fn small_with(change: impl FnOnce(&mut Options)) -> Options {
    let mut options = small();
    change(&mut options);
    options
}

/// Counts the steps that are announced and done, and cancels when `stop` are done.
#[derive(Default)]
struct Counter {
    announced: AtomicU64,
    done: AtomicU64,
    stop: u64,
}

impl Progress for Counter {
    fn begin(&self, _stage: &str, steps: u64) {
        self.announced.fetch_add(steps, Ordering::Relaxed);
    }

    fn advance(&self, steps: u64) -> Result<(), Cancelled> {
        let done = self.done.fetch_add(steps, Ordering::Relaxed) + steps;
        match self.stop > 0 && done >= self.stop {
            true => Err(Cancelled),
            false => Ok(()),
        }
    }
}

struct Texts {
    calibration: Windows,
    search: Windows,
}

fn texts() -> Texts {
    let all = windows(20);
    let tail: Vec<u32> = all.iter().skip(12).flatten().copied().collect();
    Texts {
        calibration: all.first(12),
        search: Windows::cut(&tail, 16, None).unwrap(),
    }
}

/// Searches in `dir`.
fn searched(
    model: &TestModel,
    options: &Options,
    ratio: f64,
    dir: &Path,
    progress: &dyn Progress,
) -> Result<Found, Box<Error>> {
    let texts = texts();
    let data = Data {
        calibration: &texts.calibration,
        search: &texts.search,
    };
    let (start, run) = (Start::Uniform(ratio), Run { options, dir });
    search(&model.decoder(), &data, &tyr(), start, run, progress).map_err(Box::new)
}

fn written(model: &TestModel, found: &Found, form: Form, name: &str) -> PathBuf {
    let dst = model.path(name);
    let settings = Settings::new(&found.calibration)
        .form(form)
        .files(overwrite());
    write(&model.decoder(), &found.plan, &dst, &settings, &NoProgress).unwrap();
    dst
}

#[test]
fn a_search_gives_a_smaller_model_of_every_kind_that_opens_and_computes_what_its_mask_does() {
    for kind in KINDS {
        let model = tiny(kind, DType::F32);
        let found = searched(&model, &small(), 0.3, &model.path("search"), &NoProgress).unwrap();
        let cost = Cost::of(&model.decoder(), &found.plan).unwrap();
        let linears = |blocks: &[prune_structured::BlockCost]| {
            blocks.iter().map(|b| b.parameters).sum::<u64>() as f64
        };
        let removed = 1.0 - linears(&cost.after) / linears(&cost.before);
        assert!((removed - 0.3).abs() < 0.02, "{kind}: {removed}");
        let sliced = written(&model, &found, Form::Sliced, "sliced");
        let masked = written(&model, &found, Form::Masked, "masked");
        assert!(gap(&logits(&sliced), &logits(&masked)) < 1e-5, "{kind}");
        let checkpoint = Checkpoint::open(&sliced).unwrap();
        assert_eq!(checkpoint.parameters(), cost.total_after().parameters);
    }
}

#[test]
fn ratio_0_keeps_everything() {
    let model = tiny("llama", DType::F32);
    let found = searched(&model, &small(), 0.0, &model.path("search"), &NoProgress).unwrap();
    assert!(found.plan.is_identity(&model.decoder()));
    // The dense model is its own teacher.
    assert!(found.kl.unwrap().abs() < 1e-6);
}

/// What decides the model that a search ends in.
fn outcome(found: &Found) -> (Vec<LayerPlan>, Option<f64>, Vec<LayerStats>) {
    let layers = found.calibration.layers.clone();
    (found.plan.layers.clone(), found.kl, layers)
}

fn files(dir: &Path) -> Vec<(PathBuf, Vec<u8>)> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            found.extend(files(&path));
        } else {
            found.push((path.clone(), std::fs::read(path).unwrap()));
        }
    }
    found.sort();
    found
}

#[test]
fn a_search_interrupted_after_any_step_goes_on_to_the_same_result_and_the_same_files() {
    let model = tiny("llama", DType::F32);
    let options = small();
    let whole_dir = model.path("whole");
    let whole = searched(&model, &options, 0.3, &whole_dir, &NoProgress).unwrap();
    let names = |dir: &Path| -> Vec<(PathBuf, Vec<u8>)> {
        files(dir)
            .into_iter()
            .map(|(path, bytes)| (path.strip_prefix(dir).unwrap().to_path_buf(), bytes))
            .collect()
    };
    let counter = Counter::default();
    searched(&model, &options, 0.3, &model.path("counted"), &counter).unwrap();
    let steps = counter.done.into_inner();
    assert_eq!(counter.announced.into_inner(), steps);
    for stop in 1..=steps {
        let dir = model.path(&format!("stopped-{stop}"));
        let stopping = Counter {
            stop,
            ..Counter::default()
        };
        let interrupted = searched(&model, &options, 0.3, &dir, &stopping);
        assert!(
            matches!(
                *interrupted.unwrap_err(),
                Error::Cancelled(_) | Error::Model(_)
            ),
            "{stop}"
        );
        // A line that the state does not know of, torn in the middle.
        let log = dir.join("log.jsonl");
        let mut text = std::fs::read(&log).unwrap_or_default();
        text.extend(b"{\"iteration\":0,\"gener");
        std::fs::write(&log, text).unwrap();
        let resumed = searched(&model, &options, 0.3, &dir, &NoProgress).unwrap();
        assert_eq!(outcome(&resumed), outcome(&whole), "{stop}");
        assert!(names(&dir) == names(&whole_dir), "{stop}");
    }
    // A finished search is read back without comparing anything.
    let again = searched(&model, &options, 0.3, &whole_dir, &NoProgress).unwrap();
    assert_eq!(
        (outcome(&again), again.candidate_tokens),
        (outcome(&whole), 0)
    );
}

#[test]
fn the_result_depends_on_the_seed_but_not_on_threads_memory_or_sharing() {
    let model = tiny("qwen3", DType::F32);
    let run = |name: &str, options: Options, threads| {
        let pool = rayon::ThreadPoolBuilder::new()
            .num_threads(threads)
            .build()
            .unwrap();
        let dir = model.path(name);
        pool.install(|| outcome(&searched(&model, &options, 0.3, &dir, &NoProgress).unwrap()))
    };
    let first = run("first", small(), 1);
    assert_eq!(run("again", small(), 3), first);
    let tight = small_with(|o| o.memory = 1);
    assert_eq!(run("tight", tight, 2), first);
    let alone = small_with(|o| o.sharing = Sharing::Nothing);
    assert_eq!(run("alone", alone, 2), first);
    let other = small_with(|o| o.seed = 1);
    assert_ne!(run("other", other, 2).1, first.1);
}

#[test]
fn a_folder_of_another_search_is_refused_and_so_are_sizes_that_make_none() {
    let model = tiny("llama", DType::F32);
    let dir = model.path("search");
    let stopping = Counter {
        stop: 5,
        ..Counter::default()
    };
    searched(&model, &small(), 0.3, &dir, &stopping).unwrap_err();
    for (options, ratio) in [(small_with(|o| o.seed = 1), 0.3), (small(), 0.4)] {
        let refused = searched(&model, &options, ratio, &dir, &NoProgress);
        assert!(matches!(*refused.unwrap_err(), Error::StateFile { .. }));
    }
    type Change = fn(&mut Options);
    let sizes: [(&str, Change); 5] = [
        ("offspring", |o| o.offspring = 0),
        ("offspring", |o| o.offspring = usize::MAX),
        ("generations", |o| o.generations = usize::MAX),
        ("iterations", |o| o.iterations = usize::MAX),
        ("top_k", |o| o.top_k = 0),
    ];
    for (wrong, change) in sizes {
        let options = small_with(change);
        let refused = searched(&model, &options, 0.3, &model.path("none"), &NoProgress);
        let refused = *refused.unwrap_err();
        assert!(
            matches!(refused, Error::Search { option, .. } if option == wrong),
            "{refused}"
        );
        assert!(!model.path("none").exists());
    }
    let all = small_with(|o| (o.iterations, o.generations) = (usize::MAX, 2));
    assert_eq!(all.candidate_tokens(), usize::MAX);
    searched(&model, &small(), 0.3, &dir, &NoProgress).unwrap();
    let state = dir.join("state.json");
    let text = std::fs::read_to_string(&state).unwrap();
    let damaged = text.replace("\"generation\":3", "\"generation\":2");
    assert_ne!(damaged, text);
    std::fs::write(&state, damaged).unwrap();
    let refused = searched(&model, &small(), 0.3, &dir, &NoProgress);
    assert!(matches!(*refused.unwrap_err(), Error::StateFile { .. }));
}

#[test]
fn a_plan_is_a_start_whose_widths_a_search_without_generations_returns() {
    let model = tiny("llama", DType::F32);
    let texts = texts();
    let calibration = calibrate(&model, &texts.calibration, "gram");
    let decoder = model.decoder();
    let recipe = Recipe::named("flap", 0).unwrap();
    let plan = Plan::make(&decoder, &calibration, &recipe, 0.3, &NoProgress).unwrap();
    let options = small_with(|o| (o.iterations, o.generations) = (1, 0));
    let data = Data {
        calibration: &texts.calibration,
        search: &texts.search,
    };
    let run = Run {
        options: &options,
        dir: &model.path("search"),
    };
    let start = Start::Plan(&plan);
    let found = search(&decoder, &data, &tyr(), start, run, &NoProgress).unwrap();
    assert_eq!(found.plan.widths(), plan.widths());
    assert_eq!(found.kl, None);
}

fn calibrate(model: &TestModel, windows: &Windows, name: &str) -> Calibration {
    let dir = model.path(name);
    std::fs::create_dir_all(&dir).unwrap();
    let gram = Needs {
        gram: true,
        ..Needs::default()
    };
    Calibration::run(
        &model.decoder(),
        windows,
        &Collect::new(gram, dir),
        &NoProgress,
    )
    .unwrap()
}

#[test]
fn the_first_block_is_refitted_on_dense_inputs_and_later_ones_on_inputs_with_accumulated_error() {
    let model = tiny("mistral", DType::F32);
    let texts = texts();
    let dense = calibrate(&model, &texts.calibration, "gram");
    let of = |accumulation, name: &str| {
        let options = small_with(|o| (o.accumulation, o.iterations) = (accumulation, 1));
        searched(&model, &options, 0.4, &model.path(name), &NoProgress)
            .unwrap()
            .calibration
    };
    let same = |a: &Calibration, b: &Calibration, layer| {
        let gram = |c: &Calibration| c.gram.as_ref().unwrap().load(layer, Part::Mlp).unwrap();
        let values = |t: Tensor| t.flatten_all().unwrap().to_vec1::<f32>().unwrap();
        values(gram(a)) == values(gram(b)) && a.layers[layer] == b.layers[layer]
    };
    let released = of(Accumulation::Dense, "dense");
    assert!((0..3).all(|layer| same(&released, &dense, layer)));
    let [mixture, centre] = [
        of(Accumulation::Mixture, "mixture"),
        of(Accumulation::Centre, "centre"),
    ];
    for accumulated in [&mixture, &centre] {
        assert!(same(accumulated, &dense, 0));
        assert!(!same(accumulated, &dense, 1) && !same(accumulated, &dense, 2));
    }
    assert!(!same(&mixture, &centre, 1));
}

#[test]
fn what_is_written_is_what_the_sweep_left() {
    let model = tiny("qwen2", DType::F32);
    let found = searched(&model, &small(), 0.3, &model.path("search"), &NoProgress).unwrap();
    let sliced = Checkpoint::open(written(&model, &found, Form::Sliced, "sliced")).unwrap();
    for (layer, plan) in found.plan.layers.iter().enumerate() {
        let gram = found
            .calibration
            .gram
            .as_ref()
            .unwrap()
            .load(layer, Part::Mlp)
            .unwrap();
        let name = format!("model.layers.{layer}.mlp.down_proj.weight");
        let read = |checkpoint: &Checkpoint| {
            checkpoint
                .tensor_as(&name, DType::F32, &Device::Cpu)
                .unwrap()
        };
        let problem = Problem::new(&read(model.checkpoint()), &gram, 0.01, layer).unwrap();
        let units = Units::single(40, 1);
        let rounds = Rounds::suggested(40);
        let swept = sweep(problem, &units, rounds, &[plan.neurons.len()]).unwrap();
        let level = &swept.levels[0];
        assert_eq!(level.units, plan.neurons);
        let gap = (&level.weight - read(&sliced)).unwrap().abs().unwrap();
        let gap: f32 = gap
            .flatten_all()
            .unwrap()
            .max(0)
            .unwrap()
            .to_scalar()
            .unwrap();
        assert!(gap < 1e-3, "layer {layer}: {gap}");
    }
}

#[test]
fn a_settled_plan_has_the_widths_found_and_is_refitted_on_its_own_inputs() {
    let model = tiny("llama", DType::F32);
    let settled = small_with(|o| o.settle = true);
    let whole = searched(&model, &settled, 0.3, &model.path("settled"), &NoProgress).unwrap();
    let plain = searched(&model, &small(), 0.3, &model.path("plain"), &NoProgress).unwrap();
    assert_eq!(whole.plan.widths(), plain.plan.widths());
    // The statistics of the second block are those of the first one as it is written.
    let pruned = Checkpoint::open(written(&model, &whole, Form::Sliced, "sliced")).unwrap();
    let decoder = common::decoder(&pruned);
    let dense = model.decoder();
    let mut hidden = causal_lm::Hidden::embed(&decoder, &texts().calibration).unwrap();
    let mut advance = |block| hidden.advance(&block, &mut causal_lm::NoTap).unwrap();
    advance(decoder.block(0).unwrap());
    advance(dense.block(1).unwrap());
    let square = |batch: &Tensor| batch.sqr().unwrap().sum_all().unwrap();
    let squares = hidden
        .batches()
        .iter()
        .map(|b| f64::from(square(b).to_scalar::<f32>().unwrap()));
    let (seen, own) = (
        whole.calibration.layers[1].hidden_square,
        squares.sum::<f64>(),
    );
    assert!((seen / own - 1.0).abs() < 1e-4, "{seen} {own}");
}

#[test]
fn calibration_writing_refinement_and_export_can_be_cancelled() {
    let model = tiny("llama", DType::F32);
    let decoder = model.decoder();
    let stopping = || Counter {
        stop: 2,
        ..Counter::default()
    };
    let collect = Collect::default();
    let cancelled = Calibration::run(&decoder, &windows(2), &collect, &stopping());
    assert!(matches!(cancelled, Err(Error::Cancelled(_))));
    let calibration = calibrate(&model, &windows(8), "gram");
    let mut recipe = Recipe::named("flap", 0).unwrap();
    let plan = Plan::make(&decoder, &calibration, &recipe, 0.3, &NoProgress).unwrap();
    let dst = model.path("cancelled");
    let cancelled = write(
        &decoder,
        &plan,
        &dst,
        &Settings::new(&calibration),
        &stopping(),
    );
    assert!(matches!(cancelled, Err(Error::Cancelled(_))));
    assert!(!dst.exists());
    recipe.score = Score::named("obs").unwrap();
    let cancelled = Plan::make(&decoder, &calibration, &recipe, 0.3, &stopping());
    assert!(matches!(cancelled, Err(Error::Cancelled(_))));
}
