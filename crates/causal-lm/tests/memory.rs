//! What a packed model holds. One test to a process: it looks at the process as a whole.
#![cfg(target_os = "linux")]

#[path = "common/random_gguf.rs"]
#[allow(dead_code, reason = "other tests use the rest")]
mod random_gguf;

use std::alloc::{GlobalAlloc, Layout, System};
use std::collections::BTreeMap;
use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicUsize, Ordering};

use candle_core::{DType, Device, Tensor};
use causal_lm::{Decoder, Execution, Model};
use packed::BlockType;
use tensor_io::{Checkpoint, write_file};

/// The system's allocator, with the bytes that are allocated.
struct Counting;

static HELD: AtomicUsize = AtomicUsize::new(0);

// SAFETY: every call goes to the system's allocator unchanged; counting touches no memory of the caller.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        HELD.fetch_add(layout.size(), Ordering::Relaxed);
        // SAFETY: the caller's promises are passed on.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, ptr: *mut u8, layout: Layout) {
        HELD.fetch_sub(layout.size(), Ordering::Relaxed);
        // SAFETY: the caller's promises are passed on.
        unsafe { System.dealloc(ptr, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Names the model in the process that runs it.
const MODEL: &str = "PACKED_MODEL_OF_A_TEST";
/// Names the adapter in the process that runs it.
const ADAPTER: &str = "ADAPTER_OF_A_TEST";
const RANK: usize = 32;

/// The most resident memory of this process so far, mapped files included.
fn peak_bytes() -> usize {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix("VmHWM:"))
        .unwrap();
    let kilobytes: usize = line.trim().trim_end_matches(" kB").parse().unwrap();
    kilobytes * 1024
}

/// Opens the model and continues a prompt; prints what it took beyond what the process had, and what it has to take.
fn run_model(model: &Path, adapter: Option<&Path>) {
    // Threads and code are there before.
    rayon::broadcast(|_| ());
    let before = (peak_bytes(), HELD.load(Ordering::Relaxed));
    let checkpoint = match adapter {
        None => causal_lm::open(model),
        Some(adapter) => causal_lm::open_adapted(model, adapter),
    };
    let checkpoint = checkpoint.unwrap();
    let decoder = Decoder::new(&checkpoint, DType::F32, &Device::Cpu).unwrap();
    let decoder = decoder.packed(Execution::default());
    let model = Model::load(&decoder).unwrap();
    let held = HELD.load(Ordering::Relaxed) - before.1;
    let weights = model.weights();
    let mut cache = model.full_cache(1).unwrap();
    let prompt: Vec<u32> = (0..32).collect();
    model.forward(&[&prompt], &mut cache).unwrap();
    for token in 0..32 {
        model.forward(&[&[token]], &mut cache).unwrap();
    }
    println!(
        "measured {} {held} {} {} {}",
        peak_bytes() - before.0,
        weights.bytes,
        weights.low_rank,
        cache.peak_bytes()
    );
}

/// Peak of resident memory, bytes allocated after loading, bytes of the weights, linears with factors and bytes of the cache, of a
/// process of its own.
fn measure(model: &Path, adapter: Option<&Path>) -> [usize; 5] {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.env(MODEL, model).env("RAYON_NUM_THREADS", "2");
    command.args(["--nocapture", "--exact", TEST]);
    if let Some(adapter) = adapter {
        command.env(ADAPTER, adapter);
    }
    let output = command.output().unwrap();
    let said = String::from_utf8(output.stdout).unwrap();
    let line = said.lines().find_map(|line| line.split_once("measured "));
    let (_, numbers) = line.unwrap_or_else(|| panic!("{said}"));
    let numbers = numbers.split_whitespace().map(|n| n.parse().unwrap());
    numbers.collect::<Vec<usize>>().try_into().unwrap()
}

/// A PEFT folder with factors in bf16 for all linears of a model, and the bytes of the factors.
fn write_adapter(base: &Checkpoint, dir: &Path) -> usize {
    std::fs::create_dir(dir).unwrap();
    let config =
        format!(r#"{{"peft_type": "LORA", "r": {RANK}, "lora_alpha": 3, "bias": "none"}}"#);
    std::fs::write(dir.join("adapter_config.json"), config).unwrap();
    let mut tensors = Vec::new();
    for name in base.names().filter(|name| name.ends_with("_proj.weight")) {
        let module = name.strip_suffix(".weight").unwrap();
        let &[rows, cols] = &base.info(name).unwrap().shape[..] else {
            panic!("{name} is no matrix");
        };
        for (part, shape) in [("lora_A", (RANK, cols)), ("lora_B", (rows, RANK))] {
            let values = (0..shape.0 * shape.1).map(|i| ((i * 37) % 101) as f32 / 5e3 - 0.01);
            let tensor = Tensor::from_iter(values, &Device::Cpu).unwrap();
            let tensor = tensor
                .reshape(shape)
                .unwrap()
                .to_dtype(DType::BF16)
                .unwrap();
            tensors.push((format!("base_model.model.{module}.{part}.weight"), tensor));
        }
    }
    let path = dir.join("adapter_model.safetensors");
    write_file(path, tensors.iter().map(|(n, t)| (n, t)), &BTreeMap::new()).unwrap();
    let bytes = tensors.iter().map(|(_, tensor)| 2 * tensor.elem_count());
    bytes.sum()
}

const TEST: &str = "a_packed_model_takes_the_bytes_of_its_file_and_of_its_cache";
const MIB: usize = 1 << 20;

#[test]
fn a_packed_model_takes_the_bytes_of_its_file_and_of_its_cache() {
    if let Some(model) = std::env::var_os(MODEL) {
        let adapter = std::env::var_os(ADAPTER);
        return run_model(Path::new(&model), adapter.as_deref().map(Path::new));
    }
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("model.gguf");
    for ty in [BlockType::Q8_0, BlockType::Q4_0] {
        let file = random_gguf::llama([512, 1536, 10, 8, 4, 8192], ty).write(&path);
        assert!(file > 18 * MIB, "{file}");
        let [peak, held, weights, low_rank, cache] = measure(&path, None);
        assert_eq!(low_rank, 0);
        assert!(cache > 0 && cache < 4 * MIB);
        // Tiles take the bytes of blocks, and what is reported is what is held.
        assert!(weights < file + file / 50, "{ty}: {weights} for {file}");
        assert!(held < weights + MIB, "{ty}: {held} for {weights}");
        // Code, stacks and buffers that do not grow with the model.
        assert!(peak < file + cache + 12 * MIB, "{ty}: {peak} for {file}");
        assert!(peak > weights, "{ty}: {peak}");

        let adapter = dir.path().join(format!("adapter-{ty}"));
        let factors = write_adapter(&causal_lm::open(&path).unwrap(), &adapter);
        assert!(factors > 4 * MIB, "{factors}");
        let [adapted_peak, adapted_held, adapted, low_rank, _] = measure(&path, Some(&adapter));
        assert_eq!(low_rank, 70);
        assert!(adapted >= weights + factors && adapted < weights + factors + MIB / 4);
        assert!(
            adapted_held < adapted + MIB,
            "{ty}: {adapted_held} for {adapted}"
        );
        let most = file + factors + cache + 12 * MIB;
        assert!(adapted_peak < most, "{ty}: {adapted_peak} of {most}");
    }
}
