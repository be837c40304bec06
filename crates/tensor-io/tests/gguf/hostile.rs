//! Damaged files: every prefix, and flipped bytes, give a file or a typed error, never a panic, and no allocation beyond
//! a small multiple of the file's size, whatever lengths and counts it declares.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;

use tensor_io::Error;
use tensor_io::gguf::{BlockLayout, Gguf, TensorSpec, Value, Writer};

thread_local! {
    /// Largest single allocation of this thread since it was last set to 0.
    static LARGEST: Cell<usize> = const { Cell::new(0) };
}

struct Largest;

// SAFETY: every call goes to the system's allocator unchanged; only its size is noted, in a cell that needs no
// allocation of its own.
unsafe impl GlobalAlloc for Largest {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        LARGEST.with(|largest| largest.set(largest.get().max(layout.size())));
        // SAFETY: the caller's promises are passed on.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, ptr: *mut u8, layout: Layout) {
        // SAFETY: the caller's promises are passed on.
        unsafe { System.dealloc(ptr, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Largest = Largest;

/// Error texts may be larger than a tiny file.
const SMALL: usize = 1024;
/// An entry in memory is up to twice as large as in the file, and a growing list doubles.
const FACTOR: usize = 4;

/// Opens `bytes` and, if that succeeds, asks for everything in the file.
fn examine(bytes: &[u8]) -> bool {
    let copy = bytes.to_vec();
    LARGEST.set(0);
    let opened = Gguf::from_bytes("damaged.gguf", copy);
    let largest = LARGEST.get();
    assert!(
        largest <= FACTOR * bytes.len() + SMALL,
        "{largest} bytes allocated for a file of {}",
        bytes.len()
    );
    match opened {
        Ok(gguf) => {
            let metadata = gguf.metadata();
            for key in metadata.keys() {
                let _ = (
                    metadata.get(key),
                    metadata.get_u64(key),
                    metadata.get_f64(key),
                );
                let _ = (
                    metadata.get_str(key),
                    metadata.get_strings(key),
                    metadata.get_usizes(key, 3),
                );
            }
            for info in gguf.tensors() {
                assert_eq!(gguf.bytes(&info.name).unwrap().len(), info.bytes);
                let _ = gguf.floats(&info.name);
            }
            true
        }
        Err(Error::Gguf { source, .. }) => {
            assert!(!source.to_string().contains('\n'));
            false
        }
        Err(other) => panic!("{other}"),
    }
}

/// A small model: a vocabulary, scores, several types of tensors.
fn model() -> Vec<u8> {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("m.gguf");
    let tokens: Vec<String> = (0..120).map(|i| format!("token{i}")).collect();
    let metadata: Vec<(String, Value)> = [
        ("general.architecture", Value::from("llama")),
        ("general.alignment", 32u32.into()),
        ("llama.block_count", 1u32.into()),
        ("llama.attention.layer_norm_rms_epsilon", 1e-5f32.into()),
        ("tokenizer.ggml.add_bos_token", true.into()),
        ("tokenizer.ggml.tokens", tokens.into()),
        ("tokenizer.ggml.scores", vec![0.5f32; 120].into()),
        ("tokenizer.ggml.token_type", vec![1i32; 120].into()),
        (
            "flags",
            Value::Array(tensor_io::gguf::Array::Bool(vec![true, false])),
        ),
    ]
    .map(|(key, value)| (key.to_string(), value))
    .into();
    let specs: Vec<TensorSpec> = [
        ("F32", 5),
        ("F16", 7),
        ("Q4_0", 64),
        ("Q6_K", 256),
        ("BF16", 3),
    ]
    .map(|(name, width)| TensorSpec::new(name, BlockLayout::named(name).unwrap(), [2, width]))
    .into();
    let mut writer = Writer::create(&path, &metadata, &specs).unwrap();
    for spec in &specs {
        let bytes = 2 * spec.layout.row_bytes(spec.shape[1]).unwrap();
        writer.write(&spec.name, &vec![3; bytes]).unwrap();
    }
    writer.finish().unwrap();
    std::fs::read(path).unwrap()
}

#[test]
fn every_prefix_is_refused_until_the_last_tensor_is_whole() {
    let model = model();
    // The file ends with the padding of the last tensor: 12 bytes of 32.
    let whole = model.len() - 20;
    for len in 0..=model.len() {
        assert_eq!(examine(&model[..len]), len >= whole, "{len} of {whole}");
    }
}

/// A generator of numbers for the damage (Knuth's MMIX constants).
struct Random(u64);

impl Random {
    fn below(&mut self, n: usize) -> usize {
        self.0 = self
            .0
            .wrapping_mul(6364136223846793005)
            .wrapping_add(1442695040888963407);
        (self.0 >> 33) as usize % n
    }
}

#[test]
fn flipped_bytes_give_a_file_or_an_error() {
    let model = model();
    let mut random = Random(1);
    let mut refused = 0;
    for _ in 0..100_000 {
        let mut bytes = model.clone();
        for _ in 0..1 + random.below(4) {
            let at = random.below(bytes.len().min(4096));
            bytes[at] ^= 1 << random.below(8);
        }
        refused += usize::from(!examine(&bytes));
    }
    assert!(refused > 10_000, "only {refused} of 100,000 were refused");
}

#[test]
fn a_file_of_many_small_entries_takes_memory_in_proportion() {
    let key = |i: u32| {
        [
            &4u64.to_le_bytes()[..],
            &i.to_le_bytes().map(|b| b | 1 & 0x7F),
            &[7, 0, 0, 0, 1],
        ]
        .concat()
    };
    let count = 20_000u64;
    let mut bytes = [
        &b"GGUF\x03\0\0\0"[..],
        &0u64.to_le_bytes(),
        &count.to_le_bytes(),
    ]
    .concat();
    for i in 0..count as u32 {
        bytes.extend(key(i));
    }
    let len = bytes.len();
    LARGEST.set(0);
    let opened = Gguf::from_bytes("many", bytes);
    assert!(LARGEST.get() <= 8 * len, "{} for {len}", LARGEST.get());
    assert!(opened.is_err(), "keys repeat");
}

/// Opens one real file that is damaged in the same ways, where there is one beside the repository.
#[shared_data::needed("golden/tiny-llama-gqa-q4_0.gguf")]
#[test]
fn a_golden_file_that_is_cut_or_damaged_gives_a_file_or_an_error() {
    let model = std::fs::read(shared_data::path!("golden/tiny-llama-gqa-q4_0.gguf")).unwrap();
    assert!(examine(&model));
    for len in 0..model.len() {
        // All of the header, and every 61st byte of the data.
        if len < 8192 || len % 61 == 0 {
            examine(&model[..len]);
        }
    }
    let mut random = Random(2);
    for _ in 0..20_000 {
        let mut bytes = model.clone();
        for _ in 0..1 + random.below(3) {
            let at = random.below(4096);
            bytes[at] = random.below(256) as u8;
        }
        examine(&bytes);
    }
}
