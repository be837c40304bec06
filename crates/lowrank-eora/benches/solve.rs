//! The seven linears of one block of Llama-3-8B's shape: our solve beside the published recipe.
//!
//! Recipe: eigenvectors of H in f64, T = Q √Λ, singular value decomposition of D T in f32, factors
//! through T⁻¹, each linear for itself. Ours: one H for q/k/v and one for gate/up, G streamed for
//! down, leading directions only. Weights are random, D is what rounding to int3 in groups of 128
//! leaves; activations have a decaying spectrum and a few outlier channels.
//!
//! ```text
//! cargo bench --workspace --bench solve                # the recipe once per shape, down extrapolated
//! cargo bench --workspace --bench solve -- --full      # the recipe on all seven linears
//! cargo bench --workspace --bench solve -- --scale 4   # all sizes divided by four
//! ```

use std::time::Instant;

use faer::{Mat, MatRef, Side};
use lowrank_eora::repair::layer::{Accumulation, Gram, GramCollector, OutputCollector, Rows};
use lowrank_eora::repair::layer::{LowRank, Options, Route, Solution, Weighting, solve};
use rayon::prelude::*;

const GROUP: usize = 128;
const BATCH: usize = 512;
/// Bounds that the figures stand beside.
const LEAST_SPEEDUP: f64 = 10.0;
const LARGEST_LOSS: f64 = 1.005;
const LARGEST_MEMORY_GIB: f64 = 2.5;

/// Inputs of a block's linears.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Input {
    Attention,
    Output,
    Mlp,
    Down,
}

struct Linear {
    name: &'static str,
    input: Input,
    m: usize,
    n: usize,
    seed: u64,
}

impl Linear {
    /// D of random weights rounded to int3.
    fn residual(&self) -> Mat<f64> {
        let mut d = Mat::<f64>::zeros(self.n, self.m);
        d.as_mut()
            .par_col_chunks_mut(1)
            .enumerate()
            .for_each(|(row, out)| {
                let mut random = Random::new(self.seed, row as u64);
                let weights: Vec<f32> = (0..self.n).map(|_| random.normal()).collect();
                let mut out = out.col_mut(0);
                for (g, group) in weights.chunks(GROUP).enumerate() {
                    let lo = group.iter().fold(0f32, |lo, &w| lo.min(w));
                    let hi = group.iter().fold(0f32, |hi, &w| hi.max(w));
                    let scale = (hi - lo) / 7.0;
                    let zero = (-lo / scale).round_ties_even();
                    for (j, &w) in group.iter().enumerate() {
                        let code = ((w / scale).round_ties_even() + zero).clamp(0.0, 7.0);
                        out[g * GROUP + j] = f64::from(w - scale * (code - zero));
                    }
                }
            });
        d.transpose().to_owned()
    }
}

/// A generator of numbers that are near enough to normal.
struct Random(u64);

impl Random {
    fn new(seed: u64, stream: u64) -> Self {
        let mut random = Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ (stream << 20 | 1));
        (0..4).for_each(|_| _ = random.uniform());
        random
    }

    fn uniform(&mut self) -> f32 {
        self.0 = (self.0)
            .wrapping_mul(6364136223846793005)
            .wrapping_add(1442695040888963407);
        (self.0 >> 40) as f32 / (1u64 << 24) as f32 - 0.5
    }

    fn normal(&mut self) -> f32 {
        2.0 * (self.uniform() + self.uniform() + self.uniform())
    }
}

/// Activations: latent factors with falling weights, noise, outlier channels.
struct Activations {
    mix: Mat<f32>,
    seed: u64,
}

impl Activations {
    fn new(n: usize, input: Input) -> Self {
        let factors = (n / 4).max(1);
        let seed = 100 + input as u64;
        let mix = Mat::from_fn(n, factors, |i, k| {
            let mut random = Random::new(seed, (i * factors + k) as u64);
            random.normal() / (1.0 + k as f32).powf(0.7)
        });
        Self { mix, seed }
    }

    fn batch(&self, index: usize) -> Rows {
        let (n, factors) = self.mix.shape();
        let mut random = Random::new(self.seed, 1_000_000 + index as u64);
        let latent = Mat::from_fn(factors, BATCH, |_, _| random.normal());
        let mut x = &self.mix * &latent;
        for t in 0..BATCH {
            for (i, x) in x.col_mut(t).iter_mut().enumerate() {
                let outlier = match i {
                    _ if i == n / 3 => 100.0,
                    _ if i % (n / 5) == 7 => 20.0,
                    _ => 1.0,
                };
                *x = outlier * (*x + 0.3 * random.normal());
            }
        }
        let values = (0..BATCH)
            .flat_map(|t| x.col_as_slice(t).to_vec())
            .collect();
        Rows::new(values, n).expect("finite")
    }
}

/// What the published recipe took and found.
struct Recipe {
    eigen: f64,
    product: f64,
    svd: f64,
    rest: f64,
    optimum: f64,
    factors: LowRank,
}

impl Recipe {
    fn seconds(&self) -> f64 {
        self.eigen + self.product + self.svd + self.rest
    }

    fn run(d: MatRef<'_, f64>, h: MatRef<'_, f64>, rank: usize) -> Self {
        let start = Instant::now();
        let eigen = h.self_adjoint_eigen(Side::Lower).expect("converges");
        let eigen_seconds = start.elapsed().as_secs_f64();

        let start = Instant::now();
        let (q, values) = (eigen.U(), eigen.S().column_vector());
        let smallest = values
            .iter()
            .copied()
            .filter(|l| *l > 0.0)
            .fold(f64::INFINITY, f64::min);
        let root = |j: usize| values[j].max(smallest).sqrt();
        let n = h.nrows();
        let t = Mat::<f32>::from_fn(n, n, |i, j| (q[(i, j)] * root(j)) as f32);
        let inverse = Mat::<f32>::from_fn(n, n, |i, j| (q[(j, i)] / root(i)) as f32);
        let single = Mat::<f32>::from_fn(d.nrows(), d.ncols(), |i, j| d[(i, j)] as f32);
        let preparing = start.elapsed().as_secs_f64();

        let start = Instant::now();
        let whitened = &single * &t;
        let product = start.elapsed().as_secs_f64();

        let start = Instant::now();
        let svd = whitened.thin_svd().expect("converges");
        let svd_seconds = start.elapsed().as_secs_f64();

        let start = Instant::now();
        let s = svd.S().column_vector();
        let b = Mat::from_fn(d.nrows(), rank, |i, k| {
            f64::from(svd.U()[(i, k)] * s[k].sqrt())
        });
        let v = Mat::<f32>::from_fn(rank, n, |k, j| svd.V()[(j, k)] * s[k].sqrt());
        let a = v * inverse;
        let a = Mat::from_fn(rank, n, |k, j| f64::from(a[(k, j)]));
        let tail: f64 = (rank..s.nrows()).map(|k| f64::from(s[k]).powi(2)).sum();
        Self {
            eigen: eigen_seconds,
            product,
            svd: svd_seconds,
            rest: preparing + start.elapsed().as_secs_f64(),
            optimum: tail.sqrt(),
            factors: LowRank { b, a },
        }
    }
}

/// A figure of this process from /proc, in GiB; `None` where there is none.
fn memory(field: &str) -> Option<f64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find(|line| line.starts_with(field))?;
    let kib: f64 = line.split_whitespace().nth(1)?.parse().ok()?;
    Some(kib / (1 << 20) as f64)
}

fn show(memory: Option<f64>) -> String {
    memory.map_or("not known here".into(), |gib| format!("{gib:.2} GiB"))
}

fn timed<T>(f: impl FnOnce() -> T) -> (T, f64) {
    let start = Instant::now();
    let value = f();
    (value, start.elapsed().as_secs_f64())
}

struct Run {
    solution: Solution,
    seconds: f64,
}

fn main() {
    let args: Vec<String> = std::env::args().collect();
    let full = args.iter().any(|arg| arg == "--full");
    let scale: usize = (args.iter().position(|arg| arg == "--scale"))
        .and_then(|at| args.get(at + 1)?.parse().ok())
        .unwrap_or(1);
    let (hidden, inner, kv) = (4096 / scale, 14336 / scale, 1024 / scale);
    let (tokens, rank) = (8192 / scale, 128 / scale);
    let linear = |name, input, m, n, seed| Linear {
        name,
        input,
        m,
        n,
        seed,
    };
    let linears = [
        linear("q_proj", Input::Attention, hidden, hidden, 1),
        linear("k_proj", Input::Attention, kv, hidden, 2),
        linear("v_proj", Input::Attention, kv, hidden, 3),
        linear("o_proj", Input::Output, hidden, hidden, 4),
        linear("gate_proj", Input::Mlp, inner, hidden, 5),
        linear("up_proj", Input::Mlp, inner, hidden, 6),
        linear("down_proj", Input::Down, hidden, inner, 7),
    ];
    println!(
        "hidden {hidden}, intermediate {inner}, KV {kv}, {tokens} tokens, rank {rank}, {} threads",
        rayon::current_num_threads()
    );

    // Ours.
    let mut grams: Vec<(Input, Gram)> = Vec::new();
    let mut statistics_seconds = 0.0;
    for input in [Input::Attention, Input::Output, Input::Mlp] {
        let activations = Activations::new(hidden, input);
        let mut collector = GramCollector::new(hidden, Accumulation::Sum).expect("valid");
        let mut seconds = 0.0;
        for index in 0..tokens / BATCH {
            let batch = activations.batch(index);
            seconds += timed(|| collector.update(&batch).expect("same width")).1;
        }
        let (gram, last) = timed(|| collector.finish());
        seconds += last;
        let flops = (hidden * hidden * tokens) as f64;
        println!(
            "H of {input:?}: {seconds:.2} s, {:.0} GFLOP/s of a symmetric product",
            flops / seconds / 1e9
        );
        statistics_seconds += seconds;
        grams.push((input, gram));
    }
    let down = &linears[6];
    let output_gram = {
        let activations = Activations::new(inner, Input::Down);
        let mut collector = OutputCollector::new(down.residual().as_ref()).expect("finite");
        let mut seconds = 0.0;
        for index in 0..tokens / BATCH {
            let batch = activations.batch(index);
            seconds += timed(|| collector.update(&batch).expect("same width")).1;
        }
        let (gram, last) = timed(|| collector.finish());
        seconds += last;
        let flops = (2 * hidden * inner * tokens + hidden * hidden * tokens) as f64;
        println!(
            "G of Down: {seconds:.2} s, {:.0} GFLOP/s",
            flops / seconds / 1e9
        );
        statistics_seconds += seconds;
        gram
    };
    let weighting = |linear: &Linear| match grams.iter().find(|(input, _)| *input == linear.input) {
        Some((_, gram)) => Weighting::Gram(gram.matrix()),
        None => Weighting::Output(output_gram.matrix()),
    };
    let runs: Vec<Run> = (linears.iter())
        .map(|linear| {
            let d = linear.residual();
            let (solution, seconds) = timed(|| {
                solve(d.as_ref(), &weighting(linear), rank, &Options::default()).expect("solves")
            });
            println!(
                "{:>10}: {seconds:.2} s by {:?}",
                linear.name, solution.route
            );
            Run { solution, seconds }
        })
        .collect();
    let peak = memory("VmHWM");
    let ours: f64 = runs.iter().map(|run| run.seconds).sum();
    println!("ours: {ours:.2} s of solving, {statistics_seconds:.2} s of statistics");
    println!(
        "peak memory of statistics and solve (VmHWM): {}, bound {LARGEST_MEMORY_GIB} GiB",
        show(peak)
    );

    // The recipe.
    println!(
        "\n{:>10} {:>8} {:>8} | {:>8} {:>8} {:>8} {:>8} | {:>8} {:>8} {:>6}",
        "recipe", "m", "n", "eigh s", "D T s", "SVD s", "rest s", "ours/opt", "rec./opt", "times"
    );
    let mut total = 0.0;
    let mut worst: f64 = 1.0;
    let mut last: Vec<(usize, usize, f64)> = Vec::new();
    let mut gate = None;
    for (linear, run) in linears
        .iter()
        .zip(&runs)
        .filter(|(l, _)| l.input != Input::Down)
    {
        let known = last
            .iter()
            .find(|(m, n, _)| !full && (*m, *n) == (linear.m, linear.n));
        if let Some(&(_, _, seconds)) = known {
            total += seconds;
            println!(
                "{:>10} {:>8} {:>8} | counted as the one of this shape above",
                linear.name, linear.m, linear.n
            );
            continue;
        }
        let d = linear.residual();
        let Weighting::Gram(h) = weighting(linear) else {
            unreachable!("down is left out")
        };
        let recipe = Recipe::run(d.as_ref(), h, rank);
        let loss = |factors: &LowRank| {
            let error = factors.error(d.as_ref());
            Weighting::Gram(h)
                .energy(error.as_ref())
                .expect("shapes fit")
                .sqrt()
        };
        let found = loss(&run.solution.factors);
        worst = worst.max(found / recipe.optimum);
        print_row(linear, &recipe, found, loss(&recipe.factors), run.seconds);
        total += recipe.seconds();
        last.push((linear.m, linear.n, recipe.seconds()));
        if linear.name == "gate_proj" {
            gate = Some((recipe.eigen, recipe.product, recipe.svd));
        }
    }
    println!(
        "without down: recipe {total:.1} s, ours {:.2} s: {:.1} times less",
        ours - runs[6].seconds,
        total / (ours - runs[6].seconds)
    );

    let d = down.residual();
    if full {
        let activations = Activations::new(inner, Input::Down);
        let mut collector = GramCollector::new(inner, Accumulation::Sum).expect("valid");
        for index in 0..tokens / BATCH {
            collector
                .update(&activations.batch(index))
                .expect("same width");
        }
        let h = collector.finish();
        let recipe = Recipe::run(d.as_ref(), h.matrix(), rank);
        let loss = |factors: &LowRank| {
            let error = factors.error(d.as_ref());
            Weighting::Gram(h.matrix())
                .energy(error.as_ref())
                .expect("shapes fit")
                .sqrt()
        };
        let found = loss(&runs[6].solution.factors);
        worst = worst.max(found / recipe.optimum);
        print_row(down, &recipe, found, loss(&recipe.factors), runs[6].seconds);
        total += recipe.seconds();
    } else {
        let exact = Options::default().with_route(Route::Gram);
        let best = solve(
            d.as_ref(),
            &Weighting::Output(output_gram.matrix()),
            rank,
            &exact,
        )
        .expect("solves");
        // The loss of orthonormal U is tr G − tr UᵀGU.
        let g = output_gram.matrix();
        let u = runs[6].solution.factors.b.qr().compute_thin_Q();
        let captured = u.transpose() * (g * &u);
        let trace = |a: MatRef<'_, f64>| (0..a.nrows()).map(|i| a[(i, i)]).sum::<f64>();
        let found = (trace(g) - trace(captured.as_ref())).max(0.0).sqrt();
        worst = worst.max(found / best.loss());
        println!(
            "{:>10}: ours/opt {:.6}, optimum by all eigenvectors of G",
            down.name,
            found / best.loss()
        );

        let (eigen, product, svd) = gate.expect("gate comes before down");
        let (_, half) = timed(|| {
            let h = grams[2].1.matrix().submatrix(0, 0, hidden / 2, hidden / 2);
            h.self_adjoint_eigen(Side::Lower).expect("converges")
        });
        let exponent = (eigen / half).log2();
        let factor = inner as f64 / hidden as f64;
        let extrapolated = eigen * factor.powi(3) + product * factor + svd;
        println!(
            "down, extrapolated: eigh {eigen:.1} s at {hidden} ({half:.1} s at {}, exponent {exponent:.2}) × {factor}³, \
             D T {product:.1} s × {factor}, SVD {svd:.1} s as measured for the transposed shape: {extrapolated:.1} s",
            hidden / 2
        );
        total += extrapolated;
    }
    println!(
        "\nall seven: recipe {total:.1} s, ours {ours:.2} s: {:.1} times less, bound {LEAST_SPEEDUP}",
        total / ours
    );
    println!(
        "with statistics: ours {:.2} s: {:.1} times less",
        ours + statistics_seconds,
        total / (ours + statistics_seconds)
    );
    println!("largest loss over optimum {worst:.6}, bound {LARGEST_LOSS}");
    println!(
        "peak memory of ours {}, of everything {}",
        show(peak),
        show(memory("VmHWM"))
    );
}

fn print_row(linear: &Linear, recipe: &Recipe, ours: f64, published: f64, seconds: f64) {
    println!(
        "{:>10} {:>8} {:>8} | {:>8.2} {:>8.2} {:>8.2} {:>8.2} | {:>8.6} {:>8.6} {:>6.1}",
        linear.name,
        linear.m,
        linear.n,
        recipe.eigen,
        recipe.product,
        recipe.svd,
        recipe.rest,
        ours / recipe.optimum,
        published / recipe.optimum,
        recipe.seconds() / seconds,
    );
}
