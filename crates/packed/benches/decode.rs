//! Products of every type beside what bounds them: one token beside a streaming read of as much memory, many tokens beside
//! a product of f32 matrices.
//!
//! Every round measures the bound and all types in turn, so that noise hits all alike; the best and the median of the
//! rounds are printed. `cargo bench -p packed --bench decode -- [TYPE ..]` measures some types alone.

use std::hint::black_box;
use std::time::Instant;

use half::f16;
use packed::{
    Activations, Block, BlockType, Context, GroupBits, GroupParts, Groups, Level, Linear, Matrix,
    QuantRows, Team,
};

/// Rows and columns of a matrix.
const SIZE: usize = 4096;
/// Bytes of weights that a pass over the matrices of a type reads, several times those of a cache.
const PASS: usize = 192 << 20;
const ROUNDS: usize = 9;
const PROMPT: usize = 512;

/// A type to be measured.
#[derive(Clone, Copy)]
enum Weights {
    Rows(BlockType),
    Groups(u32),
}

impl Weights {
    fn all() -> Vec<Self> {
        let rows = BlockType::ALL.into_iter().map(Self::Rows);
        rows.chain([2, 3, 4, 8].map(Self::Groups)).collect()
    }

    fn name(self) -> String {
        match self {
            Self::Rows(ty) => ty.to_string(),
            Self::Groups(bits) => format!("int{bits} g128"),
        }
    }

    fn matrix(self, rows: usize, cols: usize) -> Linear {
        let matrix = match self {
            Self::Rows(ty) if ty.is_quantised() => {
                let mut block = Block {
                    d: f16::from_f32(0.01),
                    m: f16::from_f32(0.02),
                    scales: [3; 16],
                    mins: [2; 16],
                    codes: std::array::from_fn(|i| (i * 7) as u8),
                };
                let mut bytes = vec![0; ty.block_bytes()];
                if ty == BlockType::IQ4_NL {
                    block.codes = block.codes.map(|code| code & 15);
                }
                block.encode(ty, &mut bytes);
                let count = rows * ty.row_bytes(cols).expect("whole blocks") / bytes.len();
                let rows = QuantRows::new(ty, rows, cols, bytes.repeat(count));
                Matrix::from_rows(&rows.expect("as many bytes"))
            }
            Self::Rows(ty) => {
                let bytes = vec![0x3c; rows * cols * ty.block_bytes()];
                Matrix::from_rows(&QuantRows::new(ty, rows, cols, bytes).expect("floats"))
            }
            Self::Groups(bits) => {
                let bits = GroupBits::new(bits).expect("a width");
                let groups = rows * cols / 128;
                Ok(Matrix::from_groups(
                    &Groups::new(GroupParts {
                        bits,
                        rows,
                        cols,
                        width: 128,
                        codes: (0..rows * cols)
                            .map(|i| (i * 7) as u8 & bits.max_code())
                            .collect(),
                        scales: vec![f16::from_f32(0.01); groups],
                        zeros: Some((0..groups).map(|i| i as u8 & bits.max_code()).collect()),
                        group_index: None,
                    })
                    .expect("valid groups"),
                ))
            }
        };
        matrix.expect("finite values").into()
    }
}

/// Seconds of all rounds of one measurement.
#[derive(Default)]
struct Times(Vec<f64>);

impl Times {
    fn measure(&mut self, run: impl FnOnce()) {
        let started = Instant::now();
        run();
        self.0.push(started.elapsed().as_secs_f64());
    }

    /// Best and median rate of so much work.
    fn rates(&self, work: f64) -> (f64, f64) {
        let mut times = self.0.clone();
        times.sort_by(f64::total_cmp);
        (work / times[0] / 1e9, work / times[times.len() / 2] / 1e9)
    }
}

/// Reads all of `data` and does next to nothing with it.
fn stream(data: &[u64], team: &Team) {
    let next = std::sync::atomic::AtomicUsize::new(0);
    const PART: usize = 1 << 15;
    team.run(&|| {
        let mut sums = [0u64; 16];
        loop {
            let part = next.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
            let Some(part) = data.chunks(PART).nth(part) else {
                break;
            };
            for words in part.chunks_exact(16) {
                for (sum, word) in sums.iter_mut().zip(words) {
                    *sum ^= *word;
                }
            }
        }
        black_box(sums);
    });
}

fn input(tokens: usize, cols: usize) -> Vec<f32> {
    (0..tokens * cols)
        .map(|i| (i % 251) as f32 / 125.0 - 1.0)
        .collect()
}

fn decode(kinds: &[Weights], threads: usize) {
    let team = Team::new(threads);
    let data = vec![1u64; PASS / 8];
    let x = input(1, SIZE);
    let mut read = Times::default();
    let mut rows = Vec::new();
    for &kind in kinds {
        let matrix = kind.matrix(SIZE, SIZE);
        let count = (PASS / matrix.bytes()).max(1);
        let matrices: Vec<Linear> = (1..count)
            .map(|_| kind.matrix(SIZE, SIZE))
            .chain([matrix])
            .collect();
        let small = kind.matrix(512, 1024);
        let mut times: [Times; 2] = Default::default();
        let mut cached: [Times; 2] = Default::default();
        let mut y = vec![0.0; SIZE];
        for _ in 0..ROUNDS {
            read.measure(|| stream(black_box(&data), &team));
            for (mode, activations) in [Activations::Int8, Activations::F32]
                .into_iter()
                .enumerate()
            {
                let context = Context::new(activations).with_team(&team);
                times[mode].measure(|| {
                    for matrix in &matrices {
                        matrix.forward(&x, &mut y, &context).expect("shapes fit");
                    }
                });
                cached[mode].measure(|| {
                    for _ in 0..64 {
                        small
                            .forward(&x[..1024], &mut y[..512], &context)
                            .expect("shapes fit");
                    }
                });
            }
        }
        let bytes: usize = matrices.iter().map(Linear::bytes).sum();
        let cache = 64 * small.bytes();
        rows.push((
            kind.name(),
            [0, 1].map(|mode| {
                (
                    times[mode].rates(bytes as f64),
                    cached[mode].rates(cache as f64).0,
                )
            }),
        ));
    }
    let (best, median) = read.rates(PASS as f64);
    println!("\none token, {threads} threads: streaming read {best:.1} GB/s, median {median:.1}");
    println!(
        "{:<9} {:>28} {:>28}",
        "GB/s", "int8: memory median share cache", "f32: memory median share cache"
    );
    for (name, modes) in rows {
        print!("{name:<9}");
        for ((memory, middle), cache) in modes {
            print!(
                " {memory:>9.1} {middle:>6.1} {:>6.2} {cache:>6.1}",
                memory / best
            );
        }
        println!();
    }
}

/// Several tokens at once over weights in memory, and a prompt.
fn tokens(kinds: &[Weights], threads: usize) {
    let team = Team::new(threads);
    let (rows, cols) = (1536, 1024);
    let multiplied = |tokens: usize| 2.0 * (rows * cols * tokens) as f64;
    let x = input(PROMPT, cols);
    let mut y = vec![0.0; PROMPT * rows];
    let dense: Vec<f32> = input(rows, cols);
    let mut reference = Times::default();
    let pool = rayon::ThreadPoolBuilder::new()
        .num_threads(threads)
        .build()
        .expect("a pool");
    let mut lines = Vec::new();
    for &kind in kinds {
        let matrix = kind.matrix(rows, cols);
        let mut prompt: [Times; 2] = Default::default();
        let mut batch: [Times; 3] = Default::default();
        for _ in 0..ROUNDS {
            reference.measure(|| {
                let parallelism = match threads {
                    1 => gemm::Parallelism::None,
                    _ => gemm::Parallelism::Rayon(threads),
                };
                let (y, x, w) = (y.as_mut_slice(), x.as_slice(), dense.as_slice());
                pool.install(|| product(y, x, w, (PROMPT, rows, cols), parallelism));
            });
            for (mode, activations) in [Activations::Int8, Activations::F32]
                .into_iter()
                .enumerate()
            {
                let context = Context::new(activations).with_team(&team);
                prompt[mode].measure(|| matrix.forward(&x, &mut y, &context).expect("shapes fit"));
            }
            let context = Context::new(Activations::Int8).with_team(&team);
            for (times, tokens) in batch.iter_mut().zip([1, 4, 16]) {
                times.measure(|| {
                    matrix
                        .forward(&x[..tokens * cols], &mut y[..tokens * rows], &context)
                        .expect("shapes fit");
                });
            }
        }
        let prompt = prompt.map(|times| times.rates(multiplied(PROMPT)));
        let [one, four, sixteen] =
            batch.map(|times| times.0.iter().copied().fold(f64::MAX, f64::min));
        lines.push((
            kind.name(),
            prompt,
            [4.0 * one / four, 16.0 * one / sixteen],
        ));
    }
    let (best, median) = reference.rates(multiplied(PROMPT));
    println!(
        "\n{PROMPT} tokens, {threads} threads: f32 GEMM {best:.0} GFLOP/s, median {median:.0}"
    );
    println!(
        "GFLOP/s    int8 (median)     f32 (median)   in cache, int8: tokens/s of 4 and 16 over those of 1"
    );
    for (name, [int8, f32], [four, sixteen]) in lines {
        println!(
            "{name:<9} {:>5.0} {:>8.0} {:>8.0} {:>8.0} {four:>9.1} {sixteen:>6.1}",
            int8.0, int8.1, f32.0, f32.1
        );
    }
}

/// y [m, n] = x [m, k] wᵀ [k, n].
fn product(
    y: &mut [f32],
    x: &[f32],
    w: &[f32],
    (m, n, k): (usize, usize, usize),
    parallelism: gemm::Parallelism,
) {
    assert_eq!((y.len(), x.len(), w.len()), (m * n, m * k, n * k));
    let stride = |of: usize| of as isize;
    // SAFETY: the slices have these shapes, row-major; w is read transposed.
    unsafe {
        gemm::gemm(
            m,
            n,
            k,
            y.as_mut_ptr(),
            1,
            stride(n),
            false,
            x.as_ptr(),
            1,
            stride(k),
            w.as_ptr(),
            stride(k),
            1,
            0.0f32,
            1.0f32,
            false,
            false,
            false,
            parallelism,
        );
    }
}

fn main() {
    let wanted: Vec<String> = std::env::args()
        .skip(1)
        .filter(|argument| !argument.starts_with('-'))
        .collect();
    let kinds: Vec<Weights> = Weights::all()
        .into_iter()
        .filter(|kind| {
            wanted.is_empty()
                || wanted
                    .iter()
                    .any(|name| kind.name().eq_ignore_ascii_case(name))
        })
        .collect();
    println!("instructions: {}", Level::detected());
    for threads in [1, 2] {
        decode(&kinds, threads);
        tokens(&kinds, threads);
    }
}
