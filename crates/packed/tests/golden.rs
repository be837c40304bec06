//! Bytes, values and dot products of every quantised type against those of ggml and of the `gguf` Python package. One
//! input's bytes stand here; the others are read from a folder `shared` beside the checkout, without which their tests
//! count as ignored.

use std::path::{Path, PathBuf};

use libtest_mimic::{Arguments, Failed, Trial};
use packed::{Activations, BlockType, Context, Level, Linear, Matrix, QuantRows, quantise};
use serde::Deserialize;

#[derive(Deserialize)]
struct Golden {
    activation: Activation,
    cases: Vec<Case>,
}

#[derive(Deserialize, Clone)]
struct Activation {
    d: Vec<f32>,
    q: Vec<Vec<i8>>,
}

#[derive(Deserialize)]
struct Case {
    #[serde(rename = "type")]
    ty: String,
    x: String,
    n: usize,
    weights: Option<String>,
    bytes: String,
    values: Option<Vec<f32>>,
    dot: Option<f64>,
    dot_int8: Option<f64>,
}

/// Bytes of the first input of the file, by type, for checkouts without the file.
const FIRST: [(&str, bool, &str); 22] = [
    ("Q4_0", false, "533090c5f4b82a7a8698468cc77f49a67723"),
    ("Q4_0", true, "c12f90c5f4c81b7a8699358dd77f49a67712"),
    ("Q4_1", false, "463053bc90c5f4c82b7a8699468cc77f49a77723"),
    ("Q4_1", true, "38306bbc90c5f5c82b7a8799468dd78f59a77723"),
    (
        "Q5_0",
        false,
        "532cb01acf26207ad87f45d40d217b088dee924dee35",
    ),
    ("Q5_0", true, "1f2cb01acf26208ae87f35d40d217b099dee824ddd35"),
    (
        "Q5_1",
        false,
        "232c53bcb81acf26208bf98046e50d328c1a9eff924eee36",
    ),
    (
        "Q5_1",
        true,
        "1e2c63bcb81acf26309bf98046e51e328c1aaeff935eff46",
    ),
    (
        "Q8_0",
        false,
        "5c2081d2c4fb271de608d843ec6c0de8edac0d3969379eebfe10bb0043f4c61ced9a",
    ),
    (
        "Q8_0",
        true,
        "5c2081d2c4fb271de608d843ec6c0de8edac0d3969379eebfe10bb0043f4c61ced9a",
    ),
    ("IQ4_NL", false, "3e2090c4f3c71b6a8699358dd67f39a66612"),
    ("IQ4_NL", true, "372090c4f3c71b6a8699358dd67f39a66612"),
    (
        "Q2_K",
        false,
        "fecc26ba7969eb7877a8a6ff889adfba94b551c262e295d69d92955722dd015d0a56a79e48a9198a58e9722579cac59c9f3a578561aa57984e5c06999da7bd49d87954b5914aaa2a995687964b5e155b4d2aa62c",
    ),
    (
        "Q2_K",
        true,
        "abbc28cc588cfe6889baa7ef9a8cfd9984b550c162e295d69d93955732cd015c0a57a79f18e91a8a5cea732579cac59cdf3a97c5a1ea97d88e9c06d9dda7fe89d87958b5d10a9e1a9d56879a4b5e155f1129512c",
    ),
    (
        "Q3_K",
        false,
        "ac68c69f53db8cbdac3f0e97b3ccf694cf0c60a6ef53df16cf73f8e95b5665575c0fc2b0f5a10fcc13060383149727c1f01aecca936584a74a1402ac46673dcf71330499c29c35f217f317bdf94ab44dcdcec0178e6c497c5a957a53fed1138bce5629074b69ad6ec330fcc3b220",
    ),
    (
        "Q3_K",
        true,
        "ac48c69f53db8cbdac3f0ed5f3ccf694cf0c60a6ef53df17cf73f8e95b5665575c0ec2b0f5a10fcc1306038f149327c1f01aedce936584a45a1402ac46673d8f713f0499c28835f317f7238dc946a859ccce80478e6c497d5a957753fe95138b0706de0340cd6911d730ecc78e21",
    ),
    (
        "Q4_K",
        false,
        "d5188824b8f0a9b8bfeea1ff9cef7ebf809575686b7a8799e66d778f59d767f3894c5fcc82979889b4980d68858a57d2a49e76d168ca86f6948586570bc313665085ab9673cb66b275dc9f6a8fc2d0a58c794e5534675c7389824975a55b97659194705503a7c998c3684c769af876cdc50c86f187d794f4a17412d5f5b7dbb0f78f76aed752b748a574a0b481752466",
    ),
    (
        "Q4_K",
        true,
        "d6187f24b8f0a9f8bfeea1ff9bff8ec2809575686b7a8799e66d778f59d767f3894c5fcc82979889b4980d68858a57d2a49e76d168c986f6948586570bc313665085ab9663cb66b275dc9f6a8fc2d0a58c794e5534675c7389824975a55b97659194705503a7c998c3684c769bf876cdc50c86e177d784e4917412c6e6b7dba0e78f76aec752a748a564a0b471752467",
    ),
    (
        "Q5_K",
        false,
        "b0147d24b8efaab7beeea3fe9aff7fbfba5e9089858d9a8bba291a83a59ae082a3e90dcb822eb33ba21f9d843e3b083a202bf9d0c6e52d22dcca0e1fb3cecef60389bf98042e311378410adf1915bec3593deda2d1a40dfc390b0c9e079826cda01b563dd797cd75ebb92fc50f95c15c09e49ebb69cfaaf6140483eb4aa73fcb3238f0aa065e933197c199fd26f1ec8b9a081ce20ebe18f841f823bbfb7db660ee1eec5cada46e8f59e85178f1ea48cd",
    ),
    (
        "Q5_K",
        true,
        "b1148724b8efaab7beeea3fdabff7fafba5e9089059d928bba291a83a59ae082a3e90dcb822eb37ba21f9d84363b083a202bf9d0c6f52e22dcca0e1fb3cecff60389bf98042e311378410adf1915bfc4593deda2d1a4fdfc390b0d9f079826cd900b563dd787cd75ebb91fc5ff95c15c09e49ebb69c0aaf6141493eb4aa73fdb3238f0aa075e933197c199fd26f1ec8b9a081ce2febf18f831f823bbfb7db660ee1fec5cad946f8059d85178f1ea48cd",
    ),
    (
        "Q6_K",
        false,
        "7004f15f7a27f92276311bdbc3aadbfb6c4f0100bdf601db44b00c2411d8462e6b3aa00386f1db9a34d6ef2c18e74670722157b4c2a609f5901af00c5584084b9bd6f1494c4f5a53364687b8ca207008e5011146ff0ed7b47f85649b5f548a09a21cda12a0d5dc3d159448db316ddb4679c9514befc45c984c474e718a50032ea48559f95a9a55e6a16b65570aa12950f9a4546dab0aea29af0a40d68b29366f983550c662a550d7895b0196dea1ba86d44568899c359216a06abba9766229637b979d5da69b7fb4a9564c804e94785e820c",
    ),
    (
        "Q6_K",
        true,
        "7004f15f7a27f92276311bdbc3aadbfb6c4f000fbef701db45b00c2412d7462f6b3aa00386f1db9a34d6ef2c18e74670722157b4c2a609f5901af00c5584084b9bd6f1494c4f5a53364687b8ca207008e5011146ff0ed7b47f85649b5f548a09a21cda12a1d5dc3d159449db316edb4679c9514befc45c984c474e718a50032ea48559f95a9a55e6a16b65570aa12950f9a4546cab0aea29af0a40d68b29366f983550c662a550d7895b0196dea1ba86d44568899c359216a06abba9766229637a9b9d5da69b7eb4aa564d804e95785e850c",
    ),
];

/// The inputs of the file, by its formulas.
fn input(name: &str, n: usize) -> Vec<f32> {
    let seeded = |s: i64| {
        (0..n as i64).map(move |i| {
            let wave = (i * i * 7 + i * (13 + 2 * s) + 5 * s).rem_euclid(257) - 128;
            (wave * ((31 * i + 17 * s).rem_euclid(9) + 1)) as f32 / 1024.0
        })
    };
    match name {
        "zeros" => vec![0.0; n],
        "constant" => vec![0.75; n],
        "constant_negative" => vec![-0.75; n],
        "ties" => (0..n).map(|i| (i as f32 - 16.0) / 2.0).collect(),
        "outlier" => {
            let mut x: Vec<f32> = seeded(3).collect();
            x[9] = 60000.0;
            x
        }
        "subnormal_scale" => seeded(1).map(|x| x * 2f32.powi(-22)).collect(),
        seed => seeded(seed.strip_prefix("seed ").unwrap().parse().unwrap()).collect(),
    }
}

fn importance(n: usize) -> Vec<f32> {
    (0..n).map(|i| (11 * i % 17 + 1) as f32 / 8.0).collect()
}

fn activation(n: usize) -> Vec<f32> {
    let wave = |i: usize| ((29 * i + 7 * (i / 3)) % 63) as f32 - 31.0;
    (0..n)
        .map(|i| wave(i) * (1 + i % 5) as f32 / 64.0)
        .collect()
}

fn bytes_of(hex: &str) -> Vec<u8> {
    let digits = |i| u8::from_str_radix(&hex[i..i + 2], 16).unwrap();
    (0..hex.len()).step_by(2).map(digits).collect()
}

fn near(found: f64, expected: f64) -> bool {
    (found - expected).abs() <= 1e-6 * expected.abs().max(1e-3)
}

impl Case {
    fn block_type(&self) -> BlockType {
        self.ty.parse().unwrap()
    }

    fn rows(&self) -> QuantRows<'static> {
        QuantRows::new(self.block_type(), 1, self.n, bytes_of(&self.bytes)).unwrap()
    }

    fn rounding_gives_the_bytes_of_ggml(&self) {
        let weights = self.weights.as_ref().map(|_| importance(self.n));
        let rounded = quantise(
            self.block_type(),
            &input(&self.x, self.n),
            self.n,
            weights.as_deref(),
        )
        .unwrap();
        assert_eq!(rounded, self.rows());
    }

    fn values_are_those_of_the_gguf_package(&self) {
        let values = self.rows().dequantise();
        if let Some(expected) = &self.values {
            assert_eq!(&values, expected);
        }
        if let Some(dot) = self.dot {
            let products = values.iter().zip(activation(self.n));
            let ours: f64 = products.map(|(&v, a)| f64::from(v) * f64::from(a)).sum();
            assert!(near(ours, dot), "{ours} {dot}");
        }
    }

    fn products_are_those_of_the_file(&self) {
        let linear = Linear::from(Matrix::from_rows(&self.rows()).unwrap());
        let x = activation(self.n);
        // Sums of f32 are as exact as the magnitudes that were added.
        let magnitude: f32 = self
            .rows()
            .dequantise()
            .iter()
            .zip(&x)
            .map(|(v, a)| (v * a).abs())
            .sum();
        for (activations, expected) in [
            (Activations::F32, self.dot),
            (Activations::Int8, self.dot_int8),
        ] {
            let Some(expected) = expected else { continue };
            for level in Level::available() {
                let mut y = [0.0];
                let context = Context::new(activations).with_level(level);
                linear.forward(&x, &mut y, &context).unwrap();
                let error = (f64::from(y[0]) - expected).abs();
                assert!(
                    error <= 1e-6 * f64::from(magnitude),
                    "{level} {activations:?} {} {expected}",
                    y[0]
                );
            }
        }
    }
}

fn shared() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../../shared/golden")
}

fn main() {
    let path = shared().join("gguf-blocks.json");
    let golden: Option<Golden> = path
        .exists()
        .then(|| serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap());
    let mut trials = Vec::new();
    for (ty, weighted, hex) in FIRST {
        let name = format!("the_first_input_has_the_bytes_of_ggml: {ty}, weighted {weighted}");
        trials.push(Trial::test(name, move || {
            let bytes = bytes_of(hex);
            let ty: BlockType = ty.parse()?;
            let n = ty.block_len();
            let weights = weighted.then(|| importance(n));
            let rounded = quantise(ty, &input("seed 1", n), n, weights.as_deref())?;
            assert_eq!(rounded.bytes(), bytes);
            Ok(())
        }));
    }
    match golden {
        None => trials.push(
            Trial::test("blocks (shared/golden/gguf-blocks.json)", || Ok(()))
                .with_ignored_flag(true),
        ),
        Some(golden) => {
            let activation = golden.activation.clone();
            trials.push(Trial::test(
                "the_activations_are_those_of_the_file",
                move || {
                    check_activation(&activation);
                    Ok(())
                },
            ));
            for case in golden.cases {
                let case: &'static Case = Box::leak(Box::new(case));
                let weights = case.weights.as_ref().map_or("", |_| ", weighted");
                let name = format!("{} of {}{weights}", case.ty, case.x);
                let trial = |claim: &str, check: fn(&Case)| {
                    Trial::test(format!("{claim}: {name}"), move || -> Result<(), Failed> {
                        check(case);
                        Ok(())
                    })
                };
                trials.push(trial(
                    "rounding_gives_the_bytes_of_ggml",
                    Case::rounding_gives_the_bytes_of_ggml,
                ));
                trials.push(trial(
                    "products_are_those_of_the_file",
                    Case::products_are_those_of_the_file,
                ));
                trials.push(trial(
                    "values_are_those_of_the_gguf_package",
                    Case::values_are_those_of_the_gguf_package,
                ));
            }
        }
    }
    libtest_mimic::run(&Arguments::from_args(), trials).exit();
}

fn check_activation(golden: &Activation) {
    let values = activation(256);
    for (i, block) in values.chunks(32).enumerate() {
        let max = block.iter().fold(0f32, |max, x| max.max(x.abs()));
        let d = max / 127.0;
        assert!((d - golden.d[i]).abs() <= 1e-8);
        let codes = block
            .iter()
            .map(|x| (x * (1.0 / d)).round_ties_even() as i8);
        assert!(codes.eq(golden.q[i].iter().copied()));
    }
}
