//! Generation with a model as it is stored, beside what bounds it: a streaming read of the memory, and another program on the
//! same file.
//!
//! `cargo bench -p causal-lm --bench generation -- MODEL [THREADS] [int8|f32|bf16] [COMMAND]` opens a folder or a GGUF file. Every round
//! measures the streaming read, decoding at 1, 4 and 16 sequences after 64 tokens, and a prompt of 512 tokens in turn, so that
//! noise hits all alike. `COMMAND` is run by a shell and takes part in every round: for each line that it reads it writes one with
//! its tokens per second of decoding and of the prompt (`benches/llama_cpp.py` does so with llama.cpp).

use std::hint::black_box;
use std::io::{BufRead, BufReader, Write};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;

use candle_core::{DType, Device};
use causal_lm::{Arithmetic, Decoder, Execution, Model, Snapshot, Team};

const ROUNDS: usize = 7;
const CONTEXT: usize = 64;
const STEPS: usize = 24;
const PROMPT: usize = 512;
/// Bytes of the streaming read, several times those of a cache.
const STREAM: usize = 256 << 20;

fn main() {
    // cargo passes `--bench`.
    let mut args = std::env::args()
        .skip(1)
        .filter(|arg| !arg.starts_with("--"));
    let Some(path) = args.next() else {
        println!("generation: no MODEL given, nothing measured");
        return;
    };
    let threads = args.next().map_or_else(rayon::current_num_threads, |text| {
        text.parse().expect("a number of threads")
    });
    let arithmetic = match args.next().as_deref() {
        None | Some("int8") => Arithmetic::Int8,
        Some("f32") => Arithmetic::F32,
        Some("bf16") => Arithmetic::Bf16,
        Some(other) => panic!("{other}: expected int8, f32 or bf16"),
    };
    let mut peer = args.next().map(|command| Peer::start(&command));
    rayon::ThreadPoolBuilder::new()
        .num_threads(threads)
        .build_global()
        .expect("the first pool");

    let started = Instant::now();
    let checkpoint = causal_lm::open(&path).expect("a model");
    let decoder = Decoder::new(&checkpoint, DType::F32, &Device::Cpu).expect("a supported model");
    let decoder = decoder.packed(Execution::new(arithmetic));
    let model = Model::load(&decoder).expect("weights");
    let loaded = started.elapsed();
    let mut cache = model.full_cache(1).expect("a cache");
    let tokens: Vec<u32> = (0..PROMPT as u32).map(|i| 100 + i * 31 % 1000).collect();
    let forward = model.forward(&[&tokens[..8]], &mut cache);
    black_box(forward.expect("logits"));
    let first = started.elapsed();
    println!(
        "{path}: {threads} threads, {arithmetic:?}, instructions {:?}",
        packed::Level::detected()
    );
    println!(
        "opened in {:.3} s, first token of a prompt of 8 after {:.3} s",
        loaded.as_secs_f64(),
        first.as_secs_f64()
    );

    // Memory before anything else is allocated.
    for token in tokens[..CONTEXT].chunks(1) {
        black_box(model.forward(&[token], &mut cache).expect("logits"));
    }
    let (file, kept) = (checkpoint.total_bytes(), cache.peak_bytes() as u64);
    if let Some(peak) = peak_rss() {
        let beyond = peak as f64 - (file + kept) as f64;
        println!(
            "peak resident {:.1} MiB; file {:.1} MiB, cache {:.1} MiB: {:.1} MiB beyond both",
            mib(peak),
            mib(file),
            mib(kept),
            beyond / f64::from(1 << 20)
        );
    }

    let team = Team::new(threads);
    let data = vec![1u64; STREAM / 8];
    let batches = [1usize, 4, 16];
    let caches: Vec<(usize, Snapshot)> = batches
        .into_iter()
        .map(|batch| {
            let mut cache = model.full_cache(batch).expect("a cache");
            let sequences = vec![&tokens[..CONTEXT]; batch];
            model.forward(&sequences, &mut cache).expect("logits");
            (batch, cache.snapshot())
        })
        .collect();
    let mut read = Vec::new();
    let mut decode = vec![Vec::new(); batches.len()];
    let (mut prompt, mut others) = (Vec::new(), Vec::new());
    for _ in 0..ROUNDS {
        read.push(STREAM as f64 / seconds(|| stream(&data, &team)) / 1e9);
        for ((batch, snapshot), rates) in caches.iter().zip(&mut decode) {
            let mut cache = model.full_cache(*batch).expect("a cache");
            cache.restore(snapshot).expect("its own snapshot");
            let took = seconds(|| {
                for token in &tokens[..STEPS] {
                    let sequences = vec![std::slice::from_ref(token); *batch];
                    black_box(model.forward(&sequences, &mut cache).expect("logits"));
                }
            });
            rates.push((STEPS * batch) as f64 / took);
        }
        let mut cache = model.full_cache(1).expect("a cache");
        let took = seconds(|| {
            black_box(model.forward(&[&tokens], &mut cache).expect("logits"));
        });
        prompt.push(PROMPT as f64 / took);
        others.extend(peer.as_mut().map(Peer::round));
    }

    let gigabytes = model.weight_bytes() as f64 / 1e9;
    let (stream_median, stream_best) = middle(&mut read);
    println!(
        "weights {:.2} MB; stream {stream_median:.1} GB/s (best {stream_best:.1})",
        1e3 * gigabytes
    );
    println!("                 tokens/s, median (best)   weights read, GB/s   of the stream");
    for (batch, rates) in batches.into_iter().zip(&mut decode) {
        let (median, best) = middle(rates);
        let rate = gigabytes * median / batch as f64;
        println!(
            "decode, {batch:>2} seq.  {median:>9.1} ({best:.1}) {rate:>24.2} {:>12.2}",
            rate / stream_median
        );
    }
    let (median, best) = middle(&mut prompt);
    println!("prompt of {PROMPT}    {median:>9.1} ({best:.1})");
    if !others.is_empty() {
        let column = |at: usize| -> Vec<f64> { others.iter().map(|round| round[at]).collect() };
        for (name, ours, at) in [("decode", &decode[0], 0), ("prompt", &prompt, 1)] {
            // Rates were sorted: pairs are of medians.
            let (median, best) = middle(&mut column(at));
            let (mine, _) = middle(&mut ours.clone());
            println!(
                "peer, {name}     {median:>9.1} ({best:.1}); ours / theirs {:.2}",
                mine / median
            );
        }
    }
    println!("load average {}", load());
}

/// Another program that measures the same file.
struct Peer {
    child: Child,
    answers: BufReader<std::process::ChildStdout>,
}

impl Peer {
    fn start(command: &str) -> Self {
        let mut child = Command::new("sh")
            .args(["-c", command])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("a shell");
        let answers = BufReader::new(child.stdout.take().expect("piped"));
        Self { child, answers }
    }

    /// Tokens per second of decoding and of a prompt.
    fn round(&mut self) -> [f64; 2] {
        let stdin = self.child.stdin.as_mut().expect("piped");
        writeln!(stdin, "round")
            .and_then(|()| stdin.flush())
            .expect("a running command");
        let mut line = String::new();
        self.answers.read_line(&mut line).expect("an answer");
        let mut numbers = line
            .split_whitespace()
            .map(|word| word.parse().expect("a number"));
        [(); 2].map(|()| numbers.next().expect("two numbers"))
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        drop(self.child.stdin.take());
        let _ = self.child.wait();
    }
}

fn seconds(run: impl FnOnce()) -> f64 {
    let started = Instant::now();
    run();
    started.elapsed().as_secs_f64()
}

/// Reads all of `data` and does next to nothing with it.
fn stream(data: &[u64], team: &Team) {
    const PART: usize = 1 << 15;
    let next = AtomicUsize::new(0);
    team.run(&|| {
        let mut sums = [0u64; 16];
        while let Some(part) = data.chunks(PART).nth(next.fetch_add(1, Ordering::Relaxed)) {
            for words in part.chunks_exact(16) {
                for (sum, word) in sums.iter_mut().zip(words) {
                    *sum ^= *word;
                }
            }
        }
        black_box(sums);
    });
}

/// Median and largest.
fn middle(rates: &mut [f64]) -> (f64, f64) {
    rates.sort_by(f64::total_cmp);
    (rates[rates.len() / 2], rates[rates.len() - 1])
}

fn mib(bytes: u64) -> f64 {
    bytes as f64 / f64::from(1 << 20)
}

/// The most memory that this process had resident, on Linux.
fn peak_rss() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix("VmHWM:"))?;
    let kilobytes: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kilobytes * 1024)
}

fn load() -> String {
    let text = std::fs::read_to_string("/proc/loadavg").unwrap_or_default();
    text.split_whitespace()
        .take(3)
        .collect::<Vec<_>>()
        .join(" ")
}
