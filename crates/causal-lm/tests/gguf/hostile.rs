//! Files whose metadata count what their tensors do not hold: one error, and no memory for what is only counted.

use candle_core::{DType, Device};
use causal_lm::gguf::{self, Architecture};
use causal_lm::{Decoder, Error};
use tensor_io::gguf::{BlockLayout, Gguf, TensorSpec, Value, Writer};

use crate::allocator::measured;

/// Numbers of a file that is small and lacks most of its tensors.
const NUMBERS: [(&str, u64); 19] = [
    ("block_count", 1),
    ("embedding_length", 32),
    ("context_length", 64),
    ("feed_forward_length", 48),
    ("attention.head_count", 4),
    ("attention.head_count_kv", 2),
    ("attention.key_length", 8),
    ("attention.value_length", 8),
    ("attention.key_length_swa", 8),
    ("attention.value_length_swa", 8),
    ("attention.sliding_window", 16),
    ("attention.sliding_window_pattern", 2),
    ("rope.dimension_count", 8),
    ("rope.scaling.original_context_length", 32),
    ("expert_count", 4),
    ("expert_used_count", 2),
    ("expert_feed_forward_length", 16),
    ("expert_shared_feed_forward_length", 16),
    ("vocab_size", 8),
];

fn key(architecture: Architecture, key: &str) -> String {
    format!("{}.{key}", architecture.name())
}

fn file(architecture: Architecture) -> Vec<u8> {
    let is_mixture = matches!(
        architecture,
        Architecture::Llama
            | Architecture::Qwen2Moe
            | Architecture::Qwen3Moe
            | Architecture::Olmoe
            | Architecture::GraniteMoe
    );
    let mut metadata = vec![("general.architecture".into(), architecture.name().into())];
    for eps in [
        "attention.layer_norm_rms_epsilon",
        "attention.layer_norm_epsilon",
    ] {
        metadata.push((key(architecture, eps), Value::from(1e-5f32)));
    }
    for (name, number) in NUMBERS {
        if is_mixture || !name.starts_with("expert") {
            metadata.push((key(architecture, name), Value::U64(number)));
        }
    }
    let floats = BlockLayout::named("F32").unwrap();
    let specs: Vec<TensorSpec> = [
        ("token_embd.weight", vec![8, 32]),
        ("output_norm.weight", vec![32]),
        ("blk.0.attn_norm.weight", vec![32]),
        ("blk.0.attn_q.weight", vec![32, 32]),
        ("blk.0.ffn_gate_inp.weight", vec![4, 32]),
        ("rope_freqs.weight", vec![4]),
    ]
    .into_iter()
    .map(|(name, shape)| TensorSpec::new(name, floats, shape))
    .collect();
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("m.gguf");
    let mut writer = Writer::create(&path, &metadata, &specs).unwrap();
    for spec in &specs {
        let ones = 1f32.to_le_bytes().repeat(spec.shape.iter().product());
        writer.write(&spec.name, &ones).unwrap();
    }
    writer.finish().unwrap();
    std::fs::read(path).unwrap()
}

/// Puts another number behind a key of the header, where the file has it.
fn set(bytes: &mut [u8], key: &str, number: u64) -> bool {
    let length = (key.len() as u64).to_le_bytes();
    let entry = [&length[..], key.as_bytes()].concat();
    let Some(at) = bytes.windows(entry.len()).position(|part| part == entry) else {
        return false;
    };
    // The type, then the value.
    let at = at + entry.len() + 4;
    bytes[at..at + 8].copy_from_slice(&number.to_le_bytes());
    true
}

fn open(bytes: Vec<u8>) -> Result<(), Error> {
    let checkpoint = gguf::from_file(Gguf::from_bytes("hostile.gguf", bytes)?)?;
    Decoder::new(&checkpoint, DType::F32, &Device::Cpu).map(drop)
}

/// Some hundred bytes for everything that a file of a few kilobytes has.
const ALLOWED: usize = 512 * 1024;

#[test]
fn counts_that_a_file_does_not_hold_take_no_memory() {
    let mut tried = 0;
    for architecture in Architecture::ALL {
        let whole = file(architecture);
        let mut try_numbers = |numbers: &[(&str, u64)]| {
            let mut bytes = whole.clone();
            let known = numbers
                .iter()
                .all(|(name, number)| set(&mut bytes, &key(architecture, name), *number));
            if !known {
                return;
            }
            let (peak, opened, _) = measured(|| open(bytes));
            let what = format!("{} {numbers:?}", architecture.name());
            let error = opened.expect_err(&what).to_string();
            assert!(!error.contains('\n'), "{what}: {error}");
            assert!(peak < ALLOWED, "{what}: {peak} bytes, {error}");
            tried += 1;
        };
        for (name, _) in NUMBERS {
            for number in [
                0,
                1,
                1 << 16,
                1 << 24,
                u64::from(u32::MAX),
                1 << 40,
                u64::MAX,
            ] {
                try_numbers(&[(name, number)]);
            }
        }
        for both in [1 << 24, 1 << 16] {
            try_numbers(&[
                ("attention.head_count", both),
                ("attention.head_count_kv", 1),
            ]);
            try_numbers(&[
                ("attention.head_count", both),
                ("attention.head_count_kv", both),
            ]);
            try_numbers(&[
                ("attention.key_length", both),
                ("attention.value_length", both),
                ("rope.dimension_count", both),
            ]);
            try_numbers(&[("expert_count", both), ("expert_used_count", both)]);
            try_numbers(&[("block_count", 60_000), ("expert_count", both)]);
        }
    }
    assert!(tried > 1000, "{tried}");
}
